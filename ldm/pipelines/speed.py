"""How the network of a loaded model runs: precision, memory layout, compiled code, deep features that are kept.

Each falls back with a message, but for the last, which is refused where it does not act.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.diffusion.samplers.registry import Sampler
from ldm.memory import Chunker, keep_freed_memory, rows_that_fit
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.compiled import CompiledOrPlain, compile_blocks, compile_rows
from ldm.modules.diffusionmodules.util import in_forward_mode, in_functorch
from ldm.modules.paired import ImageRows, pair_layers
from ldm.modules.parts import find_parts
from ldm.pipelines.deep import ActiveChain, ReusingSampler
from ldm.settings import Speed

log = logging.getLogger(__name__)

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# CUDA graphs save the time between kernels, which counts where there are few images.
GRAPH_ROWS = 64
# So many rows of one image, and more, are rounded together: members that share a state, not the halves of guidance.
PAIRED_WAYS = 3
_T = TypeVar("_T")


class FastFeatures:
    """`unet.features` under autocast and compiled: the frozen backbone, where nearly all of the operations are.

    The solve, the samplers and every estimate stay outside and keep their precision; the features come out in the type
    of the last layer's parameters. Under `torch.func` transforms and forward derivatives the code runs uncompiled.

    The blocks of a network are compiled, once for all numbers of images; what has no blocks is compiled as a whole.

    Args:
        plain: `unet.features`.
        device: where it runs.
        precision: of matrix products and convolutions, see `PRECISIONS`.
        compiled: use `torch.compile`, with CUDA graphs for up to `GRAPH_ROWS` images.
        readout_dtype: type of the last layer's parameters.
    """

    def __init__(
        self,
        plain: Callable[..., Tensor],
        device: torch.device,
        precision: str,
        compiled: bool,
        readout_dtype: torch.dtype = torch.float32,
    ):
        self.plain = plain
        self.device = device
        self.readout_dtype = readout_dtype
        self.dtype = supported(precision, device)
        self.precision = "float32" if self.dtype is None else precision
        self._compiled = compiled
        self._attempt = CompiledOrPlain()
        self._rows = ImageRows()
        self._torso = self._pair(plain) if self.dtype is not None else plain
        # Rows that are rounded together come at the branched step alone, and run uncompiled: code holds their number.
        self._whole = _compile(plain) if compiled else self._torso
        graphs = compiled and device.type == "cuda"
        self._graphed = compile_rows(plain, mode="reduce-overhead") if graphs else None

    def of(self, unet: nn.Module) -> FastFeatures:
        """Return the same for the features of another network."""
        features = cast(Any, unet).features
        return FastFeatures(features, *self._further)

    @property
    def compiled(self) -> bool:
        """Whether code is compiled, and has not failed yet."""
        return self._compiled and self._attempt.works

    @property
    def _further(self) -> tuple[torch.device, str, bool, torch.dtype]:
        """Arguments after the first for the features of another network."""
        return self.device, self.precision, self.compiled, self.readout_dtype

    def _pair(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Let the rows of one image be rounded together, in a network that is told which they are."""
        network = getattr(plain, "__self__", None)
        if not (isinstance(network, nn.Module) and getattr(network, "shares_x", False)):
            return plain
        paired, self._rows = pair_layers(network)
        return cast(Any, paired).features

    def __call__(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(self._torso, self._fast, x, emb, context).to(self.readout_dtype)

    def _run(self, plain: Callable[..., _T], fast: Callable[..., _T], *inputs: Any) -> _T:
        """Return `fast(*inputs)`, or `plain(*inputs)` where compiled code does not run."""
        self._rows.total = max(len(one) for one in inputs if isinstance(one, Tensor))
        ways = self._rows.total // len(inputs[0])
        paired = self._torso is not self.plain and ways >= PAIRED_WAYS and not in_functorch()
        self._rows.ways = ways if paired else 1
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            if not self.compiled or self._rows.ways > 1 or _is_transformed():
                return plain(*inputs)
            return self._attempt(fast, plain, *inputs)

    def _fast(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        rows = max(len(x), len(emb), 0 if context is None else len(context))
        if self._graphed is None or rows > GRAPH_ROWS:
            return self._whole(x, emb, context)
        torch.compiler.cudagraph_mark_step_begin()
        return self._graphed(x, emb, context).clone()  # the next call overwrites what a graph returns


class DeepFeatures(FastFeatures):
    """`unet.features` that runs its deep blocks at every N-th evaluation of a chain, and takes what they gave between.

    Outside a chain, with gradients, under `torch.func` transforms and in forward mode everything runs.

    Args:
        plain: `unet.features`.
        speed: N, and how many blocks at either end always run.
        active: the chain that is being walked.
        further: arguments of `FastFeatures`.

    Raises:
        ValueError: if the network cannot be split, or has fewer blocks than are to run always.
    """

    def __init__(self, plain: Callable[..., Tensor], speed: Speed, active: ActiveChain, *further: Any):
        super().__init__(plain, *further)
        network = getattr(plain, "__self__", None)
        if not hasattr(network, "split_features"):
            raise ValueError(
                "--deep_every keeps deep features of the UNets of latent-diffusion and ADM; a network of class "
                f"{type(network).__name__} has none that are kept: leave it out"
            )
        self.speed, self.active = speed, active
        self.shallow = speed.shallow_blocks or 1
        blocks = len(cast(Any, network).input_blocks)
        if self.shallow > blocks:
            raise ValueError(f"--shallow_blocks takes at most the {blocks} blocks of this UNet, got {self.shallow}")

    def of(self, unet: nn.Module) -> DeepFeatures:
        """Return the same for the features of another network."""
        return DeepFeatures(cast(Any, unet).features, self.speed, self.active, *self._further)

    def __call__(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        chain = self.active.chain
        if chain is None or _is_transformed():
            return super().__call__(x, emb, context)
        return chain.run(self._split, self.shallow, x, emb, context)

    def _split(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        plain, fast = (cast(Any, one).__self__.split_features for one in (self._torso, self._whole))
        features, deep = self._run(plain, fast, *inputs)
        return features.to(self.readout_dtype), deep


def keep_deep(model: LatentDiffusion, sampler: Sampler) -> Sampler:
    """Return a sampler that keeps deep features of a model's network along its steps, where `speed` asked for that."""
    features = vars(model.model.diffusion_model).get("features")
    if not isinstance(features, DeepFeatures):
        return sampler
    return ReusingSampler(sampler, features.active, features.speed.deep_every)


def _is_transformed() -> bool:
    """Whether gradients or forward derivatives are wanted, or a transform of `torch.func` runs."""
    return in_functorch() or in_forward_mode() or torch.is_grad_enabled()


def _compile(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile the blocks of the network whose features these are; all of the function where there are none."""
    network = getattr(plain, "__self__", None)
    if isinstance(network, nn.Module):
        fast = compile_blocks(network)
        if fast is not network:
            return cast(Any, fast).features
    return compile_rows(plain)


def supported(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of a precision on a device; None is float32, also where the device has no such arithmetic."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return None
    if device.type == "cuda":
        possible = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported()
    else:
        features = torch.backends.cpu.get_cpu_capability()
        possible = dtype == torch.bfloat16 and "AVX512" in features
    if not possible:
        log.warning("--precision %s: not on this %s; it runs in float32", precision, device.type)
        return None
    return dtype


def with_speed(model: LatentDiffusion, speed: Speed, device: torch.device) -> tuple[LatentDiffusion, Chunker]:
    """Return a frozen model that runs as `speed` says, and what one pass of its network may hold.

    The result shares every weight with `model`, which keeps running as it did: precision and compilation act on a
    copy of the modules around the weights. Only the memory layout is the weights' own.
    """
    rows = rows_in_a_pass(model, device) if speed.chunk == "auto" else speed.chunk
    if device.type == "cpu":
        keep_freed_memory()
    unet = model.model.diffusion_model
    fast = speed_up(unet, speed, device)
    if fast is not unet:
        model = _with_module(model, "model", _with_module(model.model, "diffusion_model", fast))
    return model, Chunker(rows)


def make_example(
    model: LatentDiffusion, device: torch.device
) -> tuple[LatentDiffusion, tuple[Tensor, Tensor, Tensor | None]]:
    """Return a model that takes class labels or none, and one row of its network's arguments: a state of zeros.

    It is `model`, or that with one blank choice in place of the texts or pictures that it has no list of.
    """
    channels, *size = model.latent_shape
    x = torch.zeros((1, channels, *size), device=device)
    network = model.network
    tried = model.with_choices(network.blank_choice(size, channels)) if network.needs_choices else model
    cond = torch.zeros(1, dtype=torch.long, device=device) if tried.n_classes else None
    return tried, (x, x.new_zeros(1), cond)


def rows_in_a_pass(model: LatentDiffusion, device: torch.device) -> Any:
    """Return how many images fit into a pass of the network; one image without a condition is tried, if any is."""
    tried, example = make_example(model, device)
    return rows_that_fit(lambda: tried.network(*example), device)


def speed_up(unet: nn.Module, speed: Speed, device: torch.device) -> nn.Module:
    """Return a frozen UNet whose features are computed as `speed` says: itself, or a copy around the same weights."""
    if speed.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    plain = getattr(unet, "features", None)
    if isinstance(plain, FastFeatures):
        plain = plain.plain
    if speed.precision == "float32" and not speed.compile and speed.deep_every == 1:
        if "features" not in vars(unet):
            return unet
        features = plain
    elif plain is None and speed.deep_every == 1:
        log.warning("--precision, --compile: %s has no separate backbone; it runs as it is", type(unet).__name__)
        return unet
    else:
        last = find_parts(unet).last_layer
        dtype = torch.float32 if last is None else next(unet.get_submodule(last).parameters()).dtype
        further = (device, speed.precision, speed.compile, dtype)
        keeps = speed.deep_every > 1
        torso = cast(Any, plain)
        features = DeepFeatures(torso, speed, ActiveChain(), *further) if keeps else FastFeatures(torso, *further)
    unet = copy.copy(unet)
    vars(unet)["features"] = features  # before the class's method, and no module of its own
    return unet


M = TypeVar("M", bound=nn.Module)


def _with_module(module: M, name: str, child: nn.Module) -> M:
    """Return a shallow copy of a module with another child; all else is shared."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, name: child}
    return changed
