"""Members that differ inside the backbone, folded into one batch: a layer computes for all of them in one product.

Rows of a folded batch lie member by member: those of the first, then those of the second. A layer in which members
differ computes what they share once for all rows, `W x`, and what is a member's own in one product of groups:

- factors of a low rank: W x + B_m (A_m x), without W + B_m A_m ever being made;
- rows of W that a member changes: its own rows of W_m x take the place of those of W x;
- whole weights: W_m x in groups.

Each equals a pass of member m alone to rounding, and W is read once however many members there are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.copies import exchange_modules
from ldm.modules.low_rank import FACTORS, LAYERS_OF_WEIGHTS

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}
PLAIN_FORWARDS = tuple(kind.forward for kind in LAYERS_OF_WEIGHTS)
FOLDED = ("weight", "bias", *FACTORS)
_N = TypeVar("_N", bound=nn.Module)


@dataclass
class Present:
    """Which members the rows of the current batch belong to."""

    members: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Own:
    """What the members have of their own in one layer, [M, ...]; None where they have nothing.

    Attributes:
        weight: [M, k, ...], the rows `rows` of their weights, or all of them.
        rows: [k], None: all of them.
        first, second: factors A [M, R, ...] and B [M, D, R, ..] of what is added to the weights.
        bias: [M, D].
    """

    weight: Tensor | None = None
    rows: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    bias: Tensor | None = None

    def select(self, members: slice) -> Own:
        """Return that of some members."""
        parts = {name: getattr(self, name) for name in ("weight", "first", "second", "bias")}
        return replace(self, **{name: value[members] for name, value in parts.items() if value is not None})


class FoldedLayer(nn.Module):
    """What a layer of a folded batch has before its own class: a forward that knows what is whose.

    Attributes:
        own: what the members have of their own.
        present: which of them the batch holds.
    """

    own: Own
    present: Present

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output of rows [m n, ...], n rows of each member that is present."""
        own = self.own.select(self.present.members)
        channel = x.ndim - 1 if isinstance(self, nn.Linear) else 1
        bias = None if own.bias is not None else self._parameters["bias"]
        if own.weight is None:
            output = self._product(x, bias)
        elif own.rows is None:
            output = _add(self._products(x, own.weight), bias, channel)
        else:
            changed = _add(self._products(x, own.weight), None if bias is None else bias[own.rows], channel)
            output = self._product(x, bias)
            output = output.index_copy(channel, own.rows, changed.to(output.dtype))
        if own.first is not None and own.second is not None:
            low = self._products(x, own.first)  # [m n, R, ...] or [m n, ..., R]
            output = output + _multiply(low, own.second.flatten(2), channel)
        if own.bias is not None:
            output = _add_own(output, own.bias, channel).to(output.dtype)
        return output

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b, with the weights that all members share."""
        weight = self._parameters["weight"]
        assert weight is not None
        if isinstance(self, nn.Linear):
            return F.linear(x, weight, bias)
        return _CONVOLUTIONS[x.ndim - 2](x, weight, bias, **_arguments(self))

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        """W_m x of weights [m, k, ...], without a bias."""
        if isinstance(self, nn.Linear):
            return _multiply(x, weight, x.ndim - 1)
        given = _arguments(self)
        pointwise = all(size == 1 for size in (*weight.shape[3:], *given["stride"]))
        if pointwise and not any(given["padding"]):
            return _multiply(x, weight.flatten(2), 1)
        count = len(weight)
        beside = x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)  # [n, m C, ...]
        found = _CONVOLUTIONS[x.ndim - 2](beside, weight.flatten(0, 1), None, groups=count, **given)
        return found.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)  # [m n, k, ...]


def _arguments(layer: Any) -> dict[str, Any]:
    """What a convolution is computed with, beside its weights."""
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _multiply(x: Tensor, weight: Tensor, channel: int) -> Tensor:
    """Products in groups, along the axis `channel` of x [m n, ...] with weights [m, k, c]."""
    grouped = x.unflatten(0, (len(weight), -1))
    if channel == x.ndim - 1:
        rows = grouped.flatten(1, -2)  # [m, n ..., c]
        return torch.bmm(rows, weight.mT).reshape(*x.shape[:-1], -1)
    points = grouped.flatten(3)  # [m, n, c, P]
    return (weight[:, None] @ points).reshape(len(x), -1, *x.shape[2:])


def _add(output: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    """Add a bias [k] along the axis `channel`."""
    return output if bias is None else output + bias.reshape(-1, *[1] * (output.ndim - 1 - channel))


def _add_own(output: Tensor, bias: Tensor, channel: int) -> Tensor:
    """Add each member's bias [m, k] to its rows."""
    grouped = output.unflatten(0, (len(bias), -1))
    shape = [len(bias), *[1] * (grouped.ndim - 1)]
    shape[channel + 1] = bias.shape[1]
    return (grouped + bias.reshape(shape)).flatten(0, 1)


