"""Choosing lambda of epsilon scaling: an estimate from norms, and a search over b."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.exposure import StepMoments


def estimated_factors(sampling: StepMoments, training: StepMoments) -> Tensor:
    """lambda of each step [S]: the mean norm of the network's own eps in sampling over that in training.

    Measured under a scaling (with the watch below it), it is the next round of a fixed point: earlier corrections
    shorten later norms.

    Raises:
        ValueError: if a step has no images.
    """
    for name, moments in (("sampling", sampling), ("training", training)):
        if bool((moments.count == 0).any()):
            raise ValueError(f"the norms in {name} lack steps {(moments.count == 0).nonzero().flatten().tolist()}")
    return sampling.mean / training.mean


@dataclass(frozen=True)
class Search:
    """The best b, its score, and every score by b."""

    best: float
    score: float
    tried: dict[float, float]

    @property
    def at_edge(self) -> str | None:
        """The end of what was tried that the best lies at, least or largest: a better one may lie beyond."""
        ends = {"least": min(self.tried), "largest": max(self.tried)}
        return next((name for name, end in ends.items() if self.best == end), None)


def search_b(
    metric: Callable[[float], float], low: float = 0.99, high: float = 1.04, points: int = 6, rounds: int = 2
) -> Search:
    """The b with the smallest metric: even points between low and high, then as many around the best, and so on.

    b = 1 is always tried, so that the answer is never worse than no scaling on this metric. No value is tried twice.
    A metric of samples should use the same seeds for every b.

    Args:
        metric: b -> score, lower is better (FID, a distance of norms).
        points: of each round; rounds: how often the interval narrows to the neighbours of the best.

    Raises:
        ValueError: for an empty interval, fewer than 3 points, or a metric that is not finite anywhere.
    """
    if not (0 < low < high and points >= 3 and rounds >= 1):
        raise ValueError(f"expected 0 < low < high, points >= 3, rounds >= 1, got {low}, {high}, {points}, {rounds}")
    tried: dict[float, float] = {}
    for _ in range(rounds):
        candidates = torch.linspace(low, high, points, dtype=torch.float64).tolist()
        for b in dict.fromkeys([1.0, *(round(value, 6) for value in candidates)]):
            if b not in tried:
                tried[b] = float(metric(b))
        scores = {b: score for b, score in tried.items() if not math.isnan(score)}
        if not scores:
            raise ValueError(f"the metric is not a number at any of {sorted(tried)}")
        best = min(scores, key=scores.__getitem__)
        width = (high - low) / (points - 1)
        low, high = best - width, best + width
    return Search(best, scores[best], dict(sorted(tried.items())))
