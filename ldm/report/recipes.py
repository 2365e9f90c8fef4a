"""Figures of a study of trainings: averages, loss weights, guidance; drawn of the rows of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.records import Row
from ldm.report.plots import Curve, curve_plot


def make_curve(rows: Sequence[Row], x: str, y: str) -> Curve:
    """Return a curve of two columns, without a band: those of a few seeds would hide one another."""
    columns = ([row[name] for row in rows] for name in (x, y))
    return Curve(*(np.array(column, dtype=float) for column in columns))


def make_curves(rows: Sequence[Row], name: str, x: str, y: str) -> dict[str, Curve]:
    """Return a curve for each value of a column."""
    names = list(dict.fromkeys(row[name] for row in rows))
    return {str(one): make_curve([row for row in rows if row[name] == one], x, y) for one in names}


def draw_recipes(tables: Mapping[str, Sequence[Row]], folder: Path, note: str) -> None:
    """Draw FD against the width of averages, over a training, and against recall under guidance; of the tables given.

    Args:
        tables: rows of averages (images, width, FD), weights (loss weight, step, FD) and guidance (guidance,
            recall, FD).
        folder: of the pictures.
        note: a line below each title.
    """
    if "averages" in tables:
        curves = make_curves(tables["averages"], "images", "width", "FD")
        _draw(curves, folder / "averages.png", "width of the average", "Width of averaged weights", note, "images")
    if "weights" in tables:
        curves = make_curves(tables["weights"], "loss weight", "step", "FD")
        _draw(curves, folder / "weights.png", "step", "Loss weights", note, "loss weight")
    if "guidance" in tables:
        rows = [row for row in tables["guidance"] if row["guidance"] != "none"]
        curves = make_curves(rows, "guidance", "recall", "FD")
        named = {
            name: curve._replace(names=[f"{row['scale']:g}" for row in rows if row["guidance"] == name])
            for name, curve in curves.items()
        }
        _draw(named, folder / "guidance.png", "recall", "Guidance, its scale at each point", note, "guidance")


def _draw(curves: dict[str, Curve], path: Path, x: str, title: str, note: str, legend: str) -> None:
    curve_plot(curves, path, x, "FD", title, note, legend=legend, overwrite=True)
