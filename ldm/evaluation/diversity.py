"""How different the pictures of an ensemble's members are: structural similarity and LPIPS between pairs of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.checkpoint import load_into, load_state_dict
from ldm.modules.losses import LPIPS

# Window of Wang et al. 2004: 11 pixels, a Gaussian of 1.5.
WINDOW, SIGMA_PER_RADIUS = 11, 0.3


def ssim_window(height: int, width: int) -> int:
    """Side of the window: 11 (Wang et al. 2004), or for small images the largest odd number up to half their side.

    So at least half of the positions along each side hold a whole window: 3 for digits of 8 x 8, 7 for 16 x 16.

    Raises:
        ValueError: for images with fewer than 6 pixels a side.
    """
    half = min(height, width) // 2
    window = min(WINDOW, half - (half % 2 == 0))
    if window < 3:
        raise ValueError(f"structural similarity needs images of 6 x 6 pixels or more, got {height} x {width}")
    return window


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images a, b [B, C, H, W] in [-1, 1]: [B], 1 where they are equal.

    Gaussian window of `ssim_window` pixels, sigma 0.3 of its radius (1.5 for 11); mean over positions that hold a
    whole window and over channels. `data_range` is the width of the values' range, 2 for [-1, 1].

    Raises:
        ValueError: if the shapes differ, or the images are too small.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"expected two batches [B, C, H, W] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    radius = ssim_window(*a.shape[-2:]) // 2
    _, everywhere = structural_similarity_index_measure(
        a, b, sigma=SIGMA_PER_RADIUS * radius, data_range=data_range, reduction="none", return_full_image=True
    )
    return everywhere[..., radius:-radius, radius:-radius].mean((1, 2, 3))  # without the padded border


def pairwise(
    images: Tensor,
    compare: Callable[[Tensor, Tensor], Tensor],
    members: Sequence[int] | None = None,
    pairs_at_once: int = 64,
) -> Tensor:
    """Mean of `compare` over the M (M - 1) / 2 pairs of members.

    Args:
        images: [M, B, C, H, W]; compare: of two batches [K, C, H, W], symmetric, to [K].
        members: use this group only.
        pairs_at_once: pictures compared in one batch, which bounds the memory.

    Returns:
        [B], float64.

    Raises:
        ValueError: for fewer than two members, or images that `compare` refuses.
    """
    if images.ndim != 5:
        raise ValueError(f"images must be [M, B, C, H, W], got {tuple(images.shape)}")
    group = range(len(images)) if members is None else members
    pairs = torch.tensor(list(combinations(group, 2)), device=images.device)
    if not len(pairs):
        raise ValueError(f"pairs need at least two members, got {list(group)}")
    values = []
    # Pair p of picture b is number p B + b.
    for part in torch.arange(len(pairs) * images.shape[1], device=images.device).split(pairs_at_once):
        (i, j), picture = pairs[part // images.shape[1]].unbind(1), part % images.shape[1]
        values.append(compare(images[i, picture], images[j, picture]).double())
    return torch.cat(values).reshape(len(pairs), -1).mean(0)


def pairwise_ssim(
    images: Tensor, data_range: float = 2.0, members: Sequence[int] | None = None, pairs_at_once: int = 64
) -> Tensor:
    """Mean structural similarity over pairs of members, in [-1, 1]; lower is more diverse.

    `images` lie in [-1, 1], or another range of width `data_range`; the rest is that of `pairwise`.
    """
    return pairwise(images.double(), lambda a, b: ssim(a, b, data_range), members, pairs_at_once)


def load_lpips(path: str | os.PathLike) -> LPIPS:
    """The learned perceptual distance with the weights of a file (all of VGG's and the linear layers').

    Raises:
        ValueError: listing the keys, if the file is not a complete set of them.
    """
    network = LPIPS().eval()
    load_into(network, load_state_dict(path), file=path)
    return network


def pairwise_lpips(images: Tensor, network: LPIPS, members: Sequence[int] | None = None, at_once: int = 16) -> Tensor:
    """Mean learned perceptual distance over pairs of members, 0 where they are equal; higher is more diverse.

    Args:
        images: [M, B, C, H, W] in [-1, 1], C of 1 (repeated) or 3, of 16 pixels a side or more.
        network: see `load_lpips`; the rest is that of `pairwise`.

    Raises:
        ValueError: for other channels or smaller images, which VGG cannot take.
    """
    if images.shape[-3] not in (1, 3) or min(images.shape[-2:]) < 16:
        raise ValueError(f"LPIPS needs images of 1 or 3 channels and 16 x 16 pixels or more, got {tuple(images.shape)}")
    colour = images.float().expand(*images.shape[:-3], 3, *images.shape[-2:])
    return pairwise(colour, lambda a, b: network(a, b)[:, 0, 0, 0], members, at_once)
