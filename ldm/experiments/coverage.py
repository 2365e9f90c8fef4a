"""How often intervals cover: what is counted, and intervals of metrics and classes on laws whose answer is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from ldm.evaluation.cmmd import cmmd, cubic_kernel, gram_within, mmd2
from ldm.evaluation.detection import against_class_sizes
from ldm.evaluation.fid import fid
from ldm.evaluation.inception_score import measure_inception_scores
from ldm.evaluation.precision_recall import density_coverage, precision_recall, squared_radii
from ldm.evaluation.resampling import clustered_share_interval
from ldm.evaluation.statistics import moments
from ldm.stats import Interval, auroc_interval, ratio_interval, spearman_interval
from ldm.util import generator

# Draws that a case makes: [repeats] intervals, and the value that they are to hold (None: the mean of the estimates).
Case = tuple[str, Callable[[int], Interval], float | None]
DIMENSIONS = 16
REFERENCE = 1500


def draw_features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Draw features [N, 16] of a law that is not normal, float64."""
    mixing = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator("mixing"), dtype=torch.float64) / DIMENSIONS**0.5
    rows = torch.randn(count, DIMENSIONS, generator=generator("features", seed), dtype=torch.float64)
    return torch.relu(rows @ mixing + 0.2) + shift


def draw_predictions(count: int, seed: int, classes: int) -> Tensor:
    """Draw p(y|x) [N, K] of a classifier that is mostly right."""
    source = generator("predictions", seed)
    logits = torch.randn(count, classes, generator=source, dtype=torch.float64)
    logits[torch.arange(count), torch.randint(classes, (count,), generator=source)] += 6
    return logits.softmax(1)


def feature_cases(count: int, shift: float) -> Iterator[Case]:
    """Metrics of `count` samples whose law is shifted against the reference's."""
    reference = draw_features(REFERENCE, 0)
    statistics = moments(reference).statistics()
    sums = gram_within(cubic_kernel, reference)
    balls = {k: squared_radii(reference, k) for k in (3, 5)}

    def samples(seed: int) -> Tensor:
        return draw_features(count, 1 + seed, shift)

    words = f"{count} samples, shift {shift}"
    yield f"FID, {words}", lambda seed: fid(statistics, samples(seed), 20, seed), None
    kid = partial(mmd2, cubic_kernel, reference, reference_sums=sums)
    yield f"KID, {words}", lambda seed: kid(samples(seed), resamples=60, seed=seed), None
    distance = partial(cmmd, reference, sigma=2.0)
    yield f"CMMD, {words}", lambda seed: distance(samples(seed), resamples=60, seed=seed), None
    pairs = (("precision", 3, precision_recall), ("recall", 3, precision_recall))
    for name, k, function in (*pairs, ("density", 5, density_coverage), ("coverage", 5, density_coverage)):
        measure = partial(function, reference, k=k, resamples=20, radii=balls[k])
        yield f"{name}, {words}", partial(_measure_named, measure, samples, name), None


def _measure_named(measure: Callable, samples: Callable[[int], Tensor], name: str, seed: int) -> Interval:
    return getattr(measure(samples=samples(seed), seed=seed), name)


def find_score(classes: int) -> float:
    """Return the Inception Score of the law of `draw_predictions`, of a million draws."""
    certain, means = [], []
    for part in range(20):
        drawn = draw_predictions(50_000, -1 - part, classes)
        certain.append(float(torch.special.entr(drawn).sum(1).mean()))
        means.append(drawn.mean(0))
    together = torch.stack(means).mean(0)
    return float(np.exp(float(torch.special.entr(together).sum()) - np.mean(certain)))


def score_cases() -> Iterator[Case]:
    """Inception Scores: as published, of as many images; and corrected, of the law."""
    for classes, count in ((10, 500), (100, 5000)):
        truth = find_score(classes)

        def score(seed: int, name: str, classes: int = classes, count: int = count) -> Interval:
            found = measure_inception_scores(draw_predictions(count, 100 + seed, classes), 60, seed)
            return getattr(found, name)

        yield f"IS, {count} images of {classes} classes", partial(score, name="published"), None
        yield f"IS corrected, {count} images of {classes} classes", partial(score, name="corrected"), truth


def draw_scores(seed: int, slope: float) -> np.ndarray:
    """Draw normal scores of ten classes in bins of 3, 2, 2 and 3."""
    rows = np.array([3.0, 3, 3, 2, 2, 1, 1, 0, 0, 0]) * slope
    return rows + torch.randn(10, generator=generator("scores", seed), dtype=torch.float64).numpy()


