"""Does an uncertainty find what it should? Correlation with class sizes, detection of small classes, selective risk."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ldm.stats import Interval, auroc_interval, check_vectors, spearman, spearman_interval


def spearman_ceiling(class_sizes: ArrayLike) -> float:
    """The largest |Spearman| any scores without ties can reach against class_sizes with ties.

        rho_max = sqrt( 1 - sum_k (t_k^3 - t_k) / (n^3 - n) ),    t_k entries share the k-th class_size

    Bins of 3, 2, 2 and 3 classes give 0.969. The value of scores that order the bins perfectly and break ties at will:
    quote it beside a measured correlation. NaN where all class_sizes are equal.

    Raises:
        ValueError: as for `spearman`.
    """
    (class_sizes,) = check_vectors(2, class_sizes=class_sizes)
    return spearman(class_sizes, rankdata(class_sizes, method="ordinal"))


class ClassSizeScores(NamedTuple):
    """How scores of classes follow their numbers of training images; `few` are the positive sizes of the AUROC."""

    spearman: Interval
    ceiling: float
    auroc: Interval
    few: list[float]


def against_class_sizes(scores: ArrayLike, class_sizes: ArrayLike, few: float = 10) -> ClassSizeScores:
    """Rank correlation of scores with class sizes, and detection of small classes, with their intervals over classes.

    Spearman of (class size, score) is -`ceiling` at best for an uncertainty, and its interval ends there. AUROC takes
    classes with up to `few` images (or, if none has so few, those of the smallest size) as positives against those of
    the largest size. Intervals: `spearman_interval`, `auroc_interval`. Equal scores rank nothing: all is NaN.

    Args:
        scores, class_sizes: [N], one for each class; infinity stands for "all images".

    Raises:
        ValueError: if all class sizes are equal, lengths differ or a score is not finite.
    """
    ranks = np.unique(np.asarray(class_sizes, dtype=np.float64), return_inverse=True)[1].astype(np.float64)
    class_sizes, scores = np.asarray(class_sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if np.ptp(ranks) == 0:
        raise ValueError(f"all {len(ranks)} classes have one class_size: nothing to correlate")
    largest = class_sizes == class_sizes.max()
    positives = ~largest & (class_sizes <= max(few, class_sizes.min()))
    sizes = sorted(set(class_sizes[positives].tolist()))
    ceiling = spearman_ceiling(ranks)
    correlation = spearman_interval(ranks, scores)
    chosen = positives | largest
    area = auroc_interval(scores[chosen], positives[chosen])
    bounded = replace(correlation, low=max(correlation.low, -ceiling), high=min(correlation.high, ceiling))
    return ClassSizeScores(bounded if correlation.known else correlation, ceiling, area, sizes)


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
    uncertainty, losses = check_vectors(1, uncertainty=uncertainty, losses=losses)
    _, group, sizes = np.unique(uncertainty, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(group, weights=losses) / sizes, sizes)
    kept = np.arange(1, len(losses) + 1)
    risk = np.cumsum(expected) / kept
    return RiskCoverage(kept / len(losses), risk, float(risk.mean()))
