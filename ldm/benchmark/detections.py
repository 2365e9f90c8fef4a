"""Columns of the table about what is left out or foreign, and about what dropping uncertain pictures gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.benchmark.cells import RETRAINED
from ldm.benchmark.images import KNOWN_CLASSES, LEFT_OUT_CLASS
from ldm.benchmark.measures import (
    DROPPED,
    Benchmark,
    Better,
    Measure,
    SeedScores,
    false_positives,
    picture_ranks,
    variance_ratio,
)
from ldm.benchmark.quality import PICTURE_METRICS
from ldm.benchmark.settings import CLASS_LEFT_OUT, EVERY_IMAGE, FEW_IMAGES
from ldm.stats import auroc

# (values of a score, which are positive) -> a number.
Detection = Callable[[NDArray[np.float64], NDArray[np.bool_]], float]
DETECTIONS: dict[str, Detection] = {"AUROC": auroc, "FPR95": false_positives}


def left_out(make: Callable[[str, str], Measure]) -> Measure:
    """Return a measure of the world without one class; None of methods that have no scores of it."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        if method not in seed.cells.get(CLASS_LEFT_OUT, {}):
            return None
        return make(CLASS_LEFT_OUT, RETRAINED)(seed, method, chosen)

    return measure


def detect_left_out(detection: Detection) -> Measure:
    """Pictures of the class that was left out against all others, minus the same where no class is left out."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        cells = [seed.cells.get(data, {}).get(method) for data in (CLASS_LEFT_OUT, EVERY_IMAGE)]
        if cells[0] is None or cells[1] is None or seed.is_out is None:
            return None
        without, control = (
            detection(cell.values.numpy()[chosen], seed.is_out[chosen]) for cell in cells if cell is not None
        )
        return without - control

    return measure


def find_reals(seed: SeedScores, method: str, data: str, name: str, detection: Detection) -> float | None:
    """A detection of a set of real images against real images of the trained classes, by the values of a world."""
    cell = seed.cells.get(data, {}).get(method)
    if cell is None or cell.reals is None or seed.real_sets is None:
        return None
    asked = np.isin(seed.real_sets, (KNOWN_CLASSES, name))
    return detection(cell.reals.double().numpy()[asked], seed.real_sets[asked] == name)


def detect_reals(data: str, detection: Detection) -> Measure:
    """Real images, noised again, of the class that was left out against those of other classes."""
    return lambda seed, method, chosen: find_reals(seed, method, data, LEFT_OUT_CLASS, detection)


def detect_reals_over_control(detection: Detection) -> Measure:
    """The same where the class was left out minus where it was trained."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        without, control = (
            find_reals(seed, method, data, LEFT_OUT_CLASS, detection) for data in (CLASS_LEFT_OUT, EVERY_IMAGE)
        )
        return None if without is None or control is None else without - control

    return measure


def detect_other(name: str, detection: Detection) -> Measure:
    """Other data, noised again, against held-back images of the trained classes, by networks of all images."""
    return lambda seed, method, chosen: find_reals(seed, method, EVERY_IMAGE, name, detection)


def detect_every_other(names: Sequence[str], detection: Detection) -> Measure:
    """The mean over all sets of other data."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        found = [find_reals(seed, method, EVERY_IMAGE, name, detection) for name in names]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if len(known) == len(names) else None

    return measure


def quality_gain(place: int, sign: int) -> Measure:
    """A metric of the pictures that are left when the most uncertain fifth goes, over that of a random fifth."""

    def measure(seed: SeedScores, method: str, chosen: NDArray[np.int64]) -> float | None:
        if seed.kept is None:
            return None
        values = seed.cells[FEW_IMAGES][method].values.numpy()
        kept = round((1 - DROPPED) * len(values))
        order = torch.from_numpy(values.argsort(kind="stable")[:kept])
        every = np.arange(len(PICTURE_METRICS))
        pictures = seed.kept
        random = seed.remember(("random removal",), lambda: pictures.at_random(kept), every)
        own = seed.remember(("removal", method), lambda: pictures.values(order), every)
        return float(sign * (own[place] - random[place]))

    return measure


def make_detections(others: Sequence[str]) -> list[Benchmark]:
    """Return the columns; `others` are the names of the sets of other data."""
    by = f"{RETRAINED}, a class left out"
    over = "left-out class, pictures: AUROC minus control"
    found = [
        Benchmark(f"picture ranks: {by}", "high", left_out(picture_ranks), str(picture_ranks.__doc__)),
        Benchmark(f"ratio: {by}", "one", left_out(variance_ratio), str(variance_ratio.__doc__)),
        Benchmark(over, "high", detect_left_out(auroc), str(detect_left_out.__doc__)),
    ]
    for name, detection in DETECTIONS.items():
        better: Better = "high" if name == "AUROC" else "low"
        found += [
            Benchmark(
                f"left-out class, real images: {name}",
                better,
                detect_reals(CLASS_LEFT_OUT, detection),
                str(detect_reals.__doc__),
                False,
            ),
            Benchmark(
                f"left-out class, real images: {name} minus control",
                better,
                detect_reals_over_control(detection),
                str(detect_reals_over_control.__doc__),
                False,
            ),
            Benchmark(
                f"other data, mean: {name}",
                better,
                detect_every_other(others, detection),
                str(detect_every_other.__doc__),
                False,
            ),
        ]
        found += [
            Benchmark(
                f"other data, {other}: {name}",
                better,
                detect_other(other, detection),
                str(detect_other.__doc__),
                False,
            )
            for other in others
        ]
    for place, (metric, sign) in enumerate(PICTURE_METRICS.items()):
        words = f"{metric} gain, a fifth dropped"
        found.append(Benchmark(words, "high", quality_gain(place, sign), str(quality_gain.__doc__), False))
    return found
