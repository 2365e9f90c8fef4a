"""The figure of what more pictures of a class would bring, beside what is known without a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ldm.images import save_figure
from ldm.records import Row
from ldm.report.plots import COLOURS

# Classes drawn at most, the most valuable ones.
MOST_CLASSES = 20


def draw_values(table: Sequence[Row], path: Path, note: str) -> None:
    """Draw four panels over the classes: falls of loss and information at the largest k, pictures, and loss.

    Args:
        table: rows of `decu value`.
        note: written above.
    """
    largest = max(int(row["k"]) for row in table)  # type: ignore[call-overload]
    rows = [row for row in table if row["k"] == largest][:MOST_CLASSES]
    rows = sorted(rows, key=lambda row: str(row["class"]).zfill(8))
    names = [str(row["class"]) for row in rows]
    panels = ["fall of loss", "fall of information", "pictures", "loss"]
    if any(row["pictures"] is None for row in rows):
        panels.remove("pictures")
    figure = Figure(figsize=(2.6 * len(panels), 0.22 * len(rows) + 1.3), layout="constrained")
    for number, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        values = np.array([float(row[panel]) for row in rows])  # type: ignore[arg-type]
        own = COLOURS[0] if panel.startswith("fall") else "#999999"
        axes.barh(range(len(rows)), values, color=own, height=0.7)
        if panel == "fall of loss":
            ends = np.array([[float(row["low"]), float(row["high"])] for row in rows])  # type: ignore[arg-type]
            axes.errorbar(values, range(len(rows)), xerr=np.abs(ends.T - values), fmt="none", color="#222222", lw=1)
            axes.axvline(0, color="#222222", lw=0.8)
        axes.set_yticks(range(len(rows)), names if number == 0 else [])
        axes.invert_yaxis()
        axes.set_title(f"{panel}, {largest} more" if panel.startswith("fall") else f"{panel} now", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        axes.xaxis.get_offset_text().set_fontsize(7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(note, fontsize=7)
    save_figure(figure, path, overwrite=True)
