"""A benchmark on disk: its tables and pictures, and the part of the page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.benchmark.measures import HALF
from ldm.benchmark.outcome import DETECTION, LEFT_OUT_REALS, OTHER_DATA, PICTURE_RANKS, PIXEL_RANKS, Outcome
from ldm.benchmark.table import MethodResult
from ldm.files import read_mapping
from ldm.records import Row
from ldm.report.page import Code, PageTable, Picture, Section, Text
from ldm.report.plots import Curve, curve_plot
from ldm.report.ranking import RankedClass, ranked_plot
from ldm.report.tables import read_csv, write_csv
from ldm.util import atomic_write

BENCHMARK_JSON = "benchmark.json"
# Benchmarks that have a picture: its file, and what its axis says.
PLOTS = {
    PICTURE_RANKS: ("picture_ranks.png", "rank correlation of pictures with the oracle's variance"),
    PIXEL_RANKS: ("pixel_ranks.png", "rank correlation of pixels with the oracle's variance"),
    DETECTION: ("detection.png", "AUROC of classes with few images, minus the control's"),
    LEFT_OUT_REALS: ("left_out.png", "AUROC of real images of a class that was left out, minus the control's"),
    OTHER_DATA: ("other_data.png", "AUROC of other data, mean over the sets"),
    "AUSE": ("ause.png", "AUSE: error left by the map's order, minus that left by the errors' own"),
}
# Columns of the noise levels that have a picture: its file, what its axis says, and whether it is logarithmic.
LEVEL_PLOTS = {
    "ratio": ("level_ratios.png", "variance of the predicted clean data, over the oracle's", True),
    "picture ranks": ("level_ranks.png", "rank correlation of pictures with the oracle's variance", False),
}
TABLES = {
    "leaders.csv": "Who is in front, question by question, beside chance and beside half of the oracle's networks",
    "overview.csv": "Every method: mean over seeds, ± half of Student's 95 % interval over seeds",
    "levels.csv": "Is the last layer enough? Variances of predicted clean data at nine noise levels, over the oracle's",
    "averaging.csv": "One member, and the members' scores averaged: gains with Student's 95 % over seeds and Holm's p",
    "plane.csv": "Oracle 0, Gaussian classes in the plane: both truths in closed form",
    "costs.csv": "What a method costs beside the base network, and the command of its first cell",
    "benchmark.csv": "Every method under every benchmark, with both intervals and Holm's p",
}
FIRST = ("leaders.csv", "overview.csv")
HOW_TO_READ = (
    "The oracle is the variance of a picture at fixed noise over networks trained from scratch on bootstrapped images; "
    "its row holds one half of them to the other half, which is what its own noise lets anybody reach.",
    "value, low and high are the mean over seeds and Student's 95 % interval over them; pictures_low and pictures_high "
    "come from drawing the pictures again at these trainings. Best, and better than the nearest neighbour, are said of "
    "the interval over seeds alone, after Holm's correction for the number of methods.",
    "Few-image detection asks for the classes that have few images; the control asks the same of networks for which "
    "these classes have all images, where only the look of the classes is left: there 0.5 is right. A score that finds "
    "them in the control as well knows the classes and not their number of images.",
    "Left out: networks that never saw one class are asked about it, by its pictures and by real images that are "
    "noised again; the control asks the same of networks that saw it. Other data (held-back images turned, inverted "
    "and blurred, patches of photographs, and sets of the config) are held to real images of the trained classes; a "
    "score that is no uncertainty, such as the distance to the training images, may find them best.",
    "A method that loses is in every table. Nothing was tuned on these pictures but what the config says.",
)


def write_outcome(outcome: Outcome, out: Path) -> None:
    """Write benchmark.csv and .json, the other tables and the pictures, in place of earlier ones."""
    rows = [result.row() for result in outcome.results]
    notes = [*outcome.sentences, *[f"{name}: {words}" for name, words in outcome.meanings.items()]]
    write_csv(out / "benchmark.csv", rows, notes, overwrite=True)
    write_csv(out / "leaders.csv", outcome.leaders, ["means over seeds, ± half of Student's 95 %"], overwrite=True)
    write_csv(out / "overview.csv", outcome.overview, outcome.sentences, overwrite=True)
    if outcome.costs:
        write_csv(out / "costs.csv", outcome.costs, overwrite=True)
    write_csv(out / "levels.csv", outcome.levels, ["means over seeds, Student's 95 %"], overwrite=True)
    write_csv(out / "averaging.csv", outcome.averaging, ["gain is positive where averaging is better"], overwrite=True)
    for column, (file, label, log) in LEVEL_PLOTS.items():
        draw_levels(outcome.levels, column, out / file, label, log)
    write_csv(out / "plane.csv", outcome.plane, ["means over 20 drawings of classes, Student's 95 %"], overwrite=True)
    content = {"sentences": list(outcome.sentences), "meanings": dict(outcome.meanings), "rows": rows}
    with atomic_write(out / BENCHMARK_JSON, overwrite=True) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    for name, (file, label) in PLOTS.items():
        own = [one for one in outcome.results if one.benchmark == name]
        if own:
            draw_methods(own, out / file, label)


def draw_methods(results: Sequence[MethodResult], path: Path, label: str) -> None:
    """Draw the methods of one benchmark with their intervals over seeds, or over pictures where a seed is alone."""
    shown = []
    for one in results:
        ends = one.value if one.value.known else one.pictures
        name = one.method if one.method == HALF else f"{one.method} ({one.kind})"
        low, high = (ends.low, ends.high) if ends.known else (None, None)
        shown.append(RankedClass(name, None, one.value.estimate, low, high))
    words = "95 % over seeds" if results[0].value.known else "95 % over pictures, one seed"
    ranked_plot(shown, path, label, words, overwrite=True)


def draw_levels(rows: Sequence[Row], column: str, path: Path, label: str, log: bool) -> None:
    """Draw a column of the noise levels, a curve for each posterior, with the intervals over seeds."""
    curves = {}
    for name in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == name]
        x, y, low, high = (
            [row[key] for row in own] for key in ("share of noise", column, f"{column}, low", f"{column}, high")
        )
        curves[name] = Curve(x, y) if math.isnan(low[0]) else Curve(x, y, low, high)
    curve_plot(curves, path, "share of noise, sigma / (alpha + sigma)", label, log=log, overwrite=True)


def benchmark_sections(folder: Path) -> tuple[list[str], list[Section], set[Path]]:
    """Return what a page says and shows of a benchmark in a folder, and the files that this shows."""
    file = folder / BENCHMARK_JSON
    if not file.exists():
        return [], [], set()
    content = read_mapping(file, "a benchmark's results", "start decu benchmark again", ("meanings", "sentences"))
    pictures = [folder / name for name in _captions() if (folder / name).exists()]
    tables = [name for name in TABLES if (folder / name).exists()]
    sections = [Section("Who follows the oracle", _show_tables(folder, [name for name in tables if name in FIRST]))]
    sections.append(Section("Methods side by side", [Picture(path, _captions()[path.name]) for path in pictures]))
    sections.append(Section("More tables", _show_tables(folder, [name for name in tables if name not in FIRST])))
    meanings = [f"{name}: {words}" for name, words in content["meanings"].items()]
    reading: list[Any] = [Text(words) for words in HOW_TO_READ]
    sections.append(Section("How a benchmark is read", [*reading, Code("What each number is", "\n".join(meanings))]))
    return content["sentences"], sections, {*pictures, *(folder / name for name in tables)}


def _captions() -> dict[str, str]:
    """Return {file of a picture: what it shows}."""
    ranked = {file: f"{label[0].upper()}{label[1:]}; dots are means over seeds." for file, label in PLOTS.values()}
    levels = {
        file: f"{label[0].upper()}{label[1:]}, at nine levels of noise; bands are 95 % over seeds."
        for file, label, _ in LEVEL_PLOTS.values()
    }
    return ranked | levels


def _show_tables(folder: Path, names: Sequence[str]) -> list[Any]:
    found = []
    for name in names:
        rows = read_csv(folder / name, ())
        found.append(PageTable(list(rows[0]), rows, TABLES[name]))
    return found
