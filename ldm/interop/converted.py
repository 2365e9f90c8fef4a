"""A network in another library's words: the class that computes it, its constructor's arguments, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Converted:
    """A network as a class of diffusers has it.

    Args:
        class_name: of diffusers.
        config: arguments of its constructor.
        state: its state dict.
    """

    class_name: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]


def tensors_below(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state dict of a module with its keys below `name`."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def renamed(module: nn.Module, names: Mapping[str, str], name: str) -> dict[str, Tensor]:
    """Return the tensors of the submodules that `names` lists, {ours: theirs}, below `name`.

    A submodule that the module does not have is left out; a kernel of 1 stays one.
    """
    found: dict[str, Tensor] = {}
    own = dict(module.named_modules())
    for ours, theirs in names.items():
        if ours in own:
            found |= tensors_below(own[ours], f"{name}.{theirs}")
    return found


def as_linear(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a convolution with kernel 1 as a linear layer's tensors below `name`."""
    state = {f"{name}.weight": layer.weight.flatten(1)}
    return state if layer.bias is None else {**state, f"{name}.bias": layer.bias}


def require(condition: bool, message: str) -> None:
    """Check what another library's class must be able to compute.

    Raises:
        ValueError: saying what it cannot.
    """
    if not condition:
        raise ValueError(f"diffusers has no class for this network: {message}")
