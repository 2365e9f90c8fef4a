"""How the blocks of a network run in training: compiled, and with their activations computed again."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.compiled import CompiledOrPlain
from ldm.modules.diffusionmodules.util import in_forward_mode, in_functorch
from ldm.modules.parts import Parts
from ldm.settings import Training
from ldm.training.joint import JointMembers

log = logging.getLogger(__name__)

Run = Callable[..., Any]
# Kinds of blocks of one class, times sizes of batches: more of them run uncompiled.
MOST_KINDS = 64


@dataclass(frozen=True)
class BlockOptions:
    """What a training does with the blocks of its network; weights, their names and draws are those without it.

    Args:
        compile: compile each kind of block once, instead of the whole network.
        gradient_checkpointing: keep the inputs of the blocks alone, and compute the rest again in the backward pass.
    """

    compile: bool = False
    gradient_checkpointing: bool = False

    @classmethod
    def choose(cls, training: Training, lightning: Mapping[str, Any]) -> BlockOptions:
        """Return what the options ask for, or where they do not the config's section `lightning`."""
        compiled = training.compile or bool(lightning.get("compile"))
        return cls(compiled, training.gradient_checkpointing or bool(lightning.get("gradient_checkpointing")))

    @property
    def values(self) -> dict[str, bool]:
        """Those that are asked for, by their keys in the config: a resumed run goes on with them."""
        return {name: value for name, value in vars(self).items() if value}

    def apply(self, model: nn.Module) -> BlockOptions:
        """Let the blocks of a model run so from now on, in training alone; return these options."""
        if not self.values:
            return self
        blocks = find_blocks(model)
        if not blocks:
            words = ", ".join(f"--{name}" for name in self.values)
            log.warning("%s: %s names no blocks; it runs as it is", words, type(model).__name__)
        compiled = CompiledBlocks() if self.compile else None
        for block in blocks:
            run = BlockForward(block, compiled, self.gradient_checkpointing)
            block.forward = run  # type: ignore[method-assign]
        return self


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that the networks of a model name (`Parts.taps`); a network that names none is one block."""
    model = model.members[0] if isinstance(model, JointMembers) else model
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        named = getattr(module, "parts", None)
        for name in named.taps.values() if isinstance(named, Parts) else ():
            block = module.get_submodule(name)
            found[id(block)] = block
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    return list(found.values()) or ([network] if isinstance(network, nn.Module) else [])


class CompiledBlocks:
    """Forward passes of blocks as compiled code, which blocks of one kind share; the plain ones where that fails.

    Code is made for each number of images by itself, so that a step does not depend on the sizes that came before:
    a resumed training computes what one that was never stopped does. Inputs are laid out contiguously first: of others
    vectorised code of torch 2.13 has given gradients that were wrong by a tenth (DiT's first block, float64).
    """

    def __init__(self) -> None:
        self._attempt = CompiledOrPlain()
        self._made: dict[Run, Run] = {}

    @property
    def works(self) -> bool:
        """Whether compiled code has not failed yet."""
        return self._attempt.works

    def __call__(self, plain: Run, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if plain not in self._made:
            self._made[plain] = _lay_out_inputs(compile_block(plain))
        return self._attempt(self._made[plain], plain, block, *args, **kwargs)


def _lay_out_inputs(compiled: Run) -> Run:
    """Return a function of (block, inputs) that lays the inputs out contiguously before they reach its code."""
    lay_out = lambda given: given.contiguous() if isinstance(given, torch.Tensor) else given  # noqa: E731

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(block, *map(lay_out, args), **{name: lay_out(one) for name, one in kwargs.items()})

    return run


def compile_block(plain: Run) -> Run:
    """Compile a function of (block, inputs); dropout draws what it draws in uncompiled code."""
    known = inspect.signature(torch.compile).parameters
    limits = {"recompile_limit": MOST_KINDS, "isolate_recompiles": True}
    given = {name: value for name, value in limits.items() if name in known}
    return torch.compile(plain, dynamic=False, options={"fallback_random": True}, **given)


class BlockForward:
    """The `forward` of one block. Evaluation, `torch.func` transforms and forward derivatives run it as it is."""

    def __init__(self, block: nn.Module, compiled: CompiledBlocks | None, recomputed: bool):
        self.block, self.compiled, self.recomputed = block, compiled, recomputed
        self.plain: Run = type(block).forward
        self.__wrapped__ = block.forward  # whose signature is this one's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.block.training and torch.is_grad_enabled()
        if not trains or in_functorch() or in_forward_mode():
            return self.plain(self.block, *args, **kwargs)
        if self.recomputed:
            return self._recompute(*args, **kwargs)
        return self.run(self.block, *args, **kwargs)

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the block, as compiled code where that is asked for."""
        if self.compiled is None:
            return self.plain(block, *args, **kwargs)
        return self.compiled(self.plain, block, *args, **kwargs)

    def _recompute(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block now and again in the backward pass, with the tensors that it has now."""
        holder = _Held(self.block, self.run)
        tensors = dict(holder.named_parameters()) | dict(holder.named_buffers())
        again = lambda *inputs: functional_call(holder, tensors, inputs, kwargs)  # noqa: E731
        return torch_checkpoint(again, *args, use_reentrant=False)


class _Held(nn.Module):
    """A block under a name, so that `functional_call` replaces its tensors for a run of it."""

    def __init__(self, block: nn.Module, run: Run):
        super().__init__()
        self.block, self.run = block, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.block, *args, **kwargs)
