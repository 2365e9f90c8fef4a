"""Distortions of images by a strength in [0, 1]: what a metric of image quality should follow, step by step.

0 changes nothing. Draws depend on (seed, image) alone, so that image i is distorted alike in any batch, and more of the
same noise is added as the strength grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.util import generator

# At strength 1: the blur's standard deviation as a share of the side; the noise's in units of the range [-1, 1].
BLUR_SHARE, NOISE_STD = 0.1, 1.0
# Patches along a side.
GRID = 4


def blur(images: Tensor, strength: float, sources: Sequence[torch.Generator] = ()) -> Tensor:
    """Gaussian blur of [B, C, H, W], standard deviation strength / 10 of the shorter side; the border is repeated."""
    sigma = strength * BLUR_SHARE * min(images.shape[-2:])
    reach = max(1, round(4 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights.reshape(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.reshape(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def noise(images: Tensor, strength: float, sources: Sequence[torch.Generator]) -> Tensor:
    """[B, C, H, W] in [-1, 1] plus N(0, strength^2), cut to the range."""
    draws = torch.stack([torch.randn(images.shape[1:], generator=source) for source in sources])
    return (images + strength * NOISE_STD * draws).clamp(-1, 1)


def swaps(images: Tensor, strength: float, sources: Sequence[torch.Generator]) -> Tensor:
    """Patches of a 4 x 4 grid change places: a share `strength` of them moves in a cycle, the rest stays.

    Pixels and local statistics stay what they were; only the arrangement is lost. A border that the grid does not
    cover stays.
    """
    height, width = (side // GRID for side in images.shape[-2:])
    if min(height, width) < 1:
        raise ValueError(f"swaps need images of at least {GRID} x {GRID} pixels, got {tuple(images.shape[-2:])}")
    moving = round(strength * GRID**2)
    changed = images.clone()
    for image, result, source in zip(images, changed, sources, strict=True):
        chosen = torch.randperm(GRID**2, generator=source)[:moving].tolist()
        for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
            (y, x), (v, u) = ((place // GRID * height, place % GRID * width) for place in (here, there))
            result[:, v : v + height, u : u + width] = image[:, y : y + height, x : x + width]
    return changed


DISTORTIONS: dict[str, Callable[[Tensor, float, Sequence[torch.Generator]], Tensor]] = {
    "blur": blur,
    "noise": noise,
    "swaps": swaps,
}


def distort(images: Tensor, positions: Sequence[int], name: str, strength: float, seed: int = 0) -> Tensor:
    """Distort uint8 images [B, C, H, W] whose positions in their set are `positions` [B], and round to bytes again.

    Raises:
        ValueError: for an unknown distortion, or a strength outside [0, 1].
    """
    if name not in DISTORTIONS or not 0 <= strength <= 1:
        raise ValueError(f"expected one of {', '.join(DISTORTIONS)} and a strength in [0, 1], got {name} {strength}")
    if strength == 0:
        return images
    sources = [generator("distortion", name, seed, int(position)) for position in positions]
    floats = DISTORTIONS[name](images.float() / 127.5 - 1, strength, sources)
    return ((floats + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Distortion:
    """A distortion by name, and its strength in [0, 1]."""

    name: str
    strength: float


def read_distortion(words: str) -> Distortion:
    """Read the words "blur:0.5".

    Raises:
        ValueError: if the text has another form.
    """
    name, _, strength = words.partition(":")
    try:
        return Distortion(name, float(strength))
    except ValueError as error:
        raise ValueError(f"a distortion is NAME:STRENGTH, such as blur:0.5; got '{words}'") from error
