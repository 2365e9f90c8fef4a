"""The table: every method under every benchmark, with intervals over trainings and over pictures, and what they bear.

Two intervals answer two questions. Over seeds (Student's, of trainings, classes with few images and noises): would it
come out so again? Over pictures (drawn again class by class, the same for every method): is it chance of the noises at
these trainings? "Best" and "beats the nearest neighbour" are said of the first, after Holm's correction for the number
of methods, and not where a seed is alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from ldm.benchmark.cells import RETRAINED, ScoreCell
from ldm.benchmark.measures import HALF, Benchmark, SeedScores, draw_pictures
from ldm.benchmark.settings import EVERY_IMAGE, FEW_IMAGES
from ldm.experiments.controls import over_runs
from ldm.records import Row
from ldm.stats import Interval, holm, mean_interval, percentile_interval
from ldm.util import generator

NEIGHBOUR_NAME = "nearest neighbour"
RESAMPLES = 60
LEVEL = 0.05


@dataclass(frozen=True)
class MethodResult:
    """A method under one benchmark.

    Attributes:
        benchmark, method, kind: their names.
        value: mean over seeds, with Student's interval over them.
        pictures: the same estimate, with the interval over pictures drawn again; no ends where it has none.
        seeds: the value of each seed.
        over_neighbour: how much better than the nearest neighbour, mean and interval over seeds; larger is better.
        over_neighbour_pictures: the same, with the interval over pictures.
        p: Holm's p of the difference being 0, among all methods of the benchmark.
        best: whether it is better than every other method, each p (Holm) below 0.05.
    """

    benchmark: str
    method: str
    kind: str
    value: Interval
    pictures: Interval
    seeds: tuple[float, ...]
    over_neighbour: Interval | None = None
    over_neighbour_pictures: Interval | None = None
    p: float = math.nan
    best: bool = False

    @property
    def beats_neighbour(self) -> bool:
        """Whether it is better than the nearest neighbour beyond the interval over seeds, after Holm's correction."""
        return self.over_neighbour is not None and self.over_neighbour.estimate > 0 and self.p < LEVEL

    def row(self) -> Row:
        """Return the result for a table."""
        over, seen = (one or Interval(math.nan) for one in (self.over_neighbour, self.over_neighbour_pictures))
        return {
            "benchmark": self.benchmark,
            "method": self.method,
            "kind": self.kind,
            "value": self.value.estimate,
            "low": self.value.low,
            "high": self.value.high,
            "pictures_low": self.pictures.low,
            "pictures_high": self.pictures.high,
            "seeds": self.value.n,
            "each_seed": " ".join(f"{value:.4g}" for value in self.seeds),
            "over_neighbour": over.estimate,
            "over_neighbour_low": over.low,
            "over_neighbour_high": over.high,
            "over_neighbour_pictures_low": seen.low,
            "over_neighbour_pictures_high": seen.high,
            "p_holm": self.p,
            "beats_neighbour": self.beats_neighbour,
            "best": self.best,
        }


@dataclass(frozen=True)
class _Values:
    """Of one method under one benchmark: values of the seeds [S], and of pictures drawn again [S, R]."""

    seeds: NDArray[np.float64]
    drawn: NDArray[np.float64] | None


def add_halves(seed: SeedScores) -> SeedScores:
    """Add the oracle itself as a method: one half of the retrained networks, which is held to the other half."""
    cells = {data: dict(own) for data, own in seed.cells.items()}
    for data, own in cells.items():
        half = seed.oracles[data][RETRAINED].pictures[::2].double().var(0)
        own[HALF] = ScoreCell(HALF, "oracle", "variance", half.sum(1), half.float(), {})
    return replace(seed, cells=cells)


def compare_methods(
    benchmarks: Sequence[Benchmark], seeds: Sequence[SeedScores], labels: torch.Tensor, resamples: int = RESAMPLES
) -> list[MethodResult]:
    """Return every method under every benchmark that it has a number of, in the order of the benchmarks.

    Args:
        seeds: what each seed gave; methods that a seed lacks are left out.
        labels: classes of the pictures [B].
    """
    whole = [add_halves(seed) for seed in seeds]
    methods = [
        name
        for name in whole[0].cells[FEW_IMAGES]
        if all(name in seed.cells[data] for seed in whole for data in (FEW_IMAGES, EVERY_IMAGE))
    ]
    kinds = {name: whole[0].cells[FEW_IMAGES][name].kind for name in methods}
    drawn = [
        [draw_pictures(labels, generator("pictures", number, k)) for k in range(resamples)]
        for number in range(len(whole))
    ]
    found = []
    for benchmark in benchmarks:
        values = {}
        for name in methods:
            own = _measure(benchmark, whole, name, np.arange(len(labels)), drawn)
            if own is not None:
                values[name] = own
        found += _compare(benchmark, values, kinds)
    return found


