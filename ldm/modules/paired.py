"""Half precision that keeps how far rows of one image are apart: each is rounded as a difference from the one before.

Members of an ensemble are compared by small differences of large numbers: rounding each to eight bits puts an error
into every difference that is a share of the numbers. Here a layer computes, of the rows of one image in their order,

    W x_1        W x_m = W x_{m-1} + W (x_m - x_{m-1})

with all products in half precision and their sums in float32, in which all else is computed, too. The error of the
first is the same in all rows, and those of the others are shares of the differences: members lie one after the other,
and what parts them from the null condition comes once, between two of the rows. There are as many products as rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.copies import exchange_modules
from ldm.modules.parts import LAYERS

_N = TypeVar("_N", bound=nn.Module)
CONVOLUTIONS_1D = (nn.Conv1d,)


@dataclass
class ImageRows:
    """How the rows of the present pass belong together.

    Attributes:
        total: number of rows.
        ways: rows of one image; row j is of image j mod (total / ways).
    """

    total: int = 0
    ways: int = 1


class PairedLayer(nn.Module):
    """What a linear layer or convolution has before its own class: a forward that rounds differences of rows."""

    rows: ImageRows

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output of rows [ways B, ...] in float32; of other numbers of rows as its class does."""
        ways = self.rows.ways
        if ways == 1 or len(x) != self.rows.total:
            return super().forward(x)
        weight = self._parameters["weight"]
        assert weight is not None
        wide = x.float().unflatten(0, (ways, -1))  # [ways, B, ...]
        parts = torch.cat([wide[:1], wide.diff(dim=0)]).flatten(0, 1)  # [ways B, ...]
        products = self._multiply(parts, weight).float().unflatten(0, (ways, -1))  # [ways, B, ...]
        outputs = products.cumsum(0).flatten(0, 1)  # [ways B, ...]
        bias = self._parameters["bias"]
        if bias is None:
            return outputs
        return outputs + bias.reshape(-1, *[1] * (0 if isinstance(self, nn.Linear) else x.ndim - 2))

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x, without a bias."""
        if isinstance(self, nn.Linear):
            return F.linear(x, weight)
        return cast(Any, self)._conv_forward(x, weight, None)


@cache
def _paired_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that rounds differences of rows."""
    return type(f"Paired{kind.__name__}", (PairedLayer, kind), {})


def pair_layers(network: _N) -> tuple[_N, ImageRows]:
    """Return a copy of a network around the same weights with paired layers, and what tells them whose rows come."""
    rows = ImageRows()
    paired: dict[str, nn.Module] = {}
    for name, layer in network.named_modules():
        if type(layer) in (*LAYERS, *CONVOLUTIONS_1D):
            made = copy.copy(layer)
            made.__class__ = _paired_class(cast(Any, type(layer)))
            assert isinstance(made, PairedLayer)
            made.rows = rows
            paired[name] = made
    return exchange_modules(network, paired), rows
