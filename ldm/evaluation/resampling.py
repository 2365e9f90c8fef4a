"""Intervals of metrics of sets of images, for the draw of the samples; the reference is held fixed.

Random halves without replacement tell the two parts of a smooth metric T of n samples apart. With the halves A and A^c,

    L = (T(A) - T(A^c)) / 2,    Q = (T(A) + T(A^c)) / 2 - T,
    var T = var L - var Q,    bias of T = mean Q    (to the first order in 1 / n)

L is the linear part. Near equal laws the quadratic part is as large, L holds it twice more than T does, and Q once: a
bootstrap's spread would be up to sqrt(3) times too wide there (Hoeffding's decomposition of a V-statistic; Arcones &
Gine 1992, Ann. Statist. 20, 655-674). Recall hangs on neighbours and has no such expansion: of it the
halves say only var T = var L, since its variance falls as 1 / n. Coverage depends on n in its own way: groups of its
samples are left out in turn (the delete-a-group jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binomtest, norm, t
from torch import Tensor

from ldm.stats import Interval
from ldm.util import generator

JACKKNIFE_GROUPS = 20
# A half of fewer has no covariance, and no pair.
LEAST_SAMPLES = 4


def draw_halves(count: int, resamples: int, *keys: int | str) -> Tensor:
    """Draw random halves of `count` samples and their complements in turn: rows of 0 and 1 [2 splits, count], float64.

    There are half as many splits as `resamples`, and 2 at least.
    """
    source = generator("halves", *keys)
    splits = max(2, resamples // 2)
    rows = torch.zeros(2 * splits, count, dtype=torch.float64)
    for split in range(splits):
        chosen = torch.randperm(count, generator=source)[: count // 2]
        rows[2 * split, chosen] = 1
        rows[2 * split + 1] = 1 - rows[2 * split]
    return rows


@dataclass(frozen=True)
class HalfSampling:
    """What random halves say of a metric: its standard deviation over draws of the samples, and its bias.

    Args:
        deviation: in the units of the metric.
        bias: of the metric of n samples, to the first order in 1 / n.
        splits: number of random splits, the degrees of freedom of `deviation`.
        quadratic: standard deviation of Q alone.
    """

    deviation: float
    bias: float
    splits: int
    quadratic: float

    @classmethod
    def from_halves(cls, value: float, halves: Tensor, smooth: bool = True) -> HalfSampling:
        """Compare the metric of all samples with those of halves and complements in turn, [2 splits].

        Args:
            smooth: whether the metric is a smooth function of the samples' law, and not of nearest neighbours.

        Raises:
            ValueError: if there are fewer than two splits.
        """
        if len(halves) < 4:
            raise ValueError(f"an interval by halves needs at least 2 splits, got {len(halves) // 2}")
        first, second = halves.double().unflatten(0, (-1, 2)).unbind(1)
        linear = ((first - second) / 2).square().mean()
        bend = (first + second) / 2 - value
        quadratic = bend.var()
        variance = torch.maximum(linear - quadratic, quadratic) if smooth else linear
        return cls(float(variance.sqrt()), float(bend.mean()), len(first), float(quadratic.sqrt()))

    def interval(self, value: float, level: float = 0.95) -> Interval:
        """Return Student's interval around a value: of what repeated draws of n samples give on average."""
        reach = float(t.ppf((1 + level) / 2, self.splits)) * self.deviation
        return Interval(value, value - reach, value + reach, resamples=2 * self.splits)


def share_interval(inside: Tensor, level: float = 0.95) -> Interval:
    """Share of independent booleans [N], with Wilson's interval, which keeps a width where all are alike (1927)."""
    count = int(inside.sum())
    ends = binomtest(count, len(inside)).proportion_ci(level, method="wilson")
    return Interval(count / len(inside), float(ends.low), float(ends.high), len(inside))


def clustered_share_interval(inside: Tensor, level: float = 0.95) -> Interval:
    """Share of booleans [M, n] of M members at n noises, with an interval for the draw of the noises.

    Samples of one noise resemble each other, so that M n of them are worth fewer independent ones,

        n p (1 - p) / var of a noise's mean,    between n and M n, times (z / t_{n-1})^2 since that is estimated

    and Wilson's interval is that of so many (Korn & Graubard 1998, Survey Methodology 24, 193-201, with Wilson's in
    place of Clopper and Pearson's). Where all samples are alike their number is n. One noise has no interval.
    """
    members, noises = inside.shape
    share = float(inside.double().mean())
    if noises < 2:
        return Interval(share, n=noises)
    between = float(inside.double().mean(0).var())
    worth = share * (1 - share) / between if between > 0 else 0.0  # of one noise, in independent samples
    reach = float(norm.ppf((1 + level) / 2))
    count = noises * min(max(worth, 1.0), members) * (reach / float(t.ppf((1 + level) / 2, noises - 1))) ** 2
    centre = (share + reach**2 / (2 * count)) / (1 + reach**2 / count)
    half = reach / (1 + reach**2 / count) * (share * (1 - share) / count + reach**2 / (4 * count**2)) ** 0.5
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)), noises)


def draw_without_groups(count: int, *keys: int | str, groups: int = JACKKNIFE_GROUPS) -> Tensor:
    """Draw groups of near-equal size and return which samples are left without each: 0 and 1, [groups, count]."""
    order = torch.randperm(count, generator=generator("groups", *keys))
    owner = (torch.arange(count) % groups)[order]
    return (owner != torch.arange(groups)[:, None]).double()


def jackknife_interval(value: float, without: Tensor, level: float = 0.95) -> Interval:
    """Interval of a share in [0, 1] from its values without each of G groups of samples [G].

    var = (G - 1) / G sum_g (value_g - mean)^2, and Student's with G - 1 degrees of freedom.
    """
    groups = len(without)
    deviation = ((groups - 1) ** 2 / groups * without.double().var()).sqrt()
    reach = float(t.ppf((1 + level) / 2, groups - 1)) * float(deviation)
    return Interval(value, max(value - reach, 0.0), min(value + reach, 1.0), resamples=groups)
