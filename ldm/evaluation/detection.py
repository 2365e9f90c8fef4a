"""Does an uncertainty find what it should? Rank correlation, detection, selective risk, and their intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata, t

from ldm.util import generator


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties at their mean rank; NaN where x or y is constant.

    Raises:
        ValueError: if the vectors differ in length, have fewer than 2 entries or hold values that are not finite.
    """
    x, y = _vectors(2, x=x, y=y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(_correlations(rankdata(x), rankdata(y)))


def spearman_ceiling(class_sizes: ArrayLike) -> float:
    """The largest |Spearman| any scores without ties can reach against class_sizes with ties.

        rho_max = sqrt( 1 - sum_k (t_k^3 - t_k) / (n^3 - n) ),    t_k entries share the k-th class_size

    Bins of 3, 2, 2 and 3 classes give 0.969. The value of scores that order the bins perfectly and break ties at will:
    quote it beside a measured correlation. NaN where all class_sizes are equal.

    Raises:
        ValueError: as for `spearman`.
    """
    (class_sizes,) = _vectors(2, class_sizes=class_sizes)
    return spearman(class_sizes, rankdata(class_sizes, method="ordinal"))


def auroc(scores: ArrayLike, positives: ArrayLike) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal)/2; NaN if one side is empty.

    From the rank sum of the positives (Mann & Whitney 1947), fast enough for thousands of resamples.

    Args:
        scores: [N], larger means "more likely positive".
        positives: [N], booleans or 0/1.

    Raises:
        ValueError: if lengths differ, a score is not finite, or `positives` holds other values than 0 and 1.
    """
    scores, positives = _vectors(1, scores=scores, positives=positives)
    if not np.isin(positives, (0, 1)).all():
        raise ValueError(f"positives must be booleans or 0/1, got values {np.unique(positives)[:5].tolist()}")
    if positives.all() or not positives.any():
        return float("nan")
    return float(_areas(rankdata(scores), positives))


def _correlations(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation along the last axis; 0 where one side is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(size > 0, size, 1)


def _areas(ranks: NDArray[np.float64], positives: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC along the last axis, from the ranks of the scores."""
    count = positives.sum(-1)
    wins = (ranks * positives).sum(-1) - count * (count + 1) / 2
    return wins / (count * (ranks.shape[-1] - count))


class Interval(NamedTuple):
    """A statistic and the ends of its bootstrap interval; `resamples` is how many gave a value."""

    estimate: float
    low: float
    high: float
    resamples: int


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
    labels = np.zeros(lengths.pop()) if strata is None else np.asarray(strata)
    if labels.shape != (len(columns[0]),):
        raise ValueError(f"strata must be [{len(columns[0])}], one label for each entry, got {labels.shape}")
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    source = generator("bootstrap", seed)
    picks = [group[torch.randint(len(group), (resamples, len(group)), generator=source).numpy()] for group in groups]
    rows = np.concatenate(picks, axis=1)
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
    return Interval(float(estimate), float(low), float(high), len(values))


class MeanInterval(NamedTuple):
    """Mean of `n` independent values, their standard deviation, and the ends of the mean's interval (NaN for one)."""

    mean: float
    sd: float
    low: float
    high: float
    n: int

    @property
    def width(self) -> float:
        """high - low, in the unit of the values; infinite for one value."""
        return self.high - self.low if self.n > 1 else float("inf")


