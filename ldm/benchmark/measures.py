"""What methods are compared by: numbers of one seed, from the scores of its two worlds and the oracles' pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.benchmark.cells import RETRAINED, OracleCell, ScoreCell
from ldm.benchmark.quality import KeptPictures
from ldm.benchmark.settings import EVERY_IMAGE, FEW_IMAGES
from ldm.stats import auroc, rank_correlation, spearman

Better = Literal["high", "low", "one", "half"]
# The oracle as a method: half of the retrained networks, held to the other half.
HALF = "oracle: half of the retrained networks"
# The share of pictures that selective generation drops.
DROPPED = 0.2


@dataclass(frozen=True)
class SeedScores:
    """What one seed gave: the cells of its worlds, and the facts of the pictures.

    Attributes:
        cells: {world's data: {method: cell}}.
        oracles: {world's data: {oracle: cell}}.
        is_few: of the pictures [B], whether their class has few images in the world of few.
        recognised: {world's data: whether a classifier of real images takes the picture for its class [B]}.
        is_out: of the pictures [B], whether their class is the one that is left out in that world.
        real_sets: of the real images [R], the names of their sets.
        kept: metrics of what is left of the pictures of few images; None where they are not asked for.
        checked: positions of the pictures whose scores are compared over numbers of steps, and their own number.
        sampler_steps: the number of steps of all other pictures.
        known: numbers of every picture that were found already; they are the same however pictures are drawn again.
    """

    cells: Mapping[str, Mapping[str, ScoreCell]]
    oracles: Mapping[str, Mapping[str, OracleCell]]
    is_few: NDArray[np.bool_]
    recognised: Mapping[str, NDArray[np.bool_]]
    is_out: NDArray[np.bool_] | None = None
    real_sets: NDArray[np.str_] | None = None
    kept: KeptPictures | None = None
    checked: NDArray[np.int64] | None = None
    sampler_steps: int = 0
    known: dict[tuple[str, ...], NDArray[np.float64]] = field(default_factory=dict, compare=False)

    def remember(
        self, key: tuple[str, ...], find: Callable[[], NDArray[np.float64]], chosen: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return numbers of every picture [B], found once, at the chosen pictures."""
        if key not in self.known:
            self.known[key] = find()
        return self.known[key][chosen]


# (scores of a seed, method, positions of the pictures that count) -> a number, None where it is not defined.
Measure = Callable[[SeedScores, str, NDArray[np.int64]], float | None]


@dataclass(frozen=True)
class Benchmark:
    """One column of the table.

    Attributes:
        name: of the column.
        better: whether high or low values are good, or those near one or a half.
        measure: of one seed.
        meaning: what the number is, in a sentence.
        by_picture: whether pictures may be drawn again for an interval.
    """

    name: str
    better: Better
    measure: Measure
    meaning: str
    by_picture: bool = True

    def goodness(self, value: float) -> float:
        """Return the value so that larger is better: for a ratio minus the size of its logarithm."""
        if self.better == "one":
            return -abs(float(np.log(max(value, 1e-12))))
        if self.better == "half":
            return -abs(value - 0.5)
        return value if self.better == "high" else -value


def _find_map(seed: SeedScores, method: str, data: str) -> NDArray[np.float64] | None:
    """The map [B, D] of a method, None where it has none."""
    cell = seed.cells[data][method]
    return None if cell.map is None else cell.map.double().numpy()


def _find_truth(seed: SeedScores, method: str, data: str, oracle: str) -> NDArray[np.float64]:
    """The oracle's variances [B, D]; one half of it is held to the other."""
    cell = seed.oracles[data][oracle]
    if method == HALF and oracle == RETRAINED:
        return cell.pictures[1::2].double().var(0).numpy()
    return cell.variance.numpy()


def _sum_truth(seed: SeedScores, method: str, data: str, oracle: str, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    half = "half" if method == HALF else "whole"
    return seed.remember(("truth", half, data, oracle), lambda: _find_truth(seed, method, data, oracle).sum(1), chosen)


def pixel_ranks(data: str, oracle: str) -> Measure:
    """Spearman's correlation of pixels within a picture with the oracle's variance, mean over pictures."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        found = _find_map(seed, method, data)
        if found is None:
            return None
        key = ("pixel ranks", data, oracle, method)
        ranks = seed.remember(key, lambda: rank_correlation(found, _find_truth(seed, method, data, oracle)), chosen)
        return float(ranks.mean())

    return measure


def picture_ranks(data: str, oracle: str) -> Measure:
    """Spearman's correlation of the pictures' values with the oracle's summed variance; 0 of equal values."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        values = seed.cells[data][method].values.numpy()[chosen]
        return float(rank_correlation(values, _sum_truth(seed, method, data, oracle, chosen)))

    return measure


def variance_ratio(data: str, oracle: str) -> Measure:
    """The sum of a method's variances over the oracle's; of methods whose map is a variance of the picture."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        if seed.cells[data][method].unit != "variance":
            return None
        values = seed.cells[data][method].values.numpy()[chosen]
        return float(values.sum() / _sum_truth(seed, method, data, oracle, chosen).sum())

    return measure


def detect_few(data: str) -> Measure:
    """AUROC of the pictures of classes with few images against the others, by the values of a world."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        return auroc(seed.cells[data][method].values.numpy()[chosen], seed.is_few[chosen])

    return measure


def detect_over_control(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """AUROC in the world of few minus that of the same classes where all have all images."""
    few, control = (detect_few(data)(seed, method, chosen) for data in (FEW_IMAGES, EVERY_IMAGE))
    return None if few is None or control is None else few - control


def false_positives(values: NDArray[np.float64], positives: NDArray[np.bool_], share: float = 0.95) -> float:
    """FPR at 95 % TPR: the share of negatives at or above the value that 95 % of the positives reach."""
    threshold = np.quantile(values[positives], 1 - share, method="lower")
    return float((values[~positives] >= threshold).mean())


def false_over_control(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """FPR95 in the world of few minus that of the control."""
    few, control = (
        false_positives(seed.cells[data][method].values.numpy()[chosen], seed.is_few[chosen])
        for data in (FEW_IMAGES, EVERY_IMAGE)
    )
    return few - control


def sparsification(found: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUSE of maps [B, D] against squared errors [B, D]: 0 for the errors' own order, about 0.5 or more for chance.

    Mean over shares of the error that is left when the most uncertain pixels go, over the mean error, minus the same
    in the order of the errors themselves (Ilg et al. 2018).
    """

    def left(order: NDArray[np.int64]) -> NDArray[np.float64]:
        kept = np.take_along_axis(errors, order, 1)
        means = kept.cumsum(1) / np.arange(1, errors.shape[1] + 1)
        return means.mean(1) / np.maximum(errors.mean(1), 1e-30)

    return left(found.argsort(1, kind="stable")) - left(errors.argsort(1, kind="stable"))


def map_errors(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """AUSE: does the map say where the picture lies away from the mean of the retrained networks' pictures?"""
    found = _find_map(seed, method, FEW_IMAGES)
    if found is None:
        return None
    oracle = seed.oracles[FEW_IMAGES][RETRAINED]

    def find() -> NDArray[np.float64]:
        return sparsification(found, (oracle.base - oracle.pictures.mean(0)).square().double().numpy())

    return float(seed.remember(("AUSE", method), find, chosen).mean())


def recognition_gain(data: str) -> Measure:
    """Share recognised among the pictures left when the most uncertain fifth goes, minus the share of all."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        values = seed.cells[data][method].values.numpy()[chosen]
        good = seed.recognised[data][chosen]
        kept = values.argsort(kind="stable")[: round((1 - DROPPED) * len(values))]
        return float(good[kept].mean() - good.mean())

    return measure


def risk_gain(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """Share not recognised minus the area under risk-coverage: what random removal leaves minus what this leaves."""
    values = seed.cells[FEW_IMAGES][method].values.numpy()[chosen]
    bad = ~seed.recognised[FEW_IMAGES][chosen]
    risk = bad[values.argsort(kind="stable")].cumsum() / np.arange(1, len(bad) + 1)
    return float(bad.mean() - risk.mean())


def _find_steps(seed: SeedScores, method: str) -> dict[int, NDArray[np.float64]]:
    """{number of steps: values of the checked pictures}, empty where a method has one number of steps alone."""
    cell = seed.cells[FEW_IMAGES][method]
    if not cell.steps or seed.checked is None:
        return {}
    found = {steps: values.double().numpy() for steps, values in cell.steps.items()}
    found[seed.sampler_steps] = cell.values.numpy()[seed.checked]
    return dict(sorted(found.items()))


def step_ranks(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """The least Spearman correlation of the values of two numbers of steps, of the pictures of each."""
    values = list(_find_steps(seed, method).values())
    found = [spearman(one, other) for place, one in enumerate(values) for other in values[:place]]
    return min(found) if found and not np.isnan(found).any() else None


def step_growth(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
    """The values' sum with most steps over that with fewest, over the same ratio of the oracle; of variances."""
    values = _find_steps(seed, method)
    if not values or seed.cells[FEW_IMAGES][method].unit != "variance":
        return None
    oracle = seed.oracles[FEW_IMAGES][RETRAINED]
    pictures = {**oracle.steps, seed.sampler_steps: oracle.pictures[:, seed.checked]}
    fewest, most = min(values), max(values)
    truth = float(pictures[most].double().var(0).sum() / pictures[fewest].double().var(0).sum())
    return float(values[most].sum() / values[fewest].sum()) / truth


def make_benchmarks(oracles: Sequence[str]) -> list[Benchmark]:
    """Return the columns of the table, those of the oracles first."""
    found = []
    for oracle in oracles:
        for data, words in ((FEW_IMAGES, "few images"), (EVERY_IMAGE, "all images")):
            by = f"{oracle}, {words}"
            found += [
                Benchmark(f"pixel ranks: {by}", "high", pixel_ranks(data, oracle), str(pixel_ranks.__doc__)),
                Benchmark(f"picture ranks: {by}", "high", picture_ranks(data, oracle), str(picture_ranks.__doc__)),
                Benchmark(f"ratio: {by}", "one", variance_ratio(data, oracle), str(variance_ratio.__doc__)),
            ]
    return [*found, *OTHERS]


OTHERS = (
    Benchmark("few-image AUROC", "high", detect_few(FEW_IMAGES), str(detect_few.__doc__)),
    Benchmark(
        "few-image AUROC, control", "half", detect_few(EVERY_IMAGE), "The same of the control, where 0.5 is right."
    ),
    Benchmark("few-image AUROC minus control", "high", detect_over_control, str(detect_over_control.__doc__)),
    Benchmark("few-image FPR95 minus control", "low", false_over_control, str(false_over_control.__doc__)),
    Benchmark("AUSE", "low", map_errors, str(map_errors.__doc__)),
    Benchmark("recognised, a fifth dropped", "high", recognition_gain(FEW_IMAGES), str(recognition_gain.__doc__)),
    Benchmark("risk-coverage gain", "high", risk_gain, str(risk_gain.__doc__)),
    Benchmark("ranks over numbers of steps", "high", step_ranks, str(step_ranks.__doc__), False),
    Benchmark("growth with steps over the oracle's", "one", step_growth, str(step_growth.__doc__), False),
)


def draw_pictures(labels: torch.Tensor, source: torch.Generator) -> NDArray[np.int64]:
    """Draw n - 1 of the n pictures of each class with replacement, of labels [B] in blocks of one class each.

    So the variance over draws of a mean is that over pictures. With n draws it is (n - 1) / n of that in every class,
    too narrow where a class has few pictures. (Rao & Wu 1988, J. Am. Stat. Assoc. 83, 231-241, m = n - 1.)
    """
    drawn = []
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        drawn.append(own[torch.randint(len(own), (max(1, len(own) - 1),), generator=source)])
    return torch.cat(drawn).numpy()
