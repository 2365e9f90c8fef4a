"""The last layer of a network as linear regression: its inputs as patches, its parameters as one matrix.

A convolution (or a linear map of tokens) is f_p = W a_p, where a_p is the unfolded patch of
features at output position p, followed by 1 where the layer has a bias. What the network makes of
f, a picture of tokens for example, is a fixed arrangement of its entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.laplace.arrangement import Arrangement, Places
from ldm.modules.low_rank import LowRankWeight


@dataclass(frozen=True, eq=False)
class LastLayer:
    """The geometry of a Conv2d (zero padding, one group) or a Linear layer.

    Its features are [B, F, H, W], or [B, ..., F] of a linear layer. A convolution may be followed by
    further channels [B, C, H, W] that it adds to what it makes, which no parameter multiplies. In the shapes below C =
    `outputs`, P is the number of output positions, and K is `width`. Outputs are the network's:
    [B, C, H, W] of a convolution, [B, ..., C] of tokens, or what these are laid out as.

    Attributes:
        layer: the layer, whose parameters are read whenever they are asked for.
        outputs: number of the layer's rows that are regressed: all of them, or half of those of a
            network that learns its variance as well.
        places: which rows, and what the network makes of what they make; None: the leading rows,
            whose output is the network's.

    Raises:
        ValueError: for any other layer, or a number of outputs that it does not have.
    """

    layer: nn.Conv2d | nn.Linear
    outputs: int
    places: Places | None = None

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
        if isinstance(layer, LowRankWeight):
            raise ValueError(
                "the last layer holds low-rank factors beside its weight, and draws of the weight would count them "
                "twice: load the member itself (--run), whose factors are folded into the weight"
            )
        if not 1 <= self.outputs <= len(layer.weight):
            raise ValueError(f"outputs must be 1 .. {len(layer.weight)} of this layer, got {self.outputs}")

    @classmethod
    def from_module(
        cls, module: nn.Module, outputs: int | None = None, arrangement: Arrangement | None = None
    ) -> LastLayer:
        """Return a module's geometry.

        Args:
            module: the layer.
            outputs: leading channels of the network's output that are regressed; all where None.
            arrangement: how the network lays out what the layer makes.
        """
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            raise ValueError(f"the last layer must be Conv2d or Linear, got {type(module).__name__}")
        if arrangement is None:
            return cls(module, len(module.weight) if outputs is None else outputs)
        channels = arrangement.shape[0] if outputs is None else outputs
        if not 1 <= channels <= arrangement.shape[0]:
            raise ValueError(f"outputs must be 1 .. {arrangement.shape[0]} of this network, got {channels}")
        places = arrangement.place(channels, isinstance(module, nn.Linear)).to(module.weight.device)
        return cls(module, len(places.rows), places)

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
        weight = self._rows_of(self.layer.weight.detach()).flatten(1).double()
        bias = self.layer.bias
        if bias is None:
            return weight
        return torch.cat([weight, self._rows_of(bias.detach())[:, None].double()], 1)

    def _rows_of(self, values: Tensor, axis: int = 0) -> Tensor:
        """The regressed rows of values that the layer has one of for each of its rows, along `axis`."""
        if self.places is None:
            return values.narrow(axis, 0, self.outputs)
        return values.index_select(axis, self.places.rows)

    def overrides(self, matrices: Tensor) -> dict[str, Tensor]:
        """Parameters of the layer from matrices [M, C, K]; channels that are not regressed keep theirs."""
        weight = self.layer.weight.detach()
        bias = self.layer.bias
        flat = matrices.to(weight)
        own = flat if bias is None else flat[..., :-1]
        rows = slice(self.outputs) if self.places is None else self.places.rows
        stacked = weight.expand(len(flat), *weight.shape).clone()
        stacked[:, rows] = own.reshape(len(flat), self.outputs, *weight.shape[1:])
        if bias is None:
            return {"weight": stacked}
        biases = bias.detach().expand(len(flat), -1).clone()
        biases[:, rows] = flat[..., -1]
        return {"weight": stacked, "bias": biases}

    def patches(self, features: Tensor) -> Tensor:
        """The patches [B, P, K]: what each output position multiplies with the parameters."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            features = features[:, : layer.in_channels]
            columns = F.unfold(features, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
            columns = columns.transpose(1, 2)
        else:
            columns = features.reshape(len(features), -1, features.shape[-1])
        if self.places is not None:
            columns = columns[:, self.places.positions]
        return torch.cat([columns, torch.ones_like(columns[..., :1])], -1) if self.bias else columns

    def by_position(self, output: Tensor) -> Tensor:
        """An output of the regressed rows as [B, P, C]."""
        return self._by_position(output) if self.places is None else self.places.by_position(output)

    def _by_position(self, made: Tensor) -> Tensor:
        """What the layer makes, [B, C, H, W] or [B, ..., C], with one axis of positions, [B, P, C]."""
        if isinstance(self.layer, nn.Conv2d):
            return made.flatten(2).transpose(1, 2)
        return made.reshape(len(made), -1, made.shape[-1])

    def as_output(self, values: Tensor, features: Tensor) -> Tensor:
        """The inverse of `by_position`, for the shape of `features`; [B, P, 1] is the value of every row."""
        layer = self.layer
        if self.places is not None:
            return self.places.lay_out(values)
        if not isinstance(layer, nn.Conv2d):
            return self.for_all_outputs(values.reshape(*features.shape[:-1], values.shape[-1]))
        geometry = zip(
            features.shape[-2:], _padding(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in geometry
        ]
        return self.for_all_outputs(values.transpose(1, 2).unflatten(2, sizes))

    def output(self, features: Tensor) -> Tensor:
        """The network's output of the regressed rows for `features`."""
        layer = self.layer
        if not isinstance(layer, nn.Conv2d) or features.shape[1] == layer.in_channels:
            return self.arranged(self._rows_of(layer(features), self.channel_axis % features.ndim))
        given, added = features.split((layer.in_channels, features.shape[1] - layer.in_channels), dim=1)
        return self._rows_of(layer(given), axis=1) + self._rows_of(added, axis=1)

    def arranged(self, made: Tensor) -> Tensor:
        """The network's output, of what the regressed rows of the layer make (or one value for all)."""
        if self.places is None:
            return made
        return self.places.lay_out(self._by_position(made)[:, self.places.positions])

    def for_all_outputs(self, value: Tensor) -> Tensor:
        """The network's output of a value of each row, or one of all, as the layer makes it: [B, 1 or C, H, W]."""
        shape = [-1] * value.ndim
        shape[self.channel_axis] = self.outputs
        return self.arranged(value.expand(shape))

    def apply(self, matrix: Tensor, features: Tensor) -> Tensor:
        """What the layer gives for `features` with `matrix` [C', K] in place of its parameters."""
        matrix = matrix.to(features)
        offset = matrix[:, -1] if self.bias else None
        flat = matrix[:, :-1] if self.bias else matrix
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(features, flat, offset)
        weight = flat.reshape(len(flat), *layer.weight.shape[1:])
        return F.conv2d(features[:, : layer.in_channels], weight, offset, layer.stride, layer.padding, layer.dilation)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution in numbers; `LastLayer` takes no 'same'."""
    return (0, 0) if isinstance(layer.padding, str) else cast("tuple[int, int]", layer.padding)
