"""The last layer of a network as linear regression: its inputs as patches, its parameters as one matrix.

A convolution (or a linear map of tokens) is f_p = W a_p, where a_p is the unfolded patch of
features at output position p, followed by 1 where the layer has a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import split_last_layer
from ldm.modules.parts import Parts, find_parts

LayerFeatures = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SplitNetwork(NamedTuple):
    """A network in two pieces: `network(x, t, cond) == layer(features(x, t, cond))`.

    Attributes:
        features: takes the network's arguments and returns the input of its last layer.
        layer: the last layer.
        name: the layer's name, as in `network.named_modules()`.
    """

    features: LayerFeatures
    layer: nn.Module
    name: str


def split_network(network: nn.Module, name: str | None = None) -> SplitNetwork:
    """Split `network(x, t, cond)` at its last layer. Nothing in the network is changed.

    A network that names its parts, an `nn.Sequential` and one with a `backbone` and an `out` run up
    to the last layer only. Of any other module a forward hook reads what the last layer takes,
    and the layer runs as well.

    Args:
        network: the network.
        name: the last layer, as in `network.named_modules()`. Where it is None, what the network
            says (`ldm.modules.parts`), else its last convolution or linear layer.

    Raises:
        ValueError: if `name` is not the last layer, or there is no convolution or linear layer.
    """
    last = find_parts(network).last_layer
    if last is None and name is None:
        raise ValueError(f"{type(network).__name__} holds no convolution or linear layer: name its last layer")
    if isinstance(getattr(network, "parts", None), Parts):
        if name not in (None, last):
            raise ValueError(f"the last layer of {type(network).__name__} is '{last}', got '{name}'")
        return _split_before(network, cast(str, last))
    name = cast(str, last if name is None else name)
    if isinstance(network, nn.Sequential) or hasattr(network, "backbone"):
        features, layer = split_last_layer(network, name)
        return SplitNetwork(features, layer, name)
    return _split_by_hook(network, name)


class _Reached(Exception):
    """Ends a forward pass at the last layer, with what that would take."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features


def _split_before(network: nn.Module, name: str) -> SplitNetwork:
    """Split a network at a layer known to be its last; a pass ends where this would run."""
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

    return SplitNetwork(run_to_layer, layer, name)


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


@dataclass(frozen=True)
class LastLayer:
    """The geometry of a Conv2d (zero padding, one group) or a Linear layer.

    Its features are [B, F, H, W], or [B, ..., F] of a linear layer. In the shapes below C =
    `outputs`, P is the number of output positions, and K is `width`.

    Attributes:
        layer: the layer, whose parameters are read whenever they are asked for.
        outputs: number of leading output channels that are regressed: all of them, or half of
            those of a network that learns its variance as well.

    Raises:
        ValueError: for any other layer, or a number of outputs that it does not have.
    """

    layer: nn.Conv2d | nn.Linear
    outputs: int

    def __post_init__(self) -> None:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or layer.padding == "same":
                raise ValueError(
                    "the last convolution must have one group and zero padding given in numbers, got groups "
                    f"{layer.groups}, padding {layer.padding!r} of '{layer.padding_mode}'"
                )
        elif not isinstance(layer, nn.Linear):
            raise ValueError(f"the last layer must be Conv2d or Linear, got {type(layer).__name__}")
        if not 1 <= self.outputs <= len(layer.weight):
            raise ValueError(f"outputs must be 1 .. {len(layer.weight)} of this layer, got {self.outputs}")

    @classmethod
    def from_module(cls, module: nn.Module, outputs: int | None = None) -> LastLayer:
        """Return a module's geometry; all its output channels are regressed where `outputs` is None."""
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            raise ValueError(f"the last layer must be Conv2d or Linear, got {type(module).__name__}")
        return cls(module, len(module.weight) if outputs is None else outputs)

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias, which is then the last of the K entries."""
        return self.layer.bias is not None

    @property
    def width(self) -> int:
        """K: the number of entries of a patch, the 1 that multiplies the bias included."""
        return self.layer.weight[0].numel() + self.bias

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in an output of the layer."""
        return 1 if isinstance(self.layer, nn.Conv2d) else -1

    def matrix(self) -> Tensor:
        """The trained parameters of the regressed channels as one float64 matrix [C, K]."""
        weight = self.layer.weight.detach()[: self.outputs].flatten(1).double()
        bias = self.layer.bias
        if bias is None:
            return weight
        return torch.cat([weight, bias.detach()[: self.outputs, None].double()], 1)

    def overrides(self, matrices: Tensor) -> dict[str, Tensor]:
        """Parameters of the layer from matrices [M, C, K]; channels that are not regressed keep theirs."""
        weight = self.layer.weight.detach()
        bias = self.layer.bias
        flat = matrices.to(weight)
        own = flat if bias is None else flat[..., :-1]
        stacked = weight.expand(len(flat), *weight.shape).clone()
        stacked[:, : self.outputs] = own.reshape(len(flat), self.outputs, *weight.shape[1:])
        if bias is None:
            return {"weight": stacked}
        biases = bias.detach().expand(len(flat), -1).clone()
        biases[:, : self.outputs] = flat[..., -1]
        return {"weight": stacked, "bias": biases}

    def patches(self, features: Tensor) -> Tensor:
        """The patches [B, P, K]: what each output position multiplies with the parameters."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            columns = F.unfold(features, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
            columns = columns.transpose(1, 2)
        else:
            columns = features.reshape(len(features), -1, features.shape[-1])
        return torch.cat([columns, torch.ones_like(columns[..., :1])], -1) if self.bias else columns

    def by_position(self, output: Tensor) -> Tensor:
        """An output of the layer, [B, C, H, W] or [B, ..., C], as [B, P, C]."""
        if isinstance(self.layer, nn.Conv2d):
            return output.flatten(2).transpose(1, 2)
        return output.reshape(len(output), -1, output.shape[-1])

    def as_output(self, values: Tensor, features: Tensor) -> Tensor:
        """The inverse of `by_position`: [B, P, C] in the shape that the layer gives for `features`."""
        layer = self.layer
        if not isinstance(layer, nn.Conv2d):
            return values.reshape(*features.shape[:-1], values.shape[-1])
        geometry = zip(
            features.shape[-2:], _padding(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in geometry
        ]
        return values.transpose(1, 2).unflatten(2, sizes)

    def regressed(self, output: Tensor) -> Tensor:
        """The regressed channels of an output of the layer."""
        return output.narrow(self.channel_axis, 0, self.outputs)

    def output(self, features: Tensor) -> Tensor:
        """The regressed channels of what the layer gives for `features`."""
        return self.regressed(self.layer(features))

    def for_all_outputs(self, value: Tensor) -> Tensor:
        """A value of one channel, [B, 1, H, W] or [B, ..., 1], for each regressed channel."""
        shape = [-1] * value.ndim
        shape[self.channel_axis] = self.outputs
        return value.expand(shape)

    def apply(self, matrix: Tensor, features: Tensor) -> Tensor:
        """What the layer gives for `features` with `matrix` [C', K] in place of its parameters."""
        matrix = matrix.to(features)
        offset = matrix[:, -1] if self.bias else None
        flat = matrix[:, :-1] if self.bias else matrix
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(features, flat, offset)
        weight = flat.reshape(len(flat), *layer.weight.shape[1:])
        return F.conv2d(features, weight, offset, layer.stride, layer.padding, layer.dilation)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution in numbers; `LastLayer` takes no 'same'."""
    return (0, 0) if isinstance(layer.padding, str) else cast("tuple[int, int]", layer.padding)
