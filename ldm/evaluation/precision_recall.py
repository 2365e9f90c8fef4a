"""Precision, recall, density and coverage: sets of features compared by balls around each point.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991 (k = 3). Density and coverage: Naeem et al. 2020,
arXiv 2002.09797 (k = 5). A ball B(x_i) reaches from x_i to its k-th nearest neighbour in its own set, x_i left out;
its border belongs to it. Distances are gathered tile by tile, in memory of order N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.evaluation.cmmd import TILE, squared_distances
from ldm.evaluation.statistics import FeatureArray, blocks, check_features, percentile_interval, resample_weights
from ldm.stats import Interval

PRECISION_K, DENSITY_K = 3, 5


def squared_radii(features: FeatureArray, k: int, device="cpu") -> Tensor:
    """Squared distance [N] of each row of [N, D] to its k-th nearest neighbour among the others.

    Raises:
        ValueError: if there are not more than k rows.
    """
    check_features("features", features)
    if not 1 <= k < len(features):
        raise ValueError(f"k = {k} nearest neighbours need at least {k + 1} images, got {len(features)}")
    radii = []
    for i, a in blocks(features, TILE, device):
        nearest = a.new_full((len(a), k), torch.inf)
        for j, b in blocks(features, TILE, device):
            distances = squared_distances(a, b)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            nearer = distances.topk(min(k, len(b)), dim=1, largest=False).values
            nearest = torch.cat((nearest, nearer), dim=1).topk(k, dim=1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def ball_counts(points: FeatureArray, centres: FeatureArray, radii: Tensor, device="cpu") -> tuple[Tensor, Tensor]:
    """How many balls each point lies in [P], and how many points each ball holds [C].

    Args:
        points: [P, D]; centres: [C, D]; radii: [C], squared.
    """
    balls, held = [], torch.zeros(len(centres), dtype=torch.int64, device=device)
    for _, a in blocks(points, TILE, device):
        count = torch.zeros(len(a), dtype=torch.int64, device=device)
        for j, b in blocks(centres, TILE, device):
            inside = squared_distances(a, b) <= radii[j : j + len(b)].to(device)
            count += inside.sum(1)
            held[j : j + len(b)] += inside.sum(0)
        balls.append(count)
    return torch.cat(balls).cpu(), held.cpu()


class PrecisionRecall(NamedTuple):
    """Share of samples that look real, and share of the reference that the samples reach; both in [0, 1]."""

    precision: Interval
    recall: Interval


class DensityCoverage(NamedTuple):
    """Mean number of reference balls around a sample over k (1 for equal laws), and share of balls with a sample."""

    density: Interval
    coverage: Interval


def precision_recall(
    reference: FeatureArray,
    samples: FeatureArray,
    k: int = PRECISION_K,
    resamples: int = 0,
    seed: int = 0,
    device="cpu",
    radii: Tensor | None = None,
) -> PrecisionRecall:
    """Improved precision and recall of samples [N, D] against a reference [M, D].

        precision = mean_j 1[ y_j in any B(x_i) ],    recall = mean_i 1[ x_i in any B(y_j) ]

    Intervals: percentile bootstrap of these means, over the samples and over the reference, with the balls held fixed.
    `radii` are `squared_radii(reference, k)`, where they are known already.
    """
    radii = squared_radii(reference, k, device) if radii is None else radii
    inside = ball_counts(samples, reference, radii, device)[0] > 0
    reached = ball_counts(reference, samples, squared_radii(samples, k, device), device)[0] > 0
    return PrecisionRecall(
        bootstrap_mean(inside, resamples, "precision", seed), bootstrap_mean(reached, resamples, "recall", seed)
    )


def density_coverage(
    reference: FeatureArray,
    samples: FeatureArray,
    k: int = DENSITY_K,
    resamples: int = 0,
    seed: int = 0,
    device="cpu",
    radii: Tensor | None = None,
) -> DensityCoverage:
    """Density and coverage of samples [N, D] against a reference [M, D].

        density = mean_j (1/k) sum_i 1[ y_j in B(x_i) ],    coverage = mean_i 1[ some y_j in B(x_i) ]

    Intervals and `radii` as in `precision_recall`.
    """
    radii = squared_radii(reference, k, device) if radii is None else radii
    balls, held = ball_counts(samples, reference, radii, device)
    return DensityCoverage(
        bootstrap_mean(balls.double() / k, resamples, "density", seed),
        bootstrap_mean(held > 0, resamples, "coverage", seed),
    )


def bootstrap_mean(values: Tensor, resamples: int, *keys: int | str) -> Interval:
    """Mean of values [N] with its percentile bootstrap interval."""
    values = values.double()
    mean = float(values.mean())
    if not resamples:
        return Interval(mean)
    return percentile_interval(mean, resample_weights(len(values), resamples, *keys) @ values / len(values))
