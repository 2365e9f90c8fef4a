"""Tables and figures of image metrics: alone, against the number of images, against the strength of distortions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm.evaluation.metrics import MetricRow
from ldm.evaluation.sample_sizes import SizedRow, SizeSummary, summarise_sizes, without_bias
from ldm.experiments.image_metrics import DistortedRow
from ldm.images import save_figure
from ldm.report.plots import COLOURS, MARKERS
from ldm.report.tables import write_csv
from ldm.util import atomic_write

LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "kid": "KID",
    "cmmd": "CMMD",
    "cmmd_biased": "CMMD, biased",
}
PANEL = (2.9, 2.5)  # inches


def label(metric: str) -> str:
    """A metric's name in figures."""
    return LABELS.get(metric, metric.replace("_", " "))


def metric_lines(rows: Sequence[MetricRow]) -> list[str]:
    """Return a line of text a number, with its interval where it has one."""
    lines = []
    for row in rows:
        between = f"  [{row.low:.5g}, {row.high:.5g}]  {row.interval}" if not math.isnan(row.low) else ""
        lines.append(f"{row.metric:>14}  {row.value:.6g}{between}")
    return lines


def write_metrics(out: Path, rows: Sequence[MetricRow], features: str, seed: int) -> None:
    """Write metrics.csv and metrics.json; `features` names what they were computed from."""
    table = [{**asdict(row), "features": features, "seed": seed} for row in rows]
    write_csv(out / "metrics.csv", table, overwrite=True)
    with atomic_write(out / "metrics.json", overwrite=True) as file:
        file.write_text(json.dumps({row["metric"]: row for row in table}, indent=1) + "\n")


def write_sample_sizes(out: Path, rows: Sequence[SizedRow]) -> float | None:
    """Write sample_sizes.csv and sample_sizes.png; return FID extrapolated to infinitely many images, where it can be.

    Of one size, or without FID, nothing can be extrapolated.
    """
    summaries = summarise_sizes(rows)
    write_csv(out / "sample_sizes.csv", [asdict(summary) for summary in summaries], overwrite=True)
    sizes = {row.size for row in rows if row.metric == "fid"}
    unbiased = without_bias(rows) if len(sizes) > 1 else None
    sample_size_plot(summaries, out / "sample_sizes.png", unbiased_fid=unbiased, overwrite=True)
    return unbiased


def write_distortions(out: Path, rows: Sequence[DistortedRow]) -> None:
    """Write distortions.csv and distortions.png."""
    write_csv(out / "distortions.csv", [row.columns() for row in rows], overwrite=True)
    curves: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for one in rows:
        points = curves.setdefault(one.row.metric, {}).setdefault(one.distortion.name, [])
        points.append((one.distortion.strength, one.row.value, one.row.low, one.row.high))
    distortion_plot(curves, out / "distortions.png", overwrite=True)


def sample_size_plot(
    summaries: Sequence[SizeSummary],
    path: str | os.PathLike,
    title: str = "",
    unbiased_fid: float | None = None,
    overwrite: bool = False,
) -> None:
    """Draw each metric's mean +- standard error against the number of images, absolute and in percent of the last.

    Args:
        summaries: from `ldm.evaluation.sample_sizes.summarise_sizes`.
        path: .png or .pdf.
        unbiased_fid: FID extrapolated to infinitely many images, a dashed line.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is nothing to draw.
    """
    metrics = list(dict.fromkeys(summary.metric for summary in summaries))
    if not metrics:
        raise ValueError("there are no values to draw")
    figure, grid = _grid(len(metrics) + 1, title)
    relative = grid[-1]
    for number, (axes, metric) in enumerate(zip(grid, metrics, strict=False)):
        chosen = [summary for summary in summaries if summary.metric == metric]
        sizes = [summary.size for summary in chosen]
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "lw": 1.4}
        errors = [0 if math.isnan(summary.error) else summary.error for summary in chosen]
        axes.errorbar(sizes, [summary.mean for summary in chosen], errors, capsize=2, **style)
        if metric == "fid" and unbiased_fid is not None:
            axes.axhline(unbiased_fid, color="#222222", lw=1, ls="--")
            above = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 7, "ha": "left", "va": "bottom"}
            axes.annotate("extrapolated", (sizes[0], unbiased_fid), **above)
        axes.axhline(0, color="#999999", lw=0.8)
        axes.set_ylabel(label(metric), fontsize=9)
        relative.plot(sizes, [summary.percent for summary in chosen], label=label(metric), **style)
    drawn = sorted({summary.size for summary in summaries})
    relative.set_ylabel("percent of the largest set's", fontsize=9)
    relative.axhline(100, color="#999999", lw=0.8)
    relative.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in grid:
        axes.set_xscale("log")
        axes.set_xticks(drawn, [f"{size:,}" for size in drawn], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("images", fontsize=9)
    save_figure(figure, path, overwrite)


def distortion_plot(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    path: str | os.PathLike,
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Draw {metric: {distortion: [(strength, value, low, high), ...]}}, a panel a metric with bands for intervals.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is nothing to draw.
    """
    if not curves:
        raise ValueError("there are no values to draw")
    figure, grid = _grid(len(curves), title)
    for axes, (metric, by_distortion) in zip(grid, curves.items(), strict=True):
        for number, (name, points) in enumerate(by_distortion.items()):
            strength, value, low, high = np.asarray(sorted(points), dtype=float).T
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(strength, value, color=colour, marker=MARKERS[number % len(MARKERS)], ms=3.5, lw=1.4, label=name)
            axes.fill_between(strength, low, high, color=colour, alpha=0.18, lw=0)
        axes.set_xlabel("strength of the distortion", fontsize=9)
        axes.set_ylabel(label(metric), fontsize=9)
    grid[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path, overwrite)


def _grid(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of its own with so many plain axes, at most four in a row; the last takes what is left of its row."""
    rows = -(-panels // 4)
    columns = -(-panels // rows)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3 * bool(title)), layout="constrained")
    drawn, places = [], figure.add_gridspec(rows, columns)
    for number in range(panels):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(places[row, column:] if number == panels - 1 else places[row, column])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E4E4E4", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7)
        drawn.append(axes)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, drawn
