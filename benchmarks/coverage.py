"""How often do the intervals cover? Every interval that the project prints, on laws whose answer is known.

    python benchmarks/coverage.py --repeats 400

Nominal is 95 % where nothing else is said. A metric of samples is to cover what repeated draws of as many samples give
on average (FID's and IS's bias is not an interval's matter); a mean, a rank correlation and an AUROC the value of the
law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

import numpy as np
import torch
from scipy.stats import norm
from tqdm import tqdm

from ldm.benchmark.cells import RETRAINED, OracleCell, ScoreCell
from ldm.benchmark.measures import SeedScores, make_benchmarks
from ldm.benchmark.settings import EVERY_IMAGE, FEW_IMAGES
from ldm.benchmark.table import NEIGHBOUR_NAME, compare_methods
from ldm.commands.line import run_file
from ldm.evaluation.filtering import permutation_p
from ldm.evaluation.intervals import calibrate_factor, hold
from ldm.evaluation.metrics import MetricRow
from ldm.evaluation.ood import conformal_p
from ldm.evaluation.promises import SHARES, RiskLevel, promise_risk
from ldm.evaluation.trainings import band_over_trainings
from ldm.experiments.controls import over_runs
from ldm.experiments.coverage import (
    Case,
    class_cases,
    feature_cases,
    pair_cases,
    score_cases,
    share_cases,
    tabulate_coverage,
    tabulate_promise,
)
from ldm.report.tables import markdown_table
from ldm.stats import Interval, look_level, mean_interval, skewed_mean_interval
from ldm.util import generator

# A promise: its name, how often it is to hold, and whether it does in a simulation; None where nothing is promised.
PromiseCase = tuple[str, float, Callable[[int], bool | None]]
# Benchmarks of methods whose numbers have an interval over pictures, one of each kind.
OVER_PICTURES = (
    f"pixel ranks: {RETRAINED}, few images", f"picture ranks: {RETRAINED}, few images", "few-image AUROC", "AUSE",
    "recognised, a fifth dropped", "risk-coverage gain",
)  # fmt: skip
KINDS = ("means", "classes", "pairs", "shares", "pictures", "scores", "features", "promises")


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
    yield "pixels inside, 60 pictures", lambda seed: hold(*draw_errors(60, seed), 2.0).coverage, 1 - outside(2.0)


@cache
def find_picture_intervals(seed: int, each: int) -> dict[str, Interval]:
    """Return the intervals over `each` pictures of every class in one world, of a method and over a rival."""
    labels = torch.arange(10).repeat_interleave(each)
    source = generator("pictures", seed)
    of_class = torch.randn(10, generator=generator("levels"), dtype=torch.float64)[labels]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    size = (0.5 * of_class + 0.4 * draw(len(labels)))[:, None]
    deviation = (size + 0.7 * draw(len(labels), 36)).exp()
    truth = OracleCell(RETRAINED, deviation * draw(10, len(labels), 36), deviation * draw(len(labels), 36))
    found = [deviation * (noise * draw(len(labels), 36)).exp() for noise in (0.7, 1.0)]
    cells = {
        name: ScoreCell(name, "epistemic", "score", own.sum(1), own, {})
        for name, own in zip(("asked", NEIGHBOUR_NAME), found, strict=True)
    }
    good = (draw(len(labels)) + size[:, 0] < 1).numpy()
    worlds = (FEW_IMAGES, EVERY_IMAGE)
    scores = SeedScores(
        dict.fromkeys(worlds, cells), {data: {RETRAINED: truth} for data in worlds},
        (labels < 3).numpy(), dict.fromkeys(worlds, good),
    )  # fmt: skip
    chosen = [one for one in make_benchmarks([RETRAINED]) if one.name in OVER_PICTURES]
    results = compare_methods(chosen, [scores], labels)
    intervals = {}
    for one in results:
        if one.method == "asked":
            assert one.over_neighbour_pictures is not None  # both methods are in the world
            intervals[one.benchmark] = one.pictures
            intervals[f"{one.benchmark}, over a rival"] = one.over_neighbour_pictures
    return intervals


def picture_cases() -> Iterator[Case]:
    """Intervals over pictures of the table of methods, of ten classes."""
    for each in (4, 12):
        for name in find_picture_intervals(0, each):
            yield (
                f"{name}; {each} pictures a class",
                lambda seed, k=name, n=each: find_picture_intervals(seed, n)[k],
                None,
            )


def metric_cases() -> Iterator[Case]:
    """Metrics of samples of the reference's law and of a shifted one."""
    for count, shift in ((100, 0.0), (400, 0.0), (400, 0.15)):
        yield from feature_cases(count, shift)