@cache
def _with_groups(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that computes for all members."""
    return type(f"Folded{kind.__name__}", (FoldedLayer, kind), {})


def can_fold(network: nn.Module, names: Mapping[str, Tensor]) -> bool:
    """Whether parameters are those of linear layers and convolutions that a folded batch can run through.

    Args:
        network: the network; names: what members override.
    """
    return all(_is_foldable(network, name) for name in names)


def _is_foldable(network: nn.Module, name: str) -> bool:
    owner, _, parameter = name.rpartition(".")
    layer = network.get_submodule(owner)
    if not isinstance(layer, LAYERS_OF_WEIGHTS) or parameter not in FOLDED:
        return False
    plain = type(layer).forward in PLAIN_FORWARDS
    if isinstance(layer, nn.Linear):
        return plain
    return plain and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def fold_members(network: _N, overrides: Mapping[str, Tensor]) -> tuple[_N, Present]:
    """Return a copy of a network that takes rows of all members, and what says whose rows the next batch holds.

    The network must keep the rows of its batch in the first axis, in their order, as all of `ldm.modules` do.

    Args:
        network: the network, which stays as it is.
        overrides: {name: [M, ...]} of parameters that `can_fold`.
    """
    present = Present()
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in overrides.items():
        owner, _, parameter = name.rpartition(".")
        layers.setdefault(owner, {})[parameter] = value
    folded = {name: _fold(network.get_submodule(name), values, present) for name, values in layers.items()}
    return exchange_modules(network, folded), present


def _fold(layer: nn.Module, values: Mapping[str, Tensor], present: Present) -> nn.Module:
    copied, kind = copy.copy(layer), cast(Any, type(layer))
    copied.__class__ = _with_groups(kind)
    assert isinstance(copied, FoldedLayer)
    count = len(next(iter(values.values())))
    first, second = (_get_factor(layer, values, name, count) for name in FACTORS)
    weight = values.get("weight")
    rows = None if weight is None else _find_changed_rows(layer._parameters["weight"], weight)
    if rows is not None and weight is not None:
        weight = weight[:, rows] if len(rows) else None
    copied.own = Own(weight, rows, first, second, values.get("bias"))
    copied.present = present
    return copied


def _get_factor(layer: nn.Module, values: Mapping[str, Tensor], name: str, count: int) -> Tensor | None:
    """Return a factor of all members: their own, or the layer's; None where it has none."""
    shared = layer._parameters.get(name)
    if name in values or shared is None:
        return values.get(name)
    return shared.expand(count, *shared.shape)


def _find_changed_rows(shared: Tensor | None, own: Tensor) -> Tensor | None:
    """Return the rows in which weights [M, D, ...] differ from the shared ones; None: in most, or they are trained."""
    if shared is None or own.requires_grad:
        return None
    changed = (own != shared).flatten(2).any(2).any(0)  # [D]
    rows = changed.nonzero()[:, 0]
    return rows if 2 * len(rows) <= len(changed) else None
