"""Intervals, rank correlation and AUROC: one of each, in NumPy and SciPy.

The rank correlation of a constant is undefined. `spearman` gives NaN for it, as SciPy does, so that nobody takes the
absence of an order for a measured 0; `rank_correlation`, whose rows are averaged, gives 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import mannwhitneyu, norm, rankdata, skew, spearmanr, t


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
    def known(self) -> bool:
        """Whether there is an interval: neither end is NaN."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def width(self) -> float:
        """high - low, in the unit of the values; infinite where there is no interval."""
        return math.inf if math.isnan(self.low) else self.high - self.low

    def within(self, least: float = -math.inf, most: float = math.inf) -> Interval:
        """Return this interval of a quantity that lies between two values: ends beyond one are moved to it.

        The coverage stays as it is: what is cut off holds no value that the quantity could have. An estimate that
        rounding left beyond stays inside, and ends that are unknown stay unknown.
        """
        low = max(self.low, min(least, self.estimate))
        return replace(self, low=low, high=min(self.high, max(most, self.estimate)))

    def as_dict(self) -> dict[str, float | None]:
        """The estimate, both ends and what they stand on: `resamples` for a resampled one, else `n`; None for NaN."""
        base = {"resamples": self.resamples} if self.resamples else {"n": self.n}
        values = {"estimate": self.estimate, "low": self.low, "high": self.high}
        return {**{name: None if math.isnan(value) else value for name, value in values.items()}, **base}


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


def ratio_interval(above: ArrayLike, below: ArrayLike, level: float = 0.95) -> Interval:
    """Geometric mean of the ratios of pairs of positive values, with Student's interval of their logarithms.

    Raises:
        ValueError: as `mean_interval`, or if a value is not positive.
    """
    above, below = check_vectors(1, above=above, below=below)
    if not (above > 0).all() or not (below > 0).all():
        raise ValueError("a geometric mean of ratios needs positive values on both sides")
    logs = mean_interval(np.log(above / below), level)
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high), logs.n)


def skewed_mean_interval(values: ArrayLike, level: float = 0.95, least: float = -math.inf) -> Interval:
    """Interval of a mean of skewed values: Student's under Hall's cubic transformation, which removes the skewness.

        mean - sd / sqrt(n) g^-1(+-t_{n-1}),    g^-1(x) = 3 (cbrt(1 + a (x - a / 6)) - 1) / a,    a = skewness / sqrt(n)

    Without skewness it is Student's. Values of a positive quantity, mutual information for example, lie to the right of
    their mean: Student's interval of them ends too low. (Hall 1992, J. R. Stat. Soc. B 54, 221-228.)

    `least` is a value that the quantity cannot be below; see `Interval.within`.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    plain = mean_interval(values, level).within(least)
    if plain.n < 3 or not plain.sd > 0:
        return plain
    drift = float(skew(np.asarray(values, dtype=np.float64))) / plain.n**0.5
    if abs(drift) < 1e-8:
        return plain
    reach = float(t.ppf((1 + level) / 2, plain.n - 1))
    ends = [3 / drift * (math.cbrt(1 + drift * (x - drift / 6)) - 1) for x in (reach, -reach)]
    scale = plain.sd / plain.n**0.5
    low, high = (plain.estimate - scale * end for end in ends)
    return replace(plain, low=low, high=high).within(least)


def percentile_interval(estimate: float, drawn: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of an estimate by the percentiles of its values in bootstrap resamples [R].

    The ends are the values at ranks p (R + 1), so that a further resample lies outside with probability 1 - level
    however few there are; at ranks 1 + p (R - 1), NumPy's default, it does so more often: 8 % in place of 5 % of 60.
    Values that are NaN are left out. There are no ends where all values are alike: other draws need not be.
    """
    values = np.asarray(drawn, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values) or np.ptp(values) == 0:
        return Interval(estimate, resamples=len(values))
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2), method="weibull")
    return Interval(estimate, float(low), float(high), resamples=len(values))


def look_level(look: int, level: float = 0.95) -> float:
    """Level of the interval at the k-th look of a rule that stops when it is narrow enough, k = 1, 2, ...

    Level k is 1 - (1 - level) / (k (k + 1)). The errors add up to 1 - level over all looks, so that the intervals of
    all looks cover together at `level`, and the last one does, whenever the rule stops (a union bound).
    """
    return 1 - (1 - level) / (look * (look + 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties at their mean rank; NaN where x or y is constant.

    Raises:
        ValueError: if the vectors differ in length, have fewer than 2 entries or hold values that are not finite.
    """
    x, y = check_vectors(2, x=x, y=y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(spearmanr(x, y).statistic)


def spearman_interval(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Interval:
    """Spearman's rank correlation of a few pairs, with Bonett and Wright's interval.

        tanh(atanh r -+ z sqrt((1 + r^2 / 2) / (n - 3)))

    Where all pairs are in order, r is taken half of the smallest possible step below 1, so that the interval keeps a
    width. Fewer than 5 pairs, or a constant side, have no interval. (Bonett & Wright 2000, Psychometrika 65, 23-28.)

    Raises:
        ValueError: as for `spearman`.
    """
    found = spearman(x, y)
    count = len(np.asarray(x))
    if math.isnan(found) or count < 5:
        return Interval(found, n=count)
    inside = 1 - 6 / (count * (count**2 - 1))
    centre = math.atanh(min(max(found, -inside), inside))
    reach = float(norm.ppf((1 + level) / 2)) * math.sqrt((1 + found**2 / 2) / (count - 3))
    return Interval(found, min(math.tanh(centre - reach), found), max(math.tanh(centre + reach), found), count)


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


def auroc_interval(scores: ArrayLike, positives: ArrayLike, level: float = 0.95) -> Interval:
    """AUROC of a few scores, with Newcombe's interval.

    The ends are the theta with (theta - AUROC)^2 = z^2 V(theta), V being Hanley and McNeil's variance at exponential
    scores with (m + n) / 2 of each kind. It keeps a width where the AUROC is 0 or 1, as Wilson's of a share does. Fewer
    than two scores of a kind have no interval. Equal scores rank nothing: their estimate is NaN, where `auroc`, which
    counts ties by half, gives 0.5. (Newcombe 2006, Statistics in Medicine 25, 559-573, method 5.)

    Raises:
        ValueError: as for `auroc`.
    """
    found = auroc(scores, positives)
    above = int(np.sum(np.asarray(positives) == 1))
    below = len(np.asarray(positives)) - above
    if np.ptp(np.asarray(scores)) == 0:
        return Interval(math.nan, n=above + below)
    if min(above, below) < 2:
        return Interval(found, n=above + below)
    reach = float(norm.ppf((1 + level) / 2))

    def excess(theta: float) -> float:
        pairs = ((above + below) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (found - theta) ** 2 - reach**2 * theta * (1 - theta) * (1 + pairs) / (above * below)

    edge = 1e-9
    low = brentq(excess, edge / 10, min(found, 1 - edge)) if found > edge else 0.0
    high = brentq(excess, max(found, edge), 1 - edge / 10) if found < 1 - edge else 1.0
    return Interval(found, float(low), float(high), above + below)


def holm(values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p values [K] of K tests for their number: Holm's step-down (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    (values,) = check_vectors(1, values=values)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


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
