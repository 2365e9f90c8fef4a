"""The last layer of a network as linear regression: its inputs as patches, its parameters as one matrix.

A convolution (or a linear map of tokens) is f_p = W a_p with a_p the unfolded patch of features at output position p,
followed by 1 where there is a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import split_last_layer

Features = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def split_network(network: nn.Module, name: str | None = None) -> tuple[Features, nn.Module, str]:
    """Split `network(x, t, cond)` at its last layer: `network(x, t, cond) == layer(features(x, t, cond))`.

    Args:
        network: in stages (`condition`, `trunk`, `readout` and `output_patterns`, as LatentDiffusion's network), or
            one that `split_last_layer` takes.
        name: the last layer, as in `network.named_modules()`; where None, the last submodule with a weight.

    Returns:
        `features`, the layer, its name.

    Raises:
        ValueError: if `name` is not the last layer.
    """
    weighted = [key for key, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if not hasattr(network, "output_patterns"):
        name = weighted[-1] if name is None and weighted else str(name)
        features, layer = split_last_layer(network, name)
        return features, layer, name
    heads = {pattern.removesuffix(".*") for pattern in network.output_patterns}
    candidates = [key for key in weighted if key in heads or key.rpartition(".")[0] in heads]
    last = candidates[-1] if candidates else None
    head = network.get_submodule(last if last in heads else last.rpartition(".")[0]) if last else None
    before = head[:-1] if isinstance(head, nn.Sequential) else nn.Identity()
    layer = head[-1] if isinstance(head, nn.Sequential) else head
    if layer is None:
        raise ValueError(
            f"{type(network).__name__} does not end in a convolution or linear layer below {sorted(heads)}"
        )
    if name not in (None, last) or layer is not network.get_submodule(last):
        raise ValueError(f"the last layer of {type(network).__name__} is '{last}', got '{name}'")

    def staged(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return before(network.backbone(x, *network.condition(t, cond)))

    return staged, layer, last


@dataclass(frozen=True)
class LastLayer:
    """Geometry of a Conv2d (zero padding, one group) or Linear layer on features [B, F, H, W] or [B, ..., F].

    `outputs` is the number of leading output channels that are regressed: all of them, or the half of a network that
    learns its variance besides.
    """

    layer: nn.Conv2d | nn.Linear
    outputs: int

    def __post_init__(self):
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

    @property
    def bias(self) -> bool:
        return self.layer.bias is not None

    @property
    def width(self) -> int:
        """K (+ 1): entries of a patch, the bias's 1 included."""
        return self.layer.weight[0].numel() + self.bias

    def matrix(self) -> Tensor:
        """The trained parameters of the regressed channels as float64 [C, K (+ 1)]."""
        weight = self.layer.weight.detach()[: self.outputs].flatten(1).double()
        return torch.cat([weight, self.layer.bias.detach()[: self.outputs, None].double()], 1) if self.bias else weight

    def overrides(self, matrices: Tensor) -> dict[str, Tensor]:
        """Parameters of the layer from matrices [M, C, K (+ 1)]; channels that are not regressed keep theirs."""
        weight = self.layer.weight.detach()
        flat = matrices.to(weight)
        own = flat[..., :-1] if self.bias else flat
        stacked = weight.expand(len(flat), *weight.shape).clone()
        stacked[:, : self.outputs] = own.reshape(len(flat), self.outputs, *weight.shape[1:])
        if not self.bias:
            return {"weight": stacked}
        bias = self.layer.bias.detach().expand(len(flat), -1).clone()
        bias[:, : self.outputs] = flat[..., -1]
        return {"weight": stacked, "bias": bias}

    def patches(self, features: Tensor) -> Tensor:
        """[B, P, K (+ 1)]: what each output position multiplies with the parameters."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            padding = 0 if layer.padding == "valid" else layer.padding
            columns = F.unfold(features, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
        else:
            columns = features.reshape(len(features), -1, features.shape[-1])
        return torch.cat([columns, torch.ones_like(columns[..., :1])], -1) if self.bias else columns

    def by_position(self, output: Tensor) -> Tensor:
        """An output of the layer [B, C, H, W] (or [B, ..., C]) as [B, P, C]."""
        if isinstance(self.layer, nn.Conv2d):
            return output.flatten(2).transpose(1, 2)
        return output.reshape(len(output), -1, output.shape[-1])

    def regressed(self, output: Tensor) -> Tensor:
        """The regressed channels of an output of the layer."""
        return output.narrow(self.channel_axis, 0, self.outputs)

    @property
    def channel_axis(self) -> int:
        return 1 if isinstance(self.layer, nn.Conv2d) else -1

    def for_all_outputs(self, value: Tensor) -> Tensor:
        """A value of one channel, [B, 1, H, W] (or [B, ..., 1]), for each regressed channel."""
        shape = [-1] * value.ndim
        shape[self.channel_axis] = self.outputs
        return value.expand(shape)

    def as_output(self, values: Tensor, features: Tensor) -> Tensor:
        """The inverse of `by_position`: [B, P, C] in the shape the layer gives for `features`."""
        if not isinstance(self.layer, nn.Conv2d):
            return values.reshape(*features.shape[:-1], values.shape[-1])
        layer = self.layer
        padding = (0, 0) if layer.padding == "valid" else layer.padding
        reach = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        sizes = [
            (size + 2 * pad - far - 1) // stride + 1
            for size, pad, far, stride in zip(features.shape[-2:], padding, reach, layer.stride, strict=True)
        ]
        return values.transpose(1, 2).unflatten(2, sizes)

    def apply(self, matrix: Tensor, features: Tensor) -> Tensor:
        """The layer with `matrix` [C', K (+ 1)] in place of its parameters."""
        matrix = matrix.to(features)
        offset = matrix[:, -1] if self.bias else None
        flat = matrix[:, :-1] if self.bias else matrix
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(features, flat, offset)
        weight = flat.reshape(len(flat), *layer.weight.shape[1:])
        return F.conv2d(features, weight, offset, layer.stride, layer.padding, layer.dilation)
