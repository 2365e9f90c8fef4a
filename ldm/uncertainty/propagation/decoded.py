"""From variances of latents to variances of pixels: members decoded, tangents pushed through the decoder, or draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.transition import Noise

Decode = Callable[[Tensor], Tensor]


@torch.no_grad()
def decoded_members(decode: Decode, members: Tensor, chunk: int = 64) -> Tensor:
    """Unbiased variance over members of the decoded images [B, C, H, W], from latents [K, B, c, h, w].

    Weights held for the whole trajectory (`sampled`) differ coherently, so their images show what differs in them.
    """
    flat = torch.cat([decode(part) for part in members.flatten(0, 1).split(chunk)])
    return flat.unflatten(0, members.shape[:2]).var(0)


@torch.no_grad()
def decoded_tangents(decode: Decode, z: Tensor, tangents: Tensor, chunk: int | None = None) -> Tensor:
    """First-order variance of the decoded image: mean over K of (d decode(z) . tangent_k)^2, [B, C, H, W].

    Args:
        decode: differentiable, so without quantisation (`force_not_quantize`), whose derivative is 0.
        z: latents of the plain sampler [B, c, h, w]; tangents: [K, B, c, h, w], of `tangents`.
        chunk: directions carried at once.
    """
    with sdpa_kernel(SDPBackend.MATH):
        pushed = vmap(lambda tangent: jvp(decode, (z,), (tangent,))[1], chunk_size=chunk)(tangents)
    return pushed.square().mean(0)


@torch.no_grad()
def decoded_draws(decode: Decode, z: Tensor, var: Tensor, noise: Noise, count: int = 10) -> Tensor:
    """Variance over decoded draws of N(z, var), for a recursion that knows no members (the authors of BayesDiff).

    Elements are drawn on their own, as the recursion has them; its negative variances count as 0. `noise(draw, shape)`
    is a stream an image (`ImageNoise`), so that an image's variance does not depend on its batch.
    """
    center = decode(z)
    total = torch.zeros_like(center)
    total_of_squares = torch.zeros_like(center)
    for draw in range(count):
        away = decode(z + var.clamp(min=0).sqrt() * noise(draw, z.shape).to(z)) - center
        total = total + away
        total_of_squares = total_of_squares + away.square()
    return (total_of_squares - total.square() / count) / (count - 1)