def class_cases() -> Iterator[Case]:
    """Spearman and AUROC of ten classes against their images per class."""
    sizes = [1] * 3 + [10] * 2 + [50] * 2 + [1e9] * 3
    for slope in (0.0, 0.3, 0.6, 1.0):
        few = np.array([3, 3, 3, 2, 2]) * slope
        area = float(np.mean(norm.cdf(few / 2**0.5)))

        def compare(seed: int, name: str, slope: float = slope) -> Interval:
            return getattr(against_class_sizes(draw_scores(seed, slope), sizes), name)

        yield f"Spearman, 10 classes, slope {slope}", partial(compare, name="spearman"), None
        yield f"AUROC, 10 classes, slope {slope}", partial(compare, name="auroc"), area


def pair_cases() -> Iterator[Case]:
    """Spearman of pairs without ties, and AUROC of two kinds and of two groups of members on the same classes."""

    def correlate(seed: int, count: int) -> Interval:
        x, z = torch.randn(2, count, generator=generator("pairs", seed), dtype=torch.float64)
        return spearman_interval(x.numpy(), (0.6 * x + 0.8 * z).numpy())

    for count in (6, 10, 20):
        yield f"Spearman, {count} pairs", partial(correlate, count=count), None
    for count in (20, 100):

        def separate(seed: int, count: int = count) -> Interval:
            values = torch.randn(2 * count, generator=generator("two kinds", seed), dtype=torch.float64)
            values[:count] += 1
            return auroc_interval(values.numpy(), np.arange(2 * count) < count)

        yield f"AUROC, {count} of each kind", separate, float(norm.cdf(0.5**0.5))

    def draw_groups(seed: int) -> Tensor:
        level, *own = torch.randn(3, 10, generator=generator("groups", seed), dtype=torch.float64)
        return torch.stack([level + 0.5 * own[0], level + 0.5 * own[1] + 0.5], 1)

    def detect(seed: int) -> Interval:
        return auroc_interval(draw_groups(seed).flatten().numpy(), np.arange(20) % 2 == 1)

    def divide(seed: int) -> Interval:
        below, above = draw_groups(seed).exp().T.numpy()
        return ratio_interval(above, below)

    yield "AUROC, two groups of members on 10 classes", detect, float(norm.cdf(0.5 / 2.5**0.5))
    yield "ratio, two groups of members on 10 classes", divide, float(np.exp(0.5))


def share_cases() -> Iterator[Case]:
    """Share of the samples of five members that are recognised, at noises that they have in common."""
    for share in (0.7, 0.95):
        edge = float(norm.ppf(share))
        for alike in (0.0, 0.5, 0.9):
            for noises in (8, 20):

                def recognise(seed: int, edge: float = edge, alike: float = alike, noises: int = noises) -> Interval:
                    source = generator("recognised", seed)
                    common = torch.randn(noises, generator=source, dtype=torch.float64)
                    own = torch.randn(5, noises, generator=source, dtype=torch.float64)
                    return clustered_share_interval(alike**0.5 * common + (1 - alike) ** 0.5 * own < edge)

                yield f"recognised, share {share}, {noises} noises, correlation {alike}", recognise, share


def tabulate_coverage(
    name: str, measure: Callable[[int], Interval], truth: float | None, repeats: int
) -> dict[str, object]:
    """Return a row: how many of `repeats` intervals hold the truth, of those that have ends."""
    every = [measure(seed) for seed in range(repeats)]
    found = [one for one in every if one.known]
    target = float(np.mean([one.estimate for one in every])) if truth is None else truth
    covered = sum(one.low <= target <= one.high for one in found) / max(1, len(found))
    spread = float(np.std([one.estimate for one in every], ddof=1))
    half = float(np.mean([one.width / 2 for one in found])) if found else float("nan")
    return {
        "interval": name,
        "nominal": 0.95,
        "covers": round(covered, 3),
        "with an interval": f"{len(found)} of {repeats}",
        "half width / true s.d.": round(half / spread, 2) if spread else None,
    }


def tabulate_promise(name: str, nominal: float, holds: Callable[[int], bool | None], repeats: int) -> dict[str, object]:
    """Return a row: how often a promise holds among the repeats that make one (others give None)."""
    found = [one for one in map(holds, range(repeats)) if one is not None]
    return {
        "interval": name,
        "nominal": nominal,
        "covers": round(sum(found) / max(1, len(found)), 3),
        "with an interval": f"{len(found)} of {repeats}",
        "half width / true s.d.": None,
    }
