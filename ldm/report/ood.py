"""The figure of scores of unknown pictures: how well each tells each set from known pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ldm.images import save_figure
from ldm.records import Row
from ldm.report.names import ink_on


def draw_aurocs(table: Sequence[Row], note: str, path: Path) -> None:
    """Draw a table of colours: a row for each score, a column for each set, with the AUROC and its interval.

    Args:
        table: rows of `decu uncertainty ood`: pictures, score, evaluations, auroc, low, high.
        note: written above.

    An interval that has no width at two digits is left out: it says that all agreed, not how sure they are.
    """
    sets = list(dict.fromkeys(str(row["pictures"]) for row in table))
    costs = {str(row["score"]): row["evaluations"] for row in table}
    values = {(row["score"], row["pictures"]): row for row in table}
    figure = Figure(figsize=(1.25 * len(sets) + 3.2, 0.3 * len(costs) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    found = np.array([[_number(values[score, name]["auroc"]) for name in sets] for score in costs])
    shown = axes.imshow(found, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
    for y, score in enumerate(costs):
        for x, name in enumerate(sets):
            row = values[score, name]
            mean, low, high = (f"{_number(row[key]):.2f}" for key in ("auroc", "low", "high"))
            text = mean if low == high else f"{mean} [{low}, {high}]"
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=ink_on(shown, found[y, x]))
    axes.set_yticks(range(len(costs)), [f"{score}  ({cost})" for score, cost in costs.items()], fontsize=7.5)
    axes.set_xticks(range(len(sets)), sets, fontsize=7.5, rotation=20, ha="right")
    axes.set_ylabel("score (evaluations a picture)", fontsize=8)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="AUROC against known pictures")
    figure.suptitle(note, fontsize=6.5, wrap=True)
    save_figure(figure, path, overwrite=True)


def _number(value: object) -> float:
    return float("nan") if value is None else float(value)  # type: ignore[arg-type]
