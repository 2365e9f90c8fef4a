"""Tables and the figure of metrics over trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ldm.evaluation.metrics import MetricRow
from ldm.evaluation.trainings import TrainingBand
from ldm.images import save_figure
from ldm.records import Row
from ldm.report.evaluation import label
from ldm.report.plots import COLOURS


def band_rows(bands: Sequence[TrainingBand]) -> list[Row]:
    """Return a row for each metric."""
    return [
        {
            "metric": band.metric,
            "mean": band.mean.estimate,
            "low": band.mean.low,
            "high": band.mean.high,
            "one more, low": band.another.low,
            "one more, high": band.another.high,
            "sd over trainings": band.mean.sd,
            "sd over samples": _known(band.sample_sd),
            "ratio": _known(band.ratio),
            "trainings": band.mean.n,
        }
        for band in bands
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def draw_trainings(
    bands: Sequence[TrainingBand], each: Mapping[str, Sequence[MetricRow]], note: str, path: Path
) -> None:
    """Draw a panel for each metric: trainings with their bands over samples, and the bands over trainings."""
    figure = Figure(figsize=(2.6 * len(bands) + 0.4, 2.9), layout="constrained")
    panels = figure.subplots(1, len(bands), squeeze=False)[0]
    for axes, band in zip(panels, bands, strict=True):
        own = [row for rows in each.values() for row in rows if row.metric == band.metric]
        values = np.array([row.value for row in own])
        reach = np.array([[row.value - row.low for row in own], [row.high - row.value for row in own]])
        axes.axhspan(band.another.low, band.another.high, color=COLOURS[1], alpha=0.12, lw=0, label="one more training")
        axes.axhspan(band.mean.low, band.mean.high, color=COLOURS[1], alpha=0.3, lw=0, label="mean over trainings")
        drawn = np.nan_to_num(reach.clip(min=0))
        axes.errorbar(range(len(own)), values, drawn, fmt="o", color=COLOURS[0], ms=4, capsize=2.5, lw=1,
                      label="a training, over samples")  # fmt: skip
        axes.set_title(label(band.metric), fontsize=9)
        axes.set_xticks([])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    signs = panels[0].get_legend_handles_labels()
    figure.legend(*signs, fontsize=6.5, frameon=False, loc="outside lower left", ncols=3)
    figure.suptitle(note, fontsize=8)
    save_figure(figure, path, overwrite=True)
