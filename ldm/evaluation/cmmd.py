"""Maximum mean discrepancy of features: CMMD with a Gaussian kernel, KID with a cubic one.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)        (Gretton et al. 2012, JMLR 13, Equation 3)

Sums over all pairs are gathered tile by tile: memory does not grow with N^2, and shares of the tiles add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ldm.evaluation.resampling import LEAST_SAMPLES, HalfSampling, draw_halves
from ldm.evaluation.statistics import FeatureArray, blocks, check_features
from ldm.stats import Interval
from ldm.util import generator

Kernel = Callable[[Tensor, Tensor], Tensor]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
# Rows of a tile: large enough that the kernel's matrix product outweighs reading the rows.
TILE = 2048


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of float64 rows a [N, D] and b [M, D], as [N, M], not below 0."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_min_(0)


def gaussian_kernel(a: Tensor, b: Tensor, sigma: float = CMMD_SIGMA) -> Tensor:
    """exp(-|a_i - b_j|^2 / (2 sigma^2)), [N, M]."""
    return squared_distances(a, b).mul_(-1 / (2 * sigma**2)).exp_()


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a_i . b_j / D + 1)^3, [N, M]: KID's kernel (Binkowski et al. 2018, arXiv 1801.01401)."""
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


@dataclass(frozen=True)
class GramSums:
    """Sums of a kernel over weighted pairs, one for each of R weightings: all pairs [R], and equal indices [R]."""

    pairs: Tensor
    diagonal: Tensor

    def __add__(self, other: GramSums) -> GramSums:
        return GramSums(self.pairs + other.pairs, self.diagonal + other.diagonal)


def _tiles(rows: FeatureArray, columns: FeatureArray, upper: bool, shard: tuple[int, int], device) -> Iterator:
    """Yield (first row, rows, first column, columns) of this share's tiles; `upper` leaves out those below."""
    rank, world = shard
    number = 0
    for i, a in blocks(rows, TILE, device):
        for j in range(i if upper else 0, len(columns), TILE):
            if number % world == rank:
                ((_, b),) = blocks(columns[j : j + TILE], TILE, device)
                yield i, a, j, b
            number += 1


def gram_within(
    kernel: Kernel, x: FeatureArray, weights: Tensor | None = None, shard: tuple[int, int] = (0, 1), device="cpu"
) -> GramSums:
    """sum_ij w_i k(x_i, x_j) w_j and its terms i = j, for x [N, D] and weights [R, N] (ones).

    `shard` = (rank, world) takes every world-th tile: the sums of all shares add up to the whole.
    """
    weights = torch.ones(1, len(x), dtype=torch.float64) if weights is None else weights
    weights = weights.to(device, torch.float64)
    pairs, diagonal = torch.zeros_like(weights[:, 0]), torch.zeros_like(weights[:, 0])
    for i, a, j, b in _tiles(x, x, True, shard, device):
        gram = kernel(a, b)
        left, right = weights[:, i : i + len(a)], weights[:, j : j + len(b)]
        pairs += (1 if i == j else 2) * ((left @ gram) * right).sum(1)
        if i == j:
            diagonal += left.square() @ gram.diagonal()
    return GramSums(pairs, diagonal)


def gram_between(
    kernel: Kernel,
    x: FeatureArray,
    y: FeatureArray,
    weights: Tensor | None = None,
    shard: tuple[int, int] = (0, 1),
    device="cpu",
) -> Tensor:
    """sum_ij w_i k(x_i, y_j) for x [N, D], y [M, D] and weights [R, N] (ones), as [R]."""
    weights = torch.ones(1, len(x), dtype=torch.float64) if weights is None else weights
    weights = weights.to(device, torch.float64)
    total = torch.zeros_like(weights[:, 0])
    for i, a, _, b in _tiles(x, y, False, shard, device):
        total += weights[:, i : i + len(a)] @ kernel(a, b).sum(1)
    return total


