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
