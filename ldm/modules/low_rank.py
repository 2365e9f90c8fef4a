"""Low-rank adaptation of the weights of layers: W + B A, with A and B beside W under W's own names.

Source: Hu et al. 2022 (arXiv 2106.09685). A layer keeps its forward, its parameters and their names; it has two
parameters more, `lora_A` and `lora_B`, and its `weight` reads as W + B A. While B is zero it computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor, nn

FACTORS = ("lora_A", "lora_B")
LAYERS_OF_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Stands for every layer inside of attention: of modules whose class is called so, or whose part is called `qkv`.
ATTENTION = "attention"
ATTENTION_CLASSES = ("attention", "attn")


class LowRankWeight(nn.Module):
    """What a layer with factors has before its own class: weight [D, ...] + B [D, R, ..] A [R, ...].

    The sum is made where `weight` is read, so whatever the layer's forward does with it, it does with the sum.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """W + B A, in the shape of W."""
        plain = self._parameters["weight"]
        assert plain is not None
        return plain + (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).reshape(plain.shape)


@cache
def _with_factors(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class whose weight has factors."""
    return type(f"LowRank{kind.__name__}", (LowRankWeight, kind), {})


def find_layers(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that fit any of the patterns, "attention" being those inside of attention.

    Raises:
        ValueError: if a pattern fits no linear or convolutional layer, with some of those that there are.
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, LAYERS_OF_WEIGHTS)]
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ATTENTION:
            found = _inside_attention(module, layers)
        else:
            found = {name for name in layers if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"heads.lora.layers: '{pattern}' fits no linear layer or convolution; there are, for example, "
                f"{', '.join(layers[:3]) or 'none'}"
            )
        chosen |= found
    return [name for name in layers if name in chosen]


def _inside_attention(module: nn.Module, layers: Sequence[str]) -> set[str]:
    """Return the layers of attention, by the classes of the modules that they lie in, or a sibling called `qkv`."""
    kinds = {name: type(one).__name__.lower() for name, one in module.named_modules()}
    inside = tuple(f"{name}." for name, kind in kinds.items() if any(word in kind for word in ATTENTION_CLASSES))
    found = {name for name in layers if inside and name.startswith(inside)}
    for name in layers:
        owner, _, last = name.rpartition(".")
        if last in ("qkv", "proj") and f"{owner}.qkv" in kinds:
            found.add(name)
    return found


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
        if not isinstance(layer, LowRankWeight):
            weight = layer.get_parameter("weight")
            first = weight.new_zeros(rank, *weight.shape[1:])
            second = weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2))
            layer.register_parameter("lora_A", nn.Parameter(first, weight.requires_grad))
            layer.register_parameter("lora_B", nn.Parameter(second, weight.requires_grad))
            layer.__class__ = _with_factors(type(layer))
        names += [f"{name}.{factor}" for factor in FACTORS]
    return names


def add_factors_of(module: nn.Module, heads: Mapping[str, Tensor]) -> None:
    """Give a module the factors that heads have and it has not, so that the heads fit.

    Args:
        module: the base model.
        heads: tensors of a member by name; factors of what is no such layer, a class table, are left alone.
    """
    known = dict(module.named_modules())
    for name, value in heads.items():
        layer, _, factor = name.rpartition(".")
        if factor == "lora_A" and isinstance(known.get(layer), LAYERS_OF_WEIGHTS):
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
