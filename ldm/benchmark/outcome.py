"""What a benchmark found, as values: results, tables, and the sentences that they bear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.benchmark.averaging import compare_averaging
from ldm.benchmark.cells import ORACLES, RETRAINED
from ldm.benchmark.detections import make_detections
from ldm.benchmark.images import KNOWN_CLASSES, LEFT_OUT_CLASS
from ldm.benchmark.levels import compare_levels
from ldm.benchmark.measures import HALF, SeedScores, make_benchmarks
from ldm.benchmark.plan import AVERAGING_STUDY, LEVELS_STUDY, BenchmarkPlan
from ldm.benchmark.plane import measure_plane
from ldm.benchmark.settings import EVERY_IMAGE, FEW_IMAGES, World
from ldm.benchmark.table import NEIGHBOUR_NAME, MethodResult, compare_methods, make_overview, show
from ldm.records import Row
from ldm.wording import count_noun

PIXEL_RANKS = f"pixel ranks: {RETRAINED}, few images"
PICTURE_RANKS = f"picture ranks: {RETRAINED}, few images"
RATIO = f"ratio: {RETRAINED}, few images"
DETECTION = "few-image AUROC minus control"
LEFT_OUT_PICTURES = "left-out class, pictures: AUROC minus control"
LEFT_OUT_REALS = "left-out class, real images: AUROC minus control"
OTHER_DATA = "other data, mean: AUROC"
# Columns of the costs: fields of `MethodCost`, and the unit in which they are written.
COST_COLUMNS = {
    "evaluations a picture": ("evaluations", 1),
    "seconds of all pictures": ("seconds", 1),
    "seconds of training beside the base": ("train_seconds", 1),
    "KiB kept beside the base": ("disk_bytes", 2**10),
    "MiB of tensors at once": ("memory_bytes", 2**20),
}
# Below this share of recognised pictures the page warns.
LEAST_RECOGNISED = 0.5
OVERVIEW = (PIXEL_RANKS, PICTURE_RANKS, RATIO, "few-image AUROC", "few-image AUROC, control", DETECTION,
            LEFT_OUT_PICTURES, LEFT_OUT_REALS, OTHER_DATA, "AUSE", "recognised, a fifth dropped",
            "FD gain, a fifth dropped", "ranks over numbers of steps")  # fmt: skip
LEADERS = (PICTURE_RANKS, PIXEL_RANKS, DETECTION, LEFT_OUT_PICTURES, LEFT_OUT_REALS, OTHER_DATA, "AUSE",
           "recognised, a fifth dropped", "FD gain, a fifth dropped", "ranks over numbers of steps")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found.

    Attributes:
        results: every method under every benchmark.
        overview: a row a method.
        costs: a row a method: evaluations, seconds, bytes.
        plane: the rows of oracle 0.
        levels: a row for each posterior and noise level.
        averaging: a row for each ensemble, world and metric.
        leaders: a row for each question: who is in front, the next, and what bounds them.
        sentences: what may be said.
        meanings: {benchmark: what its number is}.
    """

    results: Sequence[MethodResult]
    overview: Sequence[Row]
    costs: Sequence[Row]
    plane: Sequence[Row]
    levels: Sequence[Row]
    averaging: Sequence[Row]
    leaders: Sequence[Row]
    sentences: Sequence[str]
    meanings: Mapping[str, str]


