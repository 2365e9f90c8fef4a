"""A text's tokens and its pooled vector, or a mask of them, in one tensor, as one context of a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Return a context [B, L + R, D]: tokens [B, L, D], then the pooled vector [B, E] in R = ceil(E / D) rows.

    Raises:
        ValueError: if the shapes are others, or the numbers of texts differ.
    """
    if tokens.ndim != 3 or pooled.ndim != 2 or len(tokens) != len(pooled):
        raise ValueError(
            f"expected tokens [B, L, D] and pooled vectors [B, E], got {list(tokens.shape)} and {list(pooled.shape)}"
        )
    width = tokens.shape[2]
    rows = math.ceil(pooled.shape[1] / width)
    padded = F.pad(pooled, (0, rows * width - pooled.shape[1]))
    return torch.cat([tokens, padded.unflatten(1, (rows, width)).to(tokens)], dim=1)


def unpack_pooled(context: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, L, D] and the pooled vector [B, width] of a context that `pack_pooled` made.

    Raises:
        ValueError: if no token is left.
    """
    rows = math.ceil(width / context.shape[2])
    if context.shape[1] <= rows:
        raise ValueError(
            f"a context [B, L, D] ends with {rows} rows that hold a pooled vector of {width} numbers (see "
            f"ldm.interop.pooled.pack_pooled); got {list(context.shape)}"
        )
    return context[:, :-rows], context[:, -rows:].flatten(1)[:, :width]


def pack_masked(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a context [B, L + R, D]: tokens [B, L, D], then in R = ceil(L / D) rows their mask [B, L], 1 where a token
    counts and 0 where it only fills.

    Raises:
        ValueError: if the shapes are others.
    """
    if tokens.ndim != 3 or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"expected tokens [B, L, D] and a mask [B, L], got {list(tokens.shape)} and {list(mask.shape)}"
        )
    return pack_pooled(tokens, mask)


def unpack_masked(context: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, L, D] and the mask [B, L] of a context that `pack_masked` made."""
    rows, width = context.shape[1:]
    return unpack_pooled(context, rows - math.ceil(rows / (width + 1)))
