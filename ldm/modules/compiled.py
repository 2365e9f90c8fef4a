"""Compiled blocks of a network: code is made once for all blocks that are alike, and for all numbers of images.

A whole network compiles for minutes, and again whenever the number of images changes. Its blocks are few kinds of
code, which see the number of images as a variable; what torch makes of them is kept on disk, for the next command too.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.memory import is_out_of_memory
from ldm.modules.copies import exchange_modules
from ldm.modules.diffusionmodules.util import repeat_rows
from ldm.modules.parts import find_parts

log = logging.getLogger(__name__)

_N = TypeVar("_N", bound=nn.Module)
_T = TypeVar("_T")
_Rows = Callable[..., Tensor]
# Kinds of blocks that one network may have; torch compiles no more than 8 by itself, and runs the others as they are.
_KINDS = 64
# What torch reads where it keeps compiled code; by default a folder that the next start of the machine may empty.
KEPT_AT = "TORCHINDUCTOR_CACHE_DIR"


class CompiledOrPlain:
    """Runs compiled code until it fails once, and plain code from then on, which it says.

    Attributes:
        works: whether compiled code has not failed yet.
    """

    def __init__(self) -> None:
        self.works = True

    def __call__(self, compiled: Callable[..., _T], plain: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Return `compiled(*args, **kwargs)`, or where that does not run `plain(*args, **kwargs)`.

        Raises:
            RuntimeError: if there is too little memory, which is no fault of compiled code.
        """
        if not self.works:
            return plain(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("--compile: this network does not compile here (%s); it runs as it is", reason)
            self.works = False
            return plain(*args, **kwargs)


def keep_compiled_code() -> str:
    """Let torch keep compiled code for later commands, beside other caches of the user; return the folder.

    `TORCHINDUCTOR_CACHE_DIR` names another folder. Code is kept by what it was made of: the operations, the types, the
    settings, and the versions of torch and of the compiler.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return os.environ.setdefault(KEPT_AT, str(caches / "decu" / "compiled"))


def name_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a network by name: what it names as taps, or what those are a row of.

    Single layers are no blocks: there is nothing to gain in them.
    """
    blocks: dict[str, nn.Module] = {}
    for name in find_parts(network).taps.values():
        tap = network.get_submodule(name)
        row = dict(tap.named_children()) if isinstance(tap, nn.Sequential) else {}
        found = {f"{name}.{child}": module for child, module in row.items()} or {name: tap}
        blocks |= {own: module for own, module in found.items() if _count_layers(module) > 1}
    return blocks


def _count_layers(module: nn.Module) -> int:
    return sum(any(one.ndim > 1 for one in layer.parameters(recurse=False)) for layer in module.modules())


def compile_blocks(network: _N) -> _N:
    """Return a copy of a network around the same weights whose blocks are compiled when they first run.

    A network without blocks is returned as it is.
    """
    compiled = {}
    for name, block in name_blocks(network).items():
        compiled[name] = copy.copy(block)
        vars(compiled[name])["forward"] = compile_rows(block.forward)
    return exchange_modules(network, compiled) if compiled else network


def compile_rows(function: _Rows, mode: str | None = None) -> _Rows:
    """Return a function of tensors [B, ...] compiled, once for all numbers of rows B.

    One row runs as two, since code for one row would be code of its own. Inputs of fewer rows are repeated until they
    have as many as the others, for the same reason.

    Args:
        function: takes tensors and None, and returns a tensor [B, ...].
        mode: of `torch.compile`.
    """
    from torch._dynamo import config, maybe_mark_dynamic  # which take seconds

    keep_compiled_code()
    config.recompile_limit = max(_KINDS, config.recompile_limit)
    compiled = torch.compile(function, mode=mode)

    def call(*inputs: Tensor | None) -> Tensor:
        rows = max(len(one) for one in inputs if one is not None)
        given = [None if one is None else repeat_rows(one, max(2, rows)).contiguous() for one in inputs]
        for one in given:
            if one is not None:
                maybe_mark_dynamic(one, 0)
        output = compiled(*given)
        return output[:1] if rows == 1 else output

    return call
