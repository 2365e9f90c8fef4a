"""Alignment and uniformity of features on the unit sphere (Wang & Isola 2020, arXiv 2005.10242), of whole data sets.

    alignment  = E ||x - y||^2                over positive pairs: two noises of one image, two images of one class, ..
    uniformity = ln E exp(-t ||x - x'||^2)    over all pairs of different images

Expectations go over all images before the logarithm, so that neither depends on how images were batched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Side of the squares in which pairs are compared.
_TILE = 2048


def normalised(features: Tensor) -> Tensor:
    """Features [N, D] at unit length.

    Raises:
        ValueError: for another shape, or features of zero length.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected features [N, D], got {tuple(features.shape)}")
    if not bool((features.norm(dim=1) > 0).all()):
        raise ValueError("features of zero length have no direction")
    return F.normalize(features, dim=1)


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of positive pairs [N, D] and [N, D] at unit length: 0 (equal) .. 4 (opposite)."""
    if first.shape != second.shape:
        raise ValueError(f"pairs need features of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return float((normalised(first) - normalised(second)).double().square().sum(1).mean())


def uniformity(features: Tensor, temperature: float = 2.0, tile: int = _TILE) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of features [N, D], float64 sums.

    It lies between 0, where all images are one direction, and -2 t N / (N - 1), which N directions reach that are as
    far apart as can be, a simplex: -8 for two opposite ones, -6 for three, -4 in the limit of many (t = 2). For the
    mean of the squared distances is at most 2 N / (N - 1), and the exponential is convex. Random directions in many
    dimensions approach -2 t as well.

    Raises:
        ValueError: if there are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"uniformity compares pairs; got {len(features)} images")
    features, total, count = normalised(features), 0.0, len(features)
    for start in range(0, count, tile):
        rows = features[start : start + tile]
        for other in range(start, count, tile):
            squares = (2 - 2 * rows @ features[other : other + tile].T).clamp(min=0).double()
            potential = (-temperature * squares).exp()
            total += float(potential.triu(1).sum() if other == start else potential.sum())
    return math.log(total / (count * (count - 1) / 2))


def class_pairs(labels: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of pairs of different images of one class [P]: each image with the next of a random order of its class.

    Classes of one image give no pair.

    Raises:
        ValueError: if no class has two images.
    """
    first, second = [], []
    for label in labels.unique():
        own = torch.nonzero(labels == label).flatten()
        if len(own) > 1:
            order = own[torch.randperm(len(own), generator=source)]
            first.append(order)
            second.append(order.roll(-1))
    if not first:
        raise ValueError("no class has two images to pair")
    return torch.cat(first), torch.cat(second)
