"""How often do the intervals cover? Every interval that the project prints, on laws whose answer is known.

    python benchmarks/coverage.py --repeats 400

Nominal is 95 %. A metric of samples is to cover what repeated draws of as many samples give on average (FID's and IS's
bias is not an interval's matter); a mean, a rank correlation and an AUROC the value of the law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor
from tqdm import tqdm

from ldm.commands.line import run_file
from ldm.evaluation.cmmd import cmmd, cubic_kernel, gram_within, mmd2
from ldm.evaluation.detection import against_class_sizes
from ldm.evaluation.fid import fid
from ldm.evaluation.inception_score import measure_inception_scores
from ldm.evaluation.precision_recall import density_coverage, precision_recall, squared_radii
from ldm.evaluation.statistics import moments
from ldm.experiments.controls import over_runs
from ldm.report.tables import markdown_table
from ldm.stats import Interval, look_level, mean_interval, skewed_mean_interval
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


def score_cases() -> Iterator[Case]:
    """Inception Scores: as published, of as many images; and corrected, of the law."""
    for classes, count in ((10, 500), (100, 5000)):
        many = draw_predictions(40_000, 99, classes)
        truth = measure_inception_scores(many, 20).corrected.estimate

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


def draw_values(law: str, count: int, seed: int) -> np.ndarray:
    """Draw values of a law with mean 1."""
    source = generator("values", law, seed)
    if law == "normal":
        return (1 + 0.3 * torch.randn(count, generator=source, dtype=torch.float64)).numpy()
    if law == "exponential":
        return -torch.rand(count, generator=source, dtype=torch.float64).log().numpy()
    return (torch.randn(count, generator=source, dtype=torch.float64) - 0.5).exp().numpy()


def stop_when_narrow(law: str, count: int, width: float, seed: int) -> Interval:
    """Add rounds of `count` values until the interval is narrow enough, or there are 200."""
    values = draw_values(law, 200, seed)
    look = 1
    while True:
        found = skewed_mean_interval(values[: look * count], look_level(look))
        if found.width <= width or look * count >= len(values):
            return found
        look += 1


def mean_cases() -> Iterator[Case]:
    """Means over runs, over noises, and over noises that are added until the interval is narrow."""
    for count in (2, 3, 5):
        yield f"over {count} runs", lambda seed, n=count: over_runs(list(draw_values("normal", n, seed))), 1.0
    for law in ("normal", "exponential", "lognormal"):
        for count in (6, 10, 40):
            yield f"Student, {count} {law}", lambda seed, k=law, n=count: mean_interval(draw_values(k, n, seed)), 1.0
            name = f"MI over noises, {count} {law}"
            yield name, lambda seed, k=law, n=count: skewed_mean_interval(draw_values(k, n, seed)), 1.0
        width = 0.2 if law == "normal" else 0.8
        yield f"--ci_width, rounds of 10, {law}", partial(stop_when_narrow, law, 10, width), 1.0


def tabulate(name: str, measure: Callable[[int], Interval], truth: float | None, repeats: int) -> dict[str, object]:
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
        "half width / true s.d.": round(half / spread, 2),
    }


@dataclass(frozen=True)
class StudyCoverage:
    """Simulate every interval and tabulate nominal against actual coverage."""

    repeats: int = 200
    """Simulations of each case."""

    def run(self) -> list[dict[str, object]]:
        """Print the table; return its rows."""
        cases = [*mean_cases(), *class_cases(), *score_cases()]
        for count, shift in ((100, 0.0), (400, 0.0), (400, 0.15)):
            cases += feature_cases(count, shift)
        rows = [tabulate(*case, self.repeats) for case in tqdm(cases, unit="interval")]
        print(markdown_table(rows, 3))
        return rows


if __name__ == "__main__":
    run_file(StudyCoverage)
