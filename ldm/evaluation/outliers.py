"""Classes that are more uncertain than their number of training images explains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control, t

from ldm.stats import check_vectors

RATE = 0.1
# Fewer classes leave too few degrees of freedom for a line and a test.
LEAST_CLASSES = 6


@dataclass(frozen=True)
class Outstanding:
    """How far each class lies above what its number of images explains.

    Attributes:
        expected: the score that the line gives, [N].
        p: one-sided p of the externally studentised residual, [N].
        chosen: the places that stand out at the false discovery rate, most first.
        rate: the rate.
    """

    expected: NDArray[np.float64]
    p: NDArray[np.float64]
    chosen: list[int]
    rate: float


def find_outstanding(scores: ArrayLike, images: ArrayLike, rate: float = RATE) -> Outstanding | None:
    """Find classes whose score lies above the line of log score against log images, at a false discovery rate.

    Each class is held against the line through the others: its externally studentised residual has Student's
    distribution with N - 3 degrees of freedom where residuals are normal (Cook and Weisberg 1982). One-sided p values
    are controlled by Benjamini and Hochberg (1995).

    Args:
        scores: [N], above 0.
        images: [N], 1 or more.
        rate: the share of false ones among those that are found, on average, at most.

    Returns:
        None where there are fewer than 6 classes, or all have one number of images, or a score is 0.

    Raises:
        ValueError: if lengths differ or a value is not finite.
    """
    scores, images = check_vectors(1, scores=scores, images=images)
    fits = len(scores) >= LEAST_CLASSES and np.ptp(images) > 0
    if not fits or (scores <= 0).any() or (images < 1).any():
        return None
    y = np.log(scores)
    design = np.stack([np.ones_like(y), np.log(images)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    fitted = design @ (inverse @ (design.T @ y))
    leverage = np.einsum("ni,ij,nj->n", design, inverse, design)
    residual, free = y - fitted, len(y) - 3
    others = (np.sum(residual**2) - residual**2 / (1 - leverage)) / free
    statistic = residual / np.sqrt(np.maximum(others, 1e-30) * (1 - leverage))
    p = t.sf(statistic, free)
    kept = np.nonzero(false_discovery_control(p) <= rate)[0]
    return Outstanding(np.exp(fitted), p, sorted(kept.tolist(), key=lambda place: p[place]), rate)
