"""Derivatives of a function of images in many directions: products with its Jacobian, and the Jacobian's diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[[Tensor], Tensor]


def along(function: Function, x: Tensor, directions: Tensor, chunk: int | None = None) -> Tensor:
    """J d for directions [K, B, C, H, W] of a function of x [B, C, H, W]: [K, ...], the function itself computed once.

    Args:
        chunk: directions carried at once; all where None.
    """
    # Attention has forward derivatives in its plain form only; group norms want the usual strides, which `contiguous`
    # does not restore where there is one channel.
    x = x.clone(memory_format=torch.contiguous_format)
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(lambda direction: jvp(function, (x,), (direction,))[1], chunk_size=chunk)(directions)


def rademacher(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Probes of random signs [count, *like.shape], for `diagonal`."""
    signs = torch.randint(0, 2, (count, *like.shape), generator=generator, device=generator.device)
    return (2 * signs - 1).to(like)


def largest_power(count: int) -> int:
    """The largest power of two that is at most `count`."""
    return 1 << (count.bit_length() - 1)


def balanced_signs(drawn: Tensor, count: int) -> Tensor:
    """Probes of signs [count, B, C, H, W] that are orthogonal, as far as their number allows, between near elements.

    Within a block of n = `largest_power(count)` probes, the signs of an element are one row of a Hadamard matrix, the
    same row for elements that agree in the low bits of column, row and channel, times a random sign of its own. So
    mean_k (sum_j M_ij z_kj)^2 is sum_j M_ij^2 but for pairs of equal rows, whose products have mean 0: an unbiased
    estimate of squared slopes, without error where M reaches no further than sqrt(n) pixels (probing).

    Args:
        drawn: values of a symmetric law for the random signs, one block each [ceil(count / n), B, C, H, W].

    Source: Bekas et al. 2007 (Hadamard vectors); Tang and Saad 2012 (probing).
    """
    size = largest_power(count)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    places = torch.meshgrid(*(torch.arange(extent) for extent in drawn.shape[-3:]), indexing="ij")
    row, taken = torch.zeros(drawn.shape[-3:], dtype=torch.long), 0
    for bit in range(size.bit_length()):
        for place in (places[2], places[1], places[0]):
            if bool((place >> bit).any()):
                row += ((place >> bit) & 1) << taken
                taken += 1
    codes = matrix[:, row % size].to(drawn).unsqueeze(1)  # [n, 1, C, H, W]
    signs = torch.where(drawn < 0, -1.0, 1.0).to(drawn)
    return torch.cat([codes * block for block in signs])[:count]


def units(like: Tensor) -> Tensor:
    """The unit directions [C H W, B, C, H, W] of every image of a batch."""
    count = like[0].numel()
    each = torch.eye(count, dtype=like.dtype, device=like.device).reshape(count, 1, *like.shape[1:])
    return each.expand(count, *like.shape)


def diagonal(function: Function, x: Tensor, probes: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Diagonal of the Jacobian of each image's part [B, C, H, W]; no image may act on another.

    Exact by C H W directional derivatives, or by Hutchinson's estimate from `probes` [K, B, C, H, W] of random signs:
    mean_k z (J z), unbiased, with variance sum_{j != i} J_ij^2 / K at element i. Its sum is the divergence.

    Source: Hutchinson 1990; Bekas et al. 2007 (the diagonal).
    """
    if probes is None:
        return torch.einsum("kb...,kb...->b...", units(x), along(function, x, units(x), chunk))
    return (probes * along(function, x, probes, chunk)).mean(0)
