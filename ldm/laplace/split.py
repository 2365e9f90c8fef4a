"""A network in two pieces: the last layer, and what gives its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.laplace.arrangement import Arrangement, Example, find_arrangement
from ldm.modules.diffusionmodules.util import split_last_layer
from ldm.modules.parts import Parts, find_parts

LayerFeatures = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SplitNetwork(NamedTuple):
    """A network in two pieces: `network(x, t, cond) == layer(features(x, t, cond))`, but for an arrangement of entries.

    Attributes:
        features: takes the network's arguments and returns the input of its last layer; behind it along channels
            what the network adds to what the layer makes, where it adds something.
        layer: the last layer.
        name: the layer's name, as in `network.named_modules()`.
        arrangement: how the network lays out what the layer makes; None: it returns that.
    """

    features: LayerFeatures
    layer: nn.Module
    name: str
    arrangement: Arrangement | None = None


def split_network(
    network: nn.Module, name: str | None = None, example: Example | Arrangement | None = None
) -> SplitNetwork:
    """Split `network(x, t, cond)` at its last layer. Nothing in the network is changed.

    A network that names its parts, an `nn.Sequential` and one with a `backbone` and an `out` run up
    to the last layer only. Of any other module a forward hook reads what the last layer takes,
    and the layer runs as well.

    Args:
        network: the network.
        name: the last layer, as in `network.named_modules()`. Where it is None, what the network
            says (`ldm.modules.parts`), else its last convolution or linear layer.
        example: one row of the network's arguments, by which is found how it lays out the layer's
            output; or that arrangement. Where it is None, it must return that output itself.

    Raises:
        ValueError: if `name` is not the last layer, or there is no convolution or linear layer.
    """
    parts = find_parts(network)
    last = parts.last_layer
    named = isinstance(getattr(network, "parts", None), Parts)
    if last is None and named:
        raise ValueError(
            "the network's output is not what one convolution or linear layer makes, and a posterior of the last layer "
            "needs one: take members of LoRA or of class rows"
        )
    if last is None and name is None:
        raise ValueError(f"{type(network).__name__} holds no convolution or linear layer: name its last layer")
    if named:
        if name not in (None, last):
            raise ValueError(f"the last layer of {type(network).__name__} is '{last}', got '{name}'")
        if parts.adds_to_last:
            return _split_sum(network, cast(str, last))
        return _split_before(network, cast(str, last), example)
    name = cast(str, last if name is None else name)
    if example is not None:
        return _split_before(network, name, example)
    if isinstance(network, nn.Sequential) or hasattr(network, "backbone"):
        features, layer = split_last_layer(network, name)
        return SplitNetwork(features, layer, name)
    return _split_by_hook(network, name)


class _Reached(Exception):
    """Ends a forward pass at the last layer, with what that would take."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features


def _split_before(network: nn.Module, name: str, example: Example | Arrangement | None) -> SplitNetwork:
    """Split a network at a layer known to be its last, or found to be by an example; a pass ends where it would run."""
    if name not in dict(network.named_modules()):
        raise ValueError(f"{type(network).__name__} has no layer '{name}': give a name of `named_modules()`")
    arrangement = find_arrangement(network, name, example) if isinstance(example, tuple) else example
    layer = network.get_submodule(name)

    def end(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    def run_to_layer(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        handle = layer.register_forward_pre_hook(end)
        try:
            network(x, t, cond)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise ValueError(f"{type(network).__name__} ran without its last layer '{name}'")

    return SplitNetwork(run_to_layer, layer, name, arrangement)


def _split_sum(network: nn.Module, name: str) -> SplitNetwork:
    """Split a network that adds something to what its last layer makes; that goes behind the layer's input.

    It is what the network gives where the layer makes zeros.
    """
    layer = network.get_submodule(name)

    def run_without(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        caught: list[Tensor] = []

        def silence(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            caught.append(inputs[0])
            return torch.zeros_like(output)

        handle = layer.register_forward_hook(silence)
        try:
            added = network(x, t, cond)
        finally:
            handle.remove()
        return torch.cat([caught[0], added], dim=1)  # [B, F + C, H, W]

    return SplitNetwork(run_without, layer, name)


def _split_by_hook(network: nn.Module, name: str) -> SplitNetwork:
    """Split any module by hooks on its last layer, which are there during a call only."""
    if name not in dict(network.named_modules()):
        raise ValueError(f"{type(network).__name__} has no layer '{name}': give a name of `named_modules()`")
    layer = network.get_submodule(name)

    def run_and_catch(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        caught: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(lambda _, args, output: caught.append((args[0], output)))
        try:
            output = network(x, t, cond)
        finally:
            handle.remove()
        if len(caught) != 1 or not _is_same(output, caught[0][1]):
            raise ValueError(
                f"'{name}' is not the last layer of {type(network).__name__}: it ran {len(caught)} times, or "
                "what it gives is not the network's output; name the layer whose output the network returns"
            )
        return caught[0][0]

    return SplitNetwork(run_and_catch, layer, name)


def _is_same(output: Any, made: Tensor) -> bool:
    """Whether a network's output is what its last layer made, value for value."""
    if output is made:
        return True
    return isinstance(output, Tensor) and output.dtype == made.dtype and torch.equal(output, made)