def combine_sums(within_x: GramSums, within_y: GramSums, between: Tensor, weights: Tensor, m: int, biased: bool):
    """MMD^2 [R] from kernel sums of x with weights [R, N] and of y with m rows.

    Unbiased: pairs of equal indices are left out (a U-statistic). Biased: they are kept (a V-statistic), which adds
    about (1/n + 1/m)(k(x, x) - mean k).
    """
    total = weights.sum(1)
    if biased:
        mean_x, mean_y = within_x.pairs / total**2, within_y.pairs / m**2
    else:
        mean_x = (within_x.pairs - within_x.diagonal) / (total**2 - weights.square().sum(1))
        mean_y = (within_y.pairs - within_y.diagonal) / (m * (m - 1))
    return mean_x + mean_y - 2 * between / (total * m)


def mmd2(
    kernel: Kernel,
    reference: FeatureArray,
    samples: FeatureArray,
    biased: bool = False,
    resamples: int = 0,
    seed: int = 0,
    device="cpu",
    reference_sums: GramSums | None = None,
) -> Interval:
    """MMD^2 over all pairs, with an interval for the draw of the samples, the reference held fixed.

    The interval covers what repeated draws of N samples give on average, see `ldm.evaluation.resampling`.

    Args:
        kernel: (a [N, D], b [M, D]) -> [N, M].
        reference, samples: [M, D] and [N, D], any numbers of rows from 2 on.
        biased: the V-statistic instead of the unbiased estimator, which may be negative.
        resamples: halves of the samples that are measured; 0: no interval.
        reference_sums: `gram_within` of the reference, where it is known already.

    Raises:
        ValueError: for fewer than 2 rows, or if the dimensions differ.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        check_features(name, features, least=2)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features of {reference.shape[1]} and {samples.shape[1]} dimensions cannot be compared")
    ones = torch.ones(1, len(samples), dtype=torch.float64)
    halves = (
        draw_halves(len(samples), resamples, "mmd", seed) if resamples and len(samples) >= LEAST_SAMPLES else ones[:0]
    )
    weights = torch.cat((ones, halves)).to(device)
    own = gram_within(kernel, samples, weights, device=device)
    theirs = gram_within(kernel, reference, device=device) if reference_sums is None else reference_sums
    between = gram_between(kernel, samples, reference, weights, device=device)
    values = combine_sums(own, theirs, between, weights, len(reference), biased).cpu()
    value = float(values[0])
    return HalfSampling.from_halves(value, values[1:]).interval(value) if len(halves) else Interval(value)


def cmmd(
    reference: FeatureArray,
    samples: FeatureArray,
    sigma: float = CMMD_SIGMA,
    scale: float = CMMD_SCALE,
    biased: bool = False,
    **options,
) -> Interval:
    """CMMD: `scale` times the Gaussian-kernel MMD^2 (Jayasumana et al. 2024, arXiv 2401.09603).

    The published choices are sigma 10, scale 1000 and unit-length CLIP ViT-L/14-336 embeddings. `options` are those of
    `mmd2`.
    """
    found = mmd2(partial(gaussian_kernel, sigma=sigma), reference, samples, biased, **options)
    return replace(found, estimate=scale * found.estimate, low=scale * found.low, high=scale * found.high)


def kid_subsets(
    reference: FeatureArray, samples: FeatureArray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """KID as published: the unbiased cubic-kernel MMD^2 of `subsets` random draws without replacement, [subsets].

    Their mean is the published value and their standard deviation the published spread, which belongs to a set of
    `subset_size` images; `mmd2(cubic_kernel, ...)` uses every pair once.

    Raises:
        ValueError: if a set has fewer than `subset_size` rows, or that is below 2.
    """
    least = min(len(reference), len(samples))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subset_size must lie in 2..{least}, the smaller set; got {subset_size}")
    source = generator("kid subsets", seed)
    values = []
    for _ in range(subsets):
        drawn = []
        for features in (reference, samples):
            chosen = torch.randperm(len(features), generator=source)[:subset_size].sort().values
            drawn.append(torch.as_tensor(features[chosen.numpy()]).double())
        values.append(mmd2(cubic_kernel, *drawn).estimate)
    return torch.tensor(values, dtype=torch.float64)