def make_outcome(plan: BenchmarkPlan) -> Outcome:
    """Return what the seeds whose cells are all there say.

    Raises:
        ValueError: if no seed is whole.
    """
    numbers = [seed for seed in range(plan.settings.seeds) if plan.is_whole(seed)]
    seeds = [one for one in map(plan.read_seed, numbers) if one is not None]
    if not seeds:
        raise ValueError(f"no seed of {plan.out} has all of its cells: start the command without --only")
    others = [name for name in plan.images.real_sets(plan.settings, 0) if name not in (KNOWN_CLASSES, LEFT_OUT_CLASS)]
    benchmarks = [*make_benchmarks(ORACLES), *make_detections(others)]
    labels = plan.problem(World(FEW_IMAGES, 0)).labels
    results = compare_methods(benchmarks, seeds, labels)
    plane = measure_plane()
    levels = compare_levels([plan.read_study(LEVELS_STUDY, FEW_IMAGES, seed) for seed in numbers])
    worlds = {
        data: [plan.read_study(AVERAGING_STUDY, data, seed) for seed in numbers] for data in (FEW_IMAGES, EVERY_IMAGE)
    }
    averaging = compare_averaging(worlds, plan.judge, labels)
    leaders = [_find_leader(name, [one for one in results if one.benchmark == name]) for name in LEADERS]
    leaders = [row for row in leaders if row]
    sentences = [describe_pictures(seeds), *describe_results(results, len(seeds), plan, leaders)]
    sentences += [*describe_kinds(results, plane), *describe_levels(levels), describe_averaging(averaging)]
    sentences += [f"{name} is not in the tables; {reason}." for name, reason in plan.gaps.items()]
    meanings = {one.name: " ".join(one.meaning.split()) for one in benchmarks}
    overview = [*make_overview(results, OVERVIEW), *list_gaps(plan)]
    return Outcome(results, overview, list_costs(seeds), plane, levels, averaging, leaders, sentences, meanings)


def list_gaps(plan: BenchmarkPlan) -> list[Row]:
    """Return a row of the overview for each method that cannot be run here, which says why."""
    kinds = {method.name: method.kind for method in plan.methods}
    return [
        {"method": name, "kind": kinds[name], OVERVIEW[0]: reason, **dict.fromkeys(OVERVIEW[1:], "")}
        for name, reason in plan.gaps.items()
    ]


def list_costs(seeds: Sequence[SeedScores]) -> list[Row]:
    """Return a row a method of what it costs: means over the worlds, beside the base network; empty where not known.

    What scores made elsewhere have cost is not known.
    """
    rows: list[Row] = []
    for name, cell in seeds[0].cells[FEW_IMAGES].items():
        own: list[Mapping[str, Any]] = [
            seed.cells[data][name].record.get("cost", {}) for seed in seeds for data in (FEW_IMAGES, EVERY_IMAGE)
        ]
        row: Row = {"method": name, "kind": cell.kind}
        for column, (key, unit) in COST_COLUMNS.items():
            row[column] = float(np.mean([one[key] for one in own])) / unit if all(own) else ""
        rows.append({**row, "command": cell.record.get("command", "")})
    return rows


def describe_results(
    results: Sequence[MethodResult], seeds: int, plan: BenchmarkPlan, leaders: Sequence[Row]
) -> list[str]:
    """Say who wins what, where the intervals bear it, and where none does."""
    settings = plan.settings
    said = [
        f"{settings.retrainings} networks were trained from scratch on bootstrapped images at each of "
        f"{count_noun(seeds, 'seed')}; {10 * settings.noises} pictures of each are compared. "
        "An interval is Student's 95 % over seeds, written ± half its width."
    ]
    if seeds < 3:
        said.append(
            f"With {count_noun(seeds, 'seed')} nothing is said to be best: intervals over trainings need at least 3."
        )
    best = [f"{row['in front']} ({row['question']}, {row['value']})" for row in leaders if row["best"]]
    said.append(
        f"Of {len(leaders)} questions, best beyond the intervals over seeds: {'; '.join(best)}."
        if best
        else f"Of {len(leaders)} questions none has a method that is best beyond the intervals over seeds."
    )
    beating = [one for one in results if one.benchmark == DETECTION and one.beats_neighbour]
    neighbour = next((one for one in results if (one.benchmark, one.method) == (DETECTION, NEIGHBOUR_NAME)), None)
    if neighbour is not None:
        said.append(_say_neighbour(beating, neighbour))
    return said


