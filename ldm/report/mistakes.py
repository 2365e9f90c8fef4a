"""Files of what samples are taken for: a table of classes, and of each class its samples above their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.evaluation.resampling import clustered_share_interval
from ldm.experiments.mistakes import ClassMistakes, RealPictures
from ldm.images import labelled_grid
from ldm.pipelines import EnsemblePipeline
from ldm.records import Row
from ldm.report.tables import check_numbers, read_csv, write_csv
from ldm.report.wording import name_class, say_class

MISTAKES_FOLDER = "mistakes"
TABLE = "mistakes.csv"
MISTAKES_EXPLAINED = (
    "recognised: samples that a support vector machine on the pixels of the training pictures takes for their class "
    "(every class with the same weight; of 100 principal components where there are more pixels); "
    "low, high: 95 % interval of the share, for the draw of the noises that all members share",
    "taken_for: the class that most of the others are taken for, and how many of them",
    "real, real_recognised: validation pictures of the class, and those of them that are recognised; the control",
    "distance: from the nearest training picture of any class, root mean square in units of -1 .. 1, median of the "
    "samples; 0 would be a copy",
)


def write_mistakes(
    out: Path, found: Sequence[ClassMistakes], real: RealPictures, pipeline: EnsemblePipeline, comments: Sequence[str]
) -> list[Row]:
    """Write mistakes.csv, and nearest_{class}.png of each class; return the rows.

    Args:
        out: the folder.
        comments: what the numbers depend on.
    """
    rows = [_make_row(one, real, pipeline) for one in found]
    write_csv(out / TABLE, rows, [*comments, *MISTAKES_EXPLAINED], overwrite=True)
    for one in found:
        _draw_nearest(out / f"nearest_{one.label}.png", one, pipeline)
    return rows


def _make_row(one: ClassMistakes, real: RealPictures, pipeline: EnsemblePipeline) -> dict[str, Any]:
    inside = torch.from_numpy(one.taken == one.label).reshape(len(one.samples), -1)
    share = clustered_share_interval(inside)
    known = real.known.get(one.label)
    return {
        "class": one.label,
        "name": pipeline.classes.name(one.label),
        "images": pipeline.classes.sizes.get(one.label),
        "samples": len(one.taken),
        "recognised": one.recognised,
        "low": share.low if share.known else None,
        "high": share.high if share.known else None,
        "taken_for": None if one.other is None else pipeline.classes.name(one.other[0]),
        "taken": None if one.other is None else one.other[1],
        "real": None if known is None else known[0],
        "real_recognised": None if known is None else known[1],
        "distance": float(np.median(one.distances)),
    }


def _draw_nearest(path: Path, one: ClassMistakes, pipeline: EnsemblePipeline) -> None:
    """Draw the first sample of each member above the training picture nearest to it, with that one's class."""
    grid = torch.stack([one.samples, one.nearest])
    names = pipeline.classes.member_names(one.label)
    columns = [f"{name}\n{pipeline.classes.name(label)}" for name, label in zip(names, one.nearest_labels, strict=True)]
    title = pipeline.classes.name(one.label)
    labelled_grid(grid, path, ["sample", "nearest\n(class below)"], columns, title, overwrite=True)


def read_mistakes(folder: Path) -> dict[int, Row]:
    """Return {class: its row} of the table in {folder}/mistakes, nothing where there is none."""
    path = folder / MISTAKES_FOLDER / TABLE
    if not path.exists():
        return {}
    rows = read_csv(path, ("class", "name", "recognised", "samples"))
    check_numbers(path, rows, ("class", "recognised", "samples"))
    return {int(row["class"]): row for row in rows}  # type: ignore[arg-type]  # numbers, as checked above


def summarise_mistakes(rows: Sequence[Row]) -> str:
    """Return what a table of mistakes says in sentences: how many samples are recognised, and the worst class."""
    right, count = sum(row["recognised"] for row in rows), sum(row["samples"] for row in rows)
    worst = min(rows, key=lambda row: row["recognised"] / row["samples"])
    words = f"A classifier of the training pictures takes {right / count:.0%} of {count:,} samples for their class"
    checked = [row for row in rows if row.get("real")]
    if checked:
        known = sum(row["real_recognised"] for row in checked)
        real = sum(row["real"] for row in checked)
        words += f" (of {real:,} real pictures that it was not trained on: {known / real:.0%})"
    if worst["recognised"] == worst["samples"]:
        return f"{words}."
    return f"{words}; it takes the fewest of {name_class(worst)}: {describe_mistakes(worst)}."


def describe_mistakes(row: Row) -> str:
    """Return what the samples of a class are taken for, in words: "3 of 80 are recognised, 60 are taken for truck"."""
    words = f"{row['recognised']} of {row['samples']} are recognised"
    if row.get("taken_for") is not None:
        words += f", {row['taken']} {'is' if row['taken'] == 1 else 'are'} taken for {say_class(row['taken_for'])}"
    return words