def _measure(
    benchmark: Benchmark,
    seeds: Sequence[SeedScores],
    method: str,
    every: NDArray[np.int64],
    drawn: Sequence[Sequence[NDArray[np.int64]]],
) -> _Values | None:
    values = [benchmark.measure(seed, method, every) for seed in seeds]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    again = None
    if benchmark.by_picture:
        again = np.array(
            [
                [benchmark.measure(seed, method, chosen) for chosen in own]
                for seed, own in zip(seeds, drawn, strict=True)
            ],
            dtype=np.float64,
        )
    return _Values(np.array(values, dtype=np.float64), again)


def _over_pictures(estimate: float, drawn: NDArray[np.float64] | None) -> Interval:
    """The interval of a mean over seeds [S, R] from pictures drawn again, by percentiles.

    There are no ends where all draws are alike, at an AUROC of 1 for example: other pictures need not be.
    """
    return Interval(estimate) if drawn is None else percentile_interval(estimate, drawn.mean(0))


def _compare(benchmark: Benchmark, values: Mapping[str, _Values], kinds: Mapping[str, str]) -> list[MethodResult]:
    """Return the results of one benchmark."""
    good = np.vectorize(benchmark.goodness, otypes=[float])
    scored = {name: good(own.seeds) for name, own in values.items()}
    results = []
    for name, own in values.items():
        value = over_runs(own.seeds)
        pictures = _over_pictures(value.estimate, own.drawn)
        results.append(MethodResult(benchmark.name, name, kinds[name], value, pictures, tuple(map(float, own.seeds))))
    rivals = [name for name in values if kinds[name] != "oracle"]
    if NEIGHBOUR_NAME in values:
        others = [name for name in rivals if name != NEIGHBOUR_NAME]
        tests = [paired_p(scored[name] - scored[NEIGHBOUR_NAME]) for name in others]
        p = dict(zip(others, holm(tests).tolist(), strict=True)) if others else {}
        results = [_with_neighbour(one, values, scored, p, good) for one in results]
    best = find_best({name: scored[name] for name in rivals})
    return [replace(one, best=one.method == best) for one in results]


def _with_neighbour(result: MethodResult, values, scored, p: Mapping[str, float], good) -> MethodResult:
    """Add how much better than the nearest neighbour a result is; the oracle's halves are compared without a test."""
    name = result.method
    if name == NEIGHBOUR_NAME:
        return result
    over = mean_interval(scored[name] - scored[NEIGHBOUR_NAME])
    own, other = values[name].drawn, values[NEIGHBOUR_NAME].drawn
    seen = None if own is None or other is None else _over_pictures(over.estimate, good(own) - good(other))
    return replace(result, over_neighbour=over, over_neighbour_pictures=seen, p=p.get(name, math.nan))


def paired_p(differences: NDArray[np.float64]) -> float:
    """Return Student's two-sided p of a mean difference over seeds; 1 where there is one seed, or no difference."""
    found = mean_interval(differences)
    if found.n < 2 or found.estimate == 0:
        return 1.0
    if found.sd == 0:
        return 0.0
    return float(2 * student.sf(abs(found.estimate) / found.sd * found.n**0.5, found.n - 1))


def find_best(scored: Mapping[str, NDArray[np.float64]]) -> str | None:
    """Return the method that is better than every other, each p (Holm) below 0.05; None where there is none.

    Args:
        scored: {method: values of the seeds}, larger is better.
    """
    if len(scored) < 2:
        return None
    leader = max(scored, key=lambda name: float(scored[name].mean()))
    tests = [paired_p(scored[leader] - values) for name, values in scored.items() if name != leader]
    return leader if float(np.max(holm(tests))) < LEVEL else None


def make_overview(results: Sequence[MethodResult], columns: Sequence[str]) -> list[Row]:
    """Return a row a method: its value under some benchmarks, with half of the interval over seeds; losers too."""
    methods = list(dict.fromkeys(one.method for one in results))
    by = {(one.benchmark, one.method): one for one in results}
    rows = []
    for name in methods:
        own = next(one for one in results if one.method == name)
        row: Row = {"method": name, "kind": own.kind}
        for column in columns:
            one = by.get((column, name))
            row[column] = "" if one is None else show(one.value)
        rows.append(row)
    return rows


def show(value: Interval) -> str:
    """Return an estimate with the half width of its interval, where it has one."""
    half = f" ± {value.width / 2:.2g}" if value.known else ""
    return f"{value.estimate:.3g}{half}"
