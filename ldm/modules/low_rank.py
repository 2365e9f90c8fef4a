"""Low-rank adaptation of linear and convolutional layers: W + B A, with A and B beside W under W's own names.

Source: Hu et al. 2022 (arXiv 2106.09685). A layer keeps its class's behaviour, its parameters and their names, and has
two parameters more, `lora_A` and `lora_B`; while B is zero it computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTORS = ("lora_A", "lora_B")
# Stands for every layer inside a module whose class is called some kind of attention.
ATTENTION = "attention"


class LowRankLinear(nn.Linear):
    """A linear layer [D, K] with factors A [R, K] and B [D, R]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """`x W^T + x A^T B^T + bias`."""
        return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B)


class LowRankConv1d(nn.Conv1d):
    """A convolution with factors A [R, K, k], a convolution of the same geometry, and B [D, R, 1]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The convolution, and that by A to R channels, which B maps."""
        inner = F.conv1d(input, self.lora_A, None, self.stride, self.padding, self.dilation)
        return super().forward(input) + F.conv1d(inner, self.lora_B)


class LowRankConv2d(nn.Conv2d):
    """A convolution with factors A [R, K, k, k], a convolution of the same geometry, and B [D, R, 1, 1]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The convolution, and that by A to R channels, which B maps."""
        inner = F.conv2d(input, self.lora_A, None, self.stride, self.padding, self.dilation)
        return super().forward(input) + F.conv2d(inner, self.lora_B)


KINDS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
}


def find_layers(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that fit any of the patterns, "attention" being those inside of attention.

    Raises:
        ValueError: if a pattern fits no linear or convolutional layer, with some of those that there are.
    """
    layers = [name for name, layer in module.named_modules() if _is_plain(layer)]
    inside = tuple(f"{name}." for name, one in module.named_modules() if ATTENTION in type(one).__name__.lower())
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ATTENTION:
            found = {name for name in layers if name.startswith(inside)} if inside else set()
        else:
            found = {name for name in layers if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"heads.lora.layers: '{pattern}' fits no linear layer or convolution of one group; there are, for "
                f"example, {', '.join(layers[:3]) or 'none'}"
            )
        chosen |= found
    return [name for name in layers if name in chosen]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of ours or torch's own, whose forward is all that uses its weight."""
    kind = type(layer)
    if kind not in KINDS and kind not in KINDS.values():
        return False
    return getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"


def add_factors(module: nn.Module, layers: Sequence[str], rank: int) -> list[str]:
    """Give layers factors of a rank, all zero; return the factors' names.

    Raises:
        ValueError: for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"heads.lora.rank must be at least 1, got {rank}")
    names = []
    for name in layers:
        layer = module.get_submodule(name)
        if type(layer) in KINDS:
            weight = layer.get_parameter("weight")
            first = weight.new_zeros(rank, *weight.shape[1:])
            second = weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2))
            layer.__class__ = KINDS[type(layer)]
            layer.register_parameter("lora_A", nn.Parameter(first, weight.requires_grad))
            layer.register_parameter("lora_B", nn.Parameter(second, weight.requires_grad))
        names += [f"{name}.{factor}" for factor in FACTORS]
    return names


def add_factors_of(module: nn.Module, heads: Mapping[str, Tensor]) -> None:
    """Give a module the factors that heads have and it has not, so that the heads fit.

    Args:
        module: the base model.
        heads: tensors of a member by name; factors of another layer than a linear one or a convolution are left alone.
    """
    known = dict(module.named_modules())
    for name, value in heads.items():
        layer, _, factor = name.rpartition(".")
        if factor == "lora_A" and layer in known and type(known[layer]) in KINDS:
            add_factors(module, [layer], len(value))


@torch.no_grad()
def draw_factors(
    weight: Tensor, a: Tensor, b: Tensor, deviations: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the start of a correction B A of `weight` [D, K, ...], in place; return the deviations of both draws.

    A ~ N(0, 1 / fan_in) as published; B is zero, or drawn such that an entry of row d of B A has mean 0 and the
    deviation `deviations[d]`.

    Args:
        weight: of the layer.
        a, b: its factors.
        deviations: [D, 1, ...], None for B = 0.
        generator: of the draws.

    Returns:
        (of A, of B), which broadcast to them.
    """
    fan_in = weight[0].numel()
    first = torch.full((1,) * a.ndim, fan_in**-0.5).to(a)
    a.copy_(first * torch.randn(a.shape, generator=generator).to(a))
    second = torch.zeros((1,) * b.ndim).to(b)
    if deviations is not None:
        second = deviations.reshape(-1, *[1] * (b.ndim - 1)).to(b) * (fan_in / len(a)) ** 0.5
    b.copy_(second * torch.randn(b.shape, generator=generator).to(b))
    return first, second


def fold_factors(heads: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return heads in which factors of layers are replaced by the weights that they make, W + B A.

    Args:
        heads: tensors of a member by name.
        base: state dict of its base model, which has the weights W.
    """
    folded = dict(heads)
    for name in heads:
        layer, _, factor = name.rpartition(".")
        if factor == "lora_A" and f"{layer}.weight" in base:
            a, b = folded.pop(name), folded.pop(f"{layer}.lora_B")
            weight = folded.get(f"{layer}.weight", base[f"{layer}.weight"])
            folded[f"{layer}.weight"] = weight + (b.flatten(1) @ a.flatten(1)).reshape(weight.shape).to(weight)
    return folded