def describe_pictures(seeds: Sequence[SeedScores]) -> str:
    """Say whether the pictures are digits at all: what is uncertain about noise is no finding."""
    shares = [float(np.mean([seed.recognised[data].mean() for seed in seeds])) for data in (FEW_IMAGES, EVERY_IMAGE)]
    words = f"Of the base networks' pictures {shares[0]:.0%} are recognised with few images, {shares[1]:.0%} with all."
    if min(shares) < LEAST_RECOGNISED:
        words += " That is too few for what follows to say anything of digits: train longer (benchmark.steps)."
    return words


def _say_neighbour(beating: Sequence[MethodResult], neighbour: MethodResult) -> str:
    """Say which methods find classes with few images better than the nearest neighbour."""
    if not beating:
        return (
            f"No method finds classes with few images better than the nearest neighbour ({show(neighbour.value)} over "
            "its control) beyond the interval over seeds, after Holm's correction."
        )
    names = ", ".join(f"{one.method} ({show(one.value)})" for one in beating)
    return (
        f"Better than the nearest neighbour ({show(neighbour.value)}) at classes with few images, beyond the interval "
        f"over seeds and after Holm's correction: {names}."
    )


def _find_leader(name: str, own: Sequence[MethodResult]) -> Row:
    """Return who leads a benchmark and whether it is best; empty where no method has its number."""
    ranked = sorted(
        (one for one in own if one.kind != "oracle"),
        key=lambda one: one.value.estimate if name != "AUSE" else -one.value.estimate,
        reverse=True,
    )
    if not ranked:
        return {}
    first, second = ranked[0], ranked[min(1, len(ranked) - 1)]
    by = {one.method: show(one.value) for one in own}
    return {
        "question": name,
        "in front": first.method,
        "value": show(first.value),
        "best": first.best,
        "next": second.method,
        "its value": show(second.value),
        "random": by.get("random", ""),
        HALF: by.get(HALF, ""),
    }


def describe_kinds(results: Sequence[MethodResult], plane: Sequence[Row]) -> list[str]:
    """Say whether the two kinds are told apart: what each knows of the number of images, in digits and in the plane."""
    said = []
    for kind in ("epistemic", "aleatoric"):
        few, control = (
            [one.value.estimate for one in results if one.benchmark == name and one.kind == kind]
            for name in ("few-image AUROC", "few-image AUROC, control")
        )
        own = [row for row in plane if row["kind"] == kind]
        if not few or not own:
            continue
        areas = [row["few-point AUROC"] for row in own]
        ranks = [row["ranks, Cov(x0 | x)"] for row in own]
        said.append(
            f"{kind.capitalize()} methods, {len(few)} on digits: AUROC of classes with few images {min(few):.2f} to "
            f"{max(few):.2f}, in the control {min(control):.2f} to {max(control):.2f}; {len(own)} in the plane: "
            f"{min(areas):.2f} to {max(areas):.2f}, and rank correlation with Cov(x0 | x) {min(ranks):.2f} to "
            f"{max(ranks):.2f}."
        )
    return said


def describe_levels(rows: Sequence[Row]) -> list[str]:
    """Say how wide posteriors of the last layer and of more are, at single noise levels: the least and the largest."""
    said = []
    for name in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == name]
        ratios, ranks = ([row[column] for row in own] for column in ("ratio", "picture ranks"))
        said.append(f"{name} {min(ratios):.2g} to {max(ratios):.2g} ({min(ranks):.2f} to {max(ranks):.2f})")
    words = "At nine noise levels, variance of predicted clean data over the oracle's (rank correlation of pictures): "
    return [f"{words}{'; '.join(said)}."] if said else []


def describe_averaging(rows: Sequence[Row]) -> str:
    """Say what averaged members improve beyond the interval over seeds."""
    better: dict[str, list[str]] = {}
    for row in rows:
        if row["better"]:
            better.setdefault(f"{row['ensemble']} ({row['images']} images)", []).append(str(row["metric"]))
    words = "; ".join(f"{name}: {', '.join(metrics)}" for name, metrics in better.items()) or "nothing"
    return f"Of {len(rows)} comparisons averaged members improve, beyond the interval after Holm's correction, {words}."