def draw_errors(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw errors of pictures [N, 50], each with a deviation of its own, and a map that is 1 everywhere."""
    source = generator("errors", seed)
    sizes = (0.5 * torch.randn(count, 1, generator=source, dtype=torch.float64)).exp()
    return (sizes * torch.randn(count, 50, generator=source, dtype=torch.float64)).numpy(), np.ones((count, 50))


def outside(factor: float) -> float:
    """Return the share of pixels of `draw_errors`' law whose size is above a factor."""
    quantiles = (np.arange(2000) + 0.5) / 2000
    return float(np.mean(2 * norm.sf(factor / np.exp(0.5 * norm.ppf(quantiles)))))


def promise_cases() -> Iterator[PromiseCase]:
    """What is said of a further picture, sample or training, or of an error's rate."""

    def usual(seed: int) -> bool:
        values = draw_values("exponential", 100, seed)
        return bool(conformal_p(values[1:], values[:1])[0] > 0.05)

    def random_removal(seed: int) -> bool:
        value, *drawn = draw_values("normal", 21, seed).tolist()
        p = permutation_p(value, drawn, "fid")
        return p is None or p > 0.05

    def accept(seed: int, level: RiskLevel) -> bool | None:
        scores, luck = torch.rand(2, 400, generator=generator("judged", seed), dtype=torch.float64).numpy()
        found = promise_risk(scores, (luck < scores**2 / 2).astype(float), level)
        return min(found.threshold, 1.0) ** 2 / 6 <= level.risk if found.holds else None

    def bound_pixels(seed: int) -> bool:
        return outside(calibrate_factor(*draw_errors(60, seed), 0.1, 0.9)) <= 0.1

    def train_again(seed: int, count: int) -> bool:
        *values, further = draw_values("normal", count + 1, seed).tolist()
        rows = [MetricRow("fid", value, value - 0.1, value + 0.1, "", 1, 1) for value in values]
        band = band_over_trainings(rows).another
        return band.low <= further <= band.high

    for count in (3, 5):
        yield f"one further training, of {count}", 0.95, partial(train_again, count=count)
    yield "conformal p above 0.05, of 99 known pictures", 0.95, usual
    yield "p of a removal above 0.05, of 20 random ones", 0.95, random_removal
    yield "accepted samples: risk at most 0.1, 400 judged", 0.9, partial(accept, level=RiskLevel(0.1, 0.9, len(SHARES)))
    yield "pixels outside: risk at most 0.1, 60 pictures", 0.9, bound_pixels


@dataclass(frozen=True)
class StudyCoverage:
    """Simulate every interval and tabulate nominal against actual coverage."""

    repeats: int = 200
    """Simulations of each case."""
    only: tuple[str, ...] = KINDS
    """The kinds of intervals."""

    def run(self) -> list[dict[str, object]]:
        """Print the table; return its rows."""
        makers = (
            mean_cases,
            class_cases,
            pair_cases,
            share_cases,
            picture_cases,
            score_cases,
            metric_cases,
        )
        asked = [maker() for kind, maker in zip(KINDS, makers, strict=False) if kind in self.only]
        rows = [tabulate_coverage(*case, self.repeats) for case in tqdm(list(chain(*asked)), unit="interval")]
        if "promises" in self.only:
            rows += [tabulate_promise(*case, self.repeats) for case in promise_cases()]
        print(markdown_table(rows, 3))
        return rows


if __name__ == "__main__":
    run_file(StudyCoverage)
