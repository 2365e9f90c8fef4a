"""Intervals, rank correlation and AUROC: one of each, in NumPy and SciPy.

The rank correlation of a constant is undefined. `spearman` gives NaN for it, as SciPy does, so that nobody takes the
absence of an order for a measured 0; `rank_correlation`, whose rows are averaged, gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu, rankdata, spearmanr, t


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval, in the unit of the values.

    Attributes:
        estimate: the statistic of all values.
        low, high: the ends; NaN where no interval was asked for, or where there is one value only.
        n: how many independent values the estimate stands on; 0 where nobody counted.
        sd: standard deviation of the values, where the statistic is their mean; else NaN.
        resamples: how many bootstrap resamples gave a value; 0 where the interval is no bootstrap.
    """

    estimate: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    sd: float = math.nan
    resamples: int = 0

    @property
    def width(self) -> float:
        """high - low, in the unit of the values; infinite where there is no interval."""
        return math.inf if math.isnan(self.low) else self.high - self.low

    def as_dict(self) -> dict[str, float]:
        """The estimate, both ends and what they stand on: `resamples` for a bootstrap, else `n`."""
        base = {"resamples": self.resamples} if self.resamples else {"n": self.n}
        return {"estimate": self.estimate, "low": self.low, "high": self.high, **base}


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval of a mean.

        mean -+ t_{n-1} sd / sqrt(n),    sd with n - 1 in the denominator

    One value gives its mean and NaN for the rest.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    (values,) = check_vectors(1, values=values)
    count = len(values)
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, n=1)
    sd = float(values.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, count - 1)) * sd / count**0.5
    return Interval(mean, mean - half, mean + half, count, sd)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: Any,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    strata: ArrayLike | None = None,
    batched: bool = False,
) -> Interval:
    """Percentile bootstrap of `statistic(*arrays)`, resampling the first axis of all arrays jointly (Efron 1979).

    `scipy.stats.bootstrap` knows no strata, lets one NaN spoil the interval, and draws from NumPy's generator, which
    would change every number made with this function before: so the resampling is our own.

    Args:
        statistic: function of the resampled arrays. Resamples where it is NaN (one class only) are left out.
        arrays: equal first axes; this axis is the independent unit (classes, not the noises within a class).
        seed: the resamples are functions of it alone.
        level: share between the ends, by quantiles of (1 - level)/2 on both sides.
        strata: [N] labels; given, each stratum keeps its size (for AUROC: `strata=positives`).
        batched: the statistic takes resampled vectors [R, N] and gives [R]: all resamples in one call.

    Raises:
        ValueError: if arrays differ in length or are empty, or more than half of the resamples give NaN.
    """
    columns = [np.asarray(array) for array in arrays]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or not 0 < level < 1 or resamples < 1 or 0 in lengths:
        raise ValueError(
            f"bootstrap needs arrays of one length above 0, 0 < level < 1 and resamples >= 1; got lengths "
            f"{sorted(lengths)}, level {level}, resamples {resamples}"
        )
    count = lengths.pop()
    labels = np.zeros(count) if strata is None else np.asarray(strata)
    if labels.shape != (count,):
        raise ValueError(f"strata must be [{count}], one label for each entry, got {labels.shape}")
    rows = _draw_rows(labels, resamples, seed)
    if batched:
        values = np.asarray(statistic(*(column[rows] for column in columns)), dtype=float)
        estimate = statistic(*(column[None] for column in columns))[0]
    else:
        values = np.array([statistic(*(column[row] for column in columns)) for row in rows], dtype=float)
        estimate = statistic(*columns)
    values = values[~np.isnan(values)]
    if len(values) * 2 < resamples:
        raise ValueError(
            f"the statistic is undefined on {resamples - len(values)} of {resamples} resamples; use more data, or "
            "strata= to keep every class in each resample"
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), count, resamples=len(values))


def _draw_rows(labels: NDArray[Any], resamples: int, seed: int) -> NDArray[np.int64]:
    """Row numbers [resamples, N], drawn with replacement within each of the strata that `labels` [N] name."""
    import torch  # only the draws need it: everything else here is light to import

    from ldm.util import generator

    source = generator("bootstrap", seed)
    drawn = []
    for label in np.unique(labels):
        group = np.flatnonzero(labels == label)
        drawn.append(group[torch.randint(len(group), (resamples, len(group)), generator=source).numpy()])
    return np.concatenate(drawn, axis=1)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties at their mean rank; NaN where x or y is constant.

    Raises:
        ValueError: if the vectors differ in length, have fewer than 2 entries or hold values that are not finite.
    """
    x, y = check_vectors(2, x=x, y=y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(spearmanr(x, y).statistic)


def rank_correlation(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's rank correlation along the last axis, [..., N] -> [...]; 0 where one side is constant.

    It equals `spearman` row by row, in one call for thousands of rows.
    """
    x = rankdata(x, axis=-1)
    y = rankdata(y, axis=-1)
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(size > 0, size, 1)


def auroc(scores: ArrayLike, positives: ArrayLike) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal)/2; NaN if one side is empty.

    Mann & Whitney's U (1947) over the number of pairs.

    Args:
        scores: [N], larger means "more likely positive".
        positives: [N], booleans or 0/1.

    Raises:
        ValueError: if lengths differ, a score is not finite, or `positives` holds other values than 0 and 1.
    """
    scores, positives = check_vectors(1, scores=scores, positives=positives)
    if not np.isin(positives, (0, 1)).all():
        raise ValueError(f"positives must be booleans or 0/1, got values {np.unique(positives)[:5].tolist()}")
    above = scores[positives == 1]
    below = scores[positives == 0]
    if not len(above) or not len(below):
        return math.nan
    return float(mannwhitneyu(above, below, method="asymptotic").statistic) / (len(above) * len(below))


def batched_auroc(scores: NDArray[Any], positives: NDArray[Any]) -> NDArray[np.float64]:
    """`auroc` along the last axis, [..., N] -> [...], for thousands of rows in one call; NaN if one side is empty."""
    ranks = rankdata(scores, axis=-1)
    count = positives.sum(-1)
    wins = (ranks * positives).sum(-1) - count * (count + 1) / 2
    pairs = count * (ranks.shape[-1] - count)
    return np.divide(wins, pairs, out=np.full(np.shape(wins), np.nan), where=pairs > 0)


def check_vectors(least: int, **named: ArrayLike) -> list[NDArray[np.float64]]:
    """Return the named arrays in float64.

    Raises:
        ValueError: unless they are finite vectors of one length, at least `least`.
    """
    vectors = [np.asarray(values, dtype=np.float64) for values in named.values()]
    shapes = {name: vector.shape for name, vector in zip(named, vectors, strict=True)}
    if len(set(shapes.values())) != 1 or vectors[0].ndim != 1 or len(vectors[0]) < least:
        raise ValueError(f"expected vectors of one length, at least {least}; got shapes {shapes}")
    for name, vector in zip(named, vectors, strict=True):
        if not np.isfinite(vector).all():
            broken = np.flatnonzero(~np.isfinite(vector))
            raise ValueError(
                f"{name} has {len(broken)} values that are not finite, the first at index "
                f"{broken[0]}; remove those samples or find out why they diverged"
            )
    return vectors