def mean_interval(values: ArrayLike, level: float = 0.95) -> MeanInterval:
    """Student's interval of a mean, mean -+ t_{n-1} s / sqrt(n), s with n - 1 in the denominator.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    (values,) = _vectors(1, values=values)
    count, mean = len(values), float(values.mean())
    if count == 1:
        return MeanInterval(mean, float("nan"), float("nan"), float("nan"), 1)
    sd = float(values.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, count - 1)) * sd / count**0.5
    return MeanInterval(mean, sd, mean - half, mean + half, count)


class ClassSizeScores(NamedTuple):
    """How scores of classes follow their numbers of training images; `few` are the positive sizes of the AUROC."""

    spearman: Interval
    ceiling: float
    auroc: Interval
    few: list[float]


def against_class_sizes(
    scores: ArrayLike, class_sizes: ArrayLike, few: float = 10, seed: int = 0, resamples: int = 2000
) -> ClassSizeScores:
    """Rank correlation of scores with class sizes, and detection of small classes, with bootstrap intervals.

    Spearman of (class_size, score), -`ceiling` at best for an uncertainty; AUROC of classes with up to `few` images
    (or, if
    none has so few, those of the smallest class_size) as positives against the largest class_size.
    Classes are resampled within their class_sizes, whose sizes are part of the design. Equal scores give 0 and 1/2.

    Args:
        scores, class_sizes: [N], one for each class; infinity stands for "all images".

    Raises:
        ValueError: if all class_sizes are equal, lengths differ or a score is not finite.
    """
    ranks = np.unique(np.asarray(class_sizes, dtype=np.float64), return_inverse=True)[1].astype(np.float64)
    class_sizes, scores = np.asarray(class_sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if np.ptp(ranks) == 0:
        raise ValueError(f"all {len(ranks)} classes have one class_size: nothing to correlate")
    # Copies of a class in a resample are no ties: broken, they leave the ceiling where it is.
    ties = "ordinal" if len(np.unique(scores)) == len(scores) else "average"
    options = {"seed": seed, "resamples": resamples, "batched": True}
    correlation = bootstrap_interval(
        lambda x, y: _correlations(rankdata(x, axis=-1), rankdata(y, method=ties, axis=-1)),
        ranks,
        scores,
        strata=ranks,
        **options,
    )
    largest = class_sizes == class_sizes.max()
    positives = ~largest & (class_sizes <= max(few, class_sizes.min()))
    chosen = positives | largest
    area = bootstrap_interval(
        lambda x, y: _areas(rankdata(x, axis=-1), y),
        scores[chosen],
        positives[chosen].astype(np.float64),
        strata=ranks[chosen],
        **options,
    )
    return ClassSizeScores(correlation, spearman_ceiling(ranks), area, sorted(set(class_sizes[positives].tolist())))


class RiskCoverage(NamedTuple):
    """Mean loss `risk` [N] of the most certain share `coverage` [N] of the samples, and the curve's mean `aurc`."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    aurc: float


def risk_coverage(uncertainty: ArrayLike, losses: ArrayLike) -> RiskCoverage:
    """Selective risk: keep the k most certain of N samples, for k = 1 .. N.

        risk(k/N) = (1/k) sum of the k kept losses,    AURC = (1/N) sum_k risk(k/N)

    (Geifman & El-Yaniv, arXiv 1805.08206.) Samples of equal uncertainty count with their mean loss: the expectation
    over the ways to break the tie. `risk_coverage(losses, losses).aurc` is the best AURC an ordering can reach.

    Args:
        uncertainty, losses: [N], in any units; the risk has the units of the losses.

    Raises:
        ValueError: if lengths differ, are 0, or a value is not finite.
    """
    uncertainty, losses = _vectors(1, uncertainty=uncertainty, losses=losses)
    _, group, sizes = np.unique(uncertainty, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(group, weights=losses) / sizes, sizes)
    kept = np.arange(1, len(losses) + 1)
    risk = np.cumsum(expected) / kept
    return RiskCoverage(kept / len(losses), risk, float(risk.mean()))


def _vectors(least: int, **named: ArrayLike) -> list[NDArray[np.float64]]:
    """Check that the named arrays are finite vectors of one length, at least `least`, and return them in float64."""
    vectors = [np.asarray(values, dtype=np.float64) for values in named.values()]
    shapes = {name: vector.shape for name, vector in zip(named, vectors, strict=True)}
    if len(set(shapes.values())) != 1 or vectors[0].ndim != 1 or len(vectors[0]) < least:
        raise ValueError(f"expected vectors of one length, at least {least}; got shapes {shapes}")
    for name, vector in zip(named, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise ValueError(
                f"{name} has {np.count_nonzero(~np.isfinite(vector))} values that are not finite, the first at index "
                f"{np.flatnonzero(~np.isfinite(vector))[0]}; remove those samples or find out why they diverged"
            )
    return vectors
