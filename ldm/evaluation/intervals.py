"""Intervals for every pixel of a clean picture, given a noisy one, calibrated so that few pixels lie outside.

    interval of pixel p      mean_p -+ factor scale_p
    loss of a picture        share of its pixels outside, which falls as the factor grows

`scale` is any positive map, a standard deviation for example; the better it follows the errors, the shorter the
intervals. On pictures whose clean versions are known the factor is chosen so that the loss of further pictures of the
same law is at most `risk` on average, with confidence over the calibration set (Bates et al. 2021, arXiv 2101.02703,
risk-controlling prediction sets). The bound of a mean of losses in [0, 1] is Hoeffding's and Bentkus' (ibid., section
3.1.2), which holds for every law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from ldm.stats import Interval, mean_interval


def mean_p_value(mean: float, risk: float, count: int) -> float:
    """Return the p value that losses in [0, 1] whose mean over `count` pictures is `mean` average above the risk.

        min(exp(-n h(min(mean, risk), risk)), e P(Binomial(n, risk) <= ceil(n mean)))

    h(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)) (Hoeffding 1963; Bentkus 2004).
    """
    below = min(mean, risk)
    first = below * math.log(below / risk) if below > 0 else 0.0
    last = (1 - below) * math.log((1 - below) / (1 - risk))
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, risk))
    return min(math.exp(-count * (first + last)), bentkus, 1.0)


def largest_mean(risk: float, confidence: float, count: int) -> float:
    """Return the largest mean loss over `count` pictures at which the risk is refused to be exceeded.

    Raises:
        ValueError: if even losses of 0 are not enough, with the number of pictures that are.
    """
    error = 1 - confidence
    fewest = math.ceil(math.log(error) / math.log1p(-risk) - 1e-9)
    if count < fewest:
        raise ValueError(
            f"{count} pictures calibrate nothing: a risk of {risk:g} at confidence {confidence:g} needs at least "
            f"{fewest}, even if no pixel lies outside; give more, or ask for a larger risk"
        )
    low, high = 0.0, risk
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_p_value(middle, risk, count) <= error else (low, middle)
    return low


def calibrate_factor(errors: ArrayLike, scales: ArrayLike, risk: float, confidence: float) -> float:
    """Return the smallest factor under which the share of pixels outside is at most the risk, with confidence.

    Args:
        errors: clean - mean of the calibration pictures [N, P]; scales: their maps [N, P], above 0.

    Raises:
        ValueError: for maps that are not positive, or too few pictures.
    """
    errors, scales = _check(errors, scales)
    allowed = largest_mean(risk, confidence, len(errors))
    ratios = np.sort((np.abs(errors) / scales).ravel())
    outside = math.floor(allowed * len(ratios) + 1e-9)
    return float(ratios[len(ratios) - 1 - outside])


@dataclass(frozen=True)
class Held:
    """What intervals do on pictures that did not calibrate them.

    Attributes:
        factor: times the map.
        coverage: share of the pixels inside, with Student's interval over pictures, its ends within 0 to 1.
        length: mean length of the intervals, in units of the pictures.
    """

    factor: float
    coverage: Interval
    length: float


def hold(errors: ArrayLike, scales: ArrayLike, factor: float) -> Held:
    """Return coverage and length of intervals with a factor, on pictures [N, P] that did not calibrate it."""
    errors, scales = _check(errors, scales)
    inside = (np.abs(errors) <= factor * scales).mean(1)
    return Held(factor, mean_interval(inside).within(0, 1), float(2 * factor * scales.mean()))


def _check(errors: ArrayLike, scales: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    errors = np.asarray(errors, dtype=np.float64)
    scales = np.asarray(scales, dtype=np.float64)
    if errors.ndim != 2 or errors.shape != scales.shape:
        raise ValueError(f"expected errors and maps of one shape [N, P], got {errors.shape} and {scales.shape}")
    if not (scales > 0).all() or not np.isfinite(errors).all():
        raise ValueError("maps must be above 0 everywhere, and errors finite")
    return errors, scales
