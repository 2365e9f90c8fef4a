"""Precision, recall, density and coverage: sets of features compared by balls around each point.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991 (k = 3). Density and coverage: Naeem et al. 2020,
arXiv 2002.09797 (k = 5). A ball B(x_i) reaches from x_i to its k-th nearest neighbour in its own set, x_i left out;
its border belongs to it. Distances are gathered tile by tile, in memory of order N.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.evaluation.cmmd import TILE, squared_distances
from ldm.evaluation.resampling import (
    JACKKNIFE_GROUPS,
    HalfSampling,
    draw_halves,
    draw_without_groups,
    jackknife_interval,
    share_interval,
)
from ldm.evaluation.statistics import FeatureArray, blocks, check_features
from ldm.stats import Interval, mean_interval

PRECISION_K, DENSITY_K = 3, 5
# Neighbours that are kept beyond the k-th, where some of them are left out.
SPARE = 32


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


def ball_counts(
    points: FeatureArray, centres: FeatureArray, radii: Tensor, device="cpu", masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many balls each point lies in [P], and how many points of each subset each ball holds [R, C]; float64.

    Args:
        points: [P, D]; centres: [C, D]; radii: [C], squared.
        masks: subsets of the points, rows of 0 and 1 [R, P]; all points as one where None.
    """
    masks = torch.ones(1, len(points), dtype=torch.float64) if masks is None else masks
    masks = masks.to(device)
    balls, held = [], torch.zeros(len(masks), len(centres), dtype=torch.float64, device=device)
    for i, a in blocks(points, TILE, device):
        count = torch.zeros(len(a), dtype=torch.float64, device=device)
        for j, b in blocks(centres, TILE, device):
            inside = (squared_distances(a, b) <= radii[j : j + len(b)].to(device)).double()
            count += inside.sum(1)
            held[:, j : j + len(b)] += masks[:, i : i + len(a)] @ inside
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

    Intervals are for the draw of the samples, the reference held fixed: Wilson's of the precision, whose samples are
    independent; of the recall, whose balls hang on one another, that of random halves of the samples.

    Args:
        resamples: halves of the samples that are measured; 0: no intervals.
        radii: `squared_radii(reference, k)`, where they are known already.
    """
    radii = squared_radii(reference, k, device) if radii is None else radii
    inside = ball_counts(samples, reference, radii, device)[0] > 0
    masks = draw_subsets(len(samples), resamples, k, "recall", seed)
    recalls = recall_of_subsets(reference, samples, k, masks, device)
    if len(recalls) == 1:
        return PrecisionRecall(Interval(float(inside.double().mean())), Interval(float(recalls[0])))
    return PrecisionRecall(share_interval(inside), _interval_of_share(recalls))


def draw_subsets(count: int, resamples: int, k: int, *keys: int | str) -> Tensor:
    """Return which samples are in all of them, and in each of `resamples` halves, [1 + resamples, N], booleans.

    There are no halves of sets too small to have k neighbours in each.
    """
    every = torch.ones(1, count, dtype=torch.float64)
    if resamples and count >= 4 * (k + 1):
        every = torch.cat((every, draw_halves(count, resamples, *keys)))
    return every.bool()


def _interval_of_share(values: Tensor) -> Interval:
    """Interval of the first of [1 + resamples] shares by the halves that follow it, inside [0, 1]."""
    value = float(values[0])
    found = HalfSampling.from_halves(value, values[1:], smooth=False).interval(value)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def recall_of_subsets(reference: FeatureArray, samples: FeatureArray, k: int, masks: Tensor, device="cpu") -> Tensor:
    """Recall [R] of subsets of the samples, whose balls reach to the k-th neighbour in the subset.

    Args:
        masks: [R, N] booleans, the samples of each subset.
    """
    radii = _subset_radii(samples, k, masks.to(device), device)
    reached = torch.zeros(len(radii), len(reference), dtype=torch.bool, device=device)
    for i, a in blocks(reference, TILE, device):
        for j, b in blocks(samples, TILE, device):
            distances = squared_distances(a, b)
            for subset, own in enumerate(radii[:, j : j + len(b)]):
                reached[subset, i : i + len(a)] |= (distances <= own).any(1)
    return reached.double().mean(1).cpu()


def _subset_radii(samples: FeatureArray, k: int, masks: Tensor, device) -> Tensor:
    """Squared radii [R, N] of the balls around the samples of each subset, -1 for all other samples.

    Of each sample the k + SPARE nearest neighbours are kept: a random half holds k of them but for one case in 10^8.
    """
    kept = min(k + SPARE, len(samples) - 1)
    radii = torch.empty(masks.shape, dtype=torch.float64, device=device)
    for i, a in blocks(samples, TILE, device):
        nearest = a.new_full((len(a), kept), torch.inf)
        owners = torch.zeros(len(a), kept, dtype=torch.int64, device=device)
        for j, b in blocks(samples, TILE, device):
            distances = squared_distances(a, b)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            numbers = torch.arange(j, j + len(b), device=device).expand(len(a), -1)
            nearest, places = torch.cat((nearest, distances), dim=1).topk(kept, dim=1, largest=False)
            owners = torch.cat((owners, numbers), dim=1).gather(1, places)
        for subset, mask in enumerate(masks):
            left = nearest.masked_fill(~mask[owners], torch.inf)
            own = left.topk(k, dim=1, largest=False).values.amax(1)
            radii[subset, i : i + len(a)] = own.masked_fill(~mask[i : i + len(a)], -1)
    return radii


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

    Intervals and arguments as in `precision_recall`: Student's of the density, whose samples are independent, and the
    jackknife over groups of samples of the coverage.
    """
    radii = squared_radii(reference, k, device) if radii is None else radii
    masks = torch.ones(1, len(samples), dtype=torch.float64)
    if resamples and len(samples) >= 2 * JACKKNIFE_GROUPS:
        masks = torch.cat((masks, draw_without_groups(len(samples), "coverage", seed)))
    balls, held = ball_counts(samples, reference, radii, device, masks)
    density = balls / k
    coverages = (held > 0).double().mean(1)
    if len(coverages) == 1:
        return DensityCoverage(Interval(float(density.mean())), Interval(float(coverages[0])))
    covered = jackknife_interval(float(coverages[0]), coverages[1:])
    return DensityCoverage(mean_interval(density.numpy()), covered)
