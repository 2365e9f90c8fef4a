"""Tables and figures of probes: accuracy by layer and noise level, curves over training, recognition by noise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ldm.evaluation.probe import ProbeResult
from ldm.evaluation.taps import Reading
from ldm.images import save_figure
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.features import log_snr
from ldm.report.names import ink_on, write_names
from ldm.report.plots import COLOURS, LINES, MARKERS
from ldm.report.tables import write_csv

# Columns of alignment, and what they are called.
KINDS = {"alignment": "alignment: two noises of an image", "class_alignment": "alignment: two images of a class"}


def write_places(
    out: Path, name: str, result: ProbeResult, reading: Reading, model: LatentDiffusion, overwrite: bool = False
) -> None:
    """Write validation accuracies of every place as a table, and as a heat map where there are several."""
    rows = []
    for place in reading.places:
        values = [100 * seed[place] for seed in result.validation]
        row = {
            "t": place[0],
            "log_snr": log_snr(model, place[0]),
            "layer": place[1],
            "validation": float(np.mean(values)),
            "deviation": float(np.std(values)),
            "chosen": place == result.place,
        }
        rows.append(row)
    note = (
        f"linear probe of {name}: % of validation images recognised, mean and s.d. over {len(result.validation)} seeds"
    )
    write_csv(out / f"{name}.csv", rows, [note], overwrite)
    if len(rows) == 1:
        return
    layers = list(reading.taps)
    means = np.array([row["validation"] for row in rows]).reshape(len(reading.times), len(layers)).T
    columns = [f"{u:.4g}\n({log_snr(model, u):.1f})" for u in reading.times]
    u, tap = result.place
    where = (layers.index(tap), reading.times.index(u))
    labels = ("validation accuracy (%)", "time (log-SNR)", "layer", f"{name}: test {100 * result.mean:.2f} %")
    heat_map(means, layers, columns, out / f"{name}.png", *labels, chosen=where, overwrite=overwrite)


def write_probes(
    out: Path,
    results: Mapping[str, ProbeResult],
    tuned: Sequence[float] | None,
    overwrite: bool = False,
    class_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Write results.csv and errors.csv, and return the rows of results.csv.

    Args:
        results: by what the features are: trained, untrained, pixels.
        tuned: test accuracies of the encoder fine-tuned at the place of `trained`, one a seed.
        overwrite: replace tables that exist.
        class_names: names of the classes; without any, errors.csv has their numbers only.
    """
    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        u, tap = result.place
        test = {"test": 100 * result.mean, "deviation": 100 * result.deviation, "seeds": len(result.test)}
        rows.append({"features": name, "t": u, "layer": tap, **test})
    if tuned is not None:
        u, tap = results["trained"].place
        test = {"test": 100 * float(np.mean(tuned)), "deviation": 100 * float(np.std(tuned)), "seeds": len(tuned)}
        rows.append({"features": "fine-tuned", "t": u, "layer": tap, **test})
    note = "% of test images recognised at the place chosen on validation images: mean and s.d. over seeds"
    write_csv(out / "results.csv", rows, [note], overwrite)
    errors = []
    for name, result in results.items():
        means = 100 * np.mean(result.errors, axis=0)
        names = [{"name": str(class_names[label])} if class_names else {} for label in range(len(means))]
        errors += [
            {"features": name, "class": label, **names[label], "error": float(error)}
            for label, error in enumerate(means)
        ]
    write_csv(out / "errors.csv", errors, ["% of each class's test images that the probe mistakes"], overwrite)
    return rows


def contrast_plot(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Draw uniformity against each alignment: a curve a place, along the checkpoints."""
    several = len({row["t"] for row in rows}) > 1
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for kind, xlabel in KINDS.items():
        for row in (row for row in rows if kind in row):
            name = row["layer"] + (f", t = {row['t']:.4g}" if several else "")
            x, y = panels.setdefault(xlabel, {}).setdefault(name, ([], []))
            x.append(row[kind])
            y.append(row["uniformity"])
    count = len({row["checkpoint"] for row in rows})
    title = f"layers along {count} checkpoints, the last as a large dot" if count > 1 else ""
    trajectories(panels, path, "uniformity", title, overwrite)


def write_recognition(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    beside: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write recognition.csv and recognition.png; tables of other runs, by name, go `beside` into the figure."""
    write_csv(out / "recognition.csv", rows, ["% of test images recognised at each noise level"], overwrite)
    curves = {
        name: ([row["log_snr"] for row in table], [row["recognised"] for row in table])
        for name, table in {out.name: rows, **(beside or {})}.items()
    }
    label = "log signal-to-noise ratio, 2 ln(alpha / sigma)"
    line_plot(curves, out / "recognition.png", label, "test images recognised (%)", overwrite=overwrite)


def heat_map(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike,
    label: str,
    xlabel: str,
    ylabel: str,
    title: str = "",
    chosen: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> None:
    """Values [R, C] as colours with their numbers; `chosen` (row, column) is framed.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    values = np.asarray(values, dtype=float)
    figure = Figure(figsize=(1.8 + 0.62 * len(columns), 1.4 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink_on(image, value), fontsize=7)
    if chosen is not None:
        row, column = chosen
        edges = ([column - 0.5, column + 0.5, column + 0.5, column - 0.5, column - 0.5],
                 [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5])  # fmt: skip
        axes.plot(*edges, color="#EE6677", linewidth=2, clip_on=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=label)
    save_figure(figure, path, overwrite)


def line_plot(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = False,
    overwrite: bool = False,
) -> None:
    """Curves {name: (x, y)} with markers, and a legend at their right; `log` scales x.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(x, y, ms=4, label=name, ls=LINES[number // len(COLOURS) % len(LINES)], **look)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path, overwrite)


def trajectories(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | os.PathLike,
    ylabel: str,
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Panels {xlabel: {name: (x, y)}} of the same named curves, x on a logarithm's scale.

    Each curve ends in a large dot with its name, and an arrow leads to it.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    figure = Figure(figsize=(1.6 + 3.2 * len(panels), 3.4), layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(next(iter(panels.values())))
    looks: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        line = LINES[number // len(COLOURS) % len(LINES)]
        looks[name] = {"color": COLOURS[number % len(COLOURS)], "ls": line, "marker": MARKERS[number % len(MARKERS)]}
    for axes, (xlabel, curves) in zip(columns, panels.items(), strict=True):
        for name, (x, y) in curves.items():
            axes.plot(x, y, ms=2.5, lw=1, **looks[name])
            axes.plot(x[-1], y[-1], ms=7, **looks[name])
            if len(x) > 1:
                arrow = {"arrowstyle": "->", "color": looks[name]["color"], "shrinkA": 0, "shrinkB": 3}
                axes.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=arrow)
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=6)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25)
    columns[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=9)
    for axes, curves in zip(columns, panels.values(), strict=True):
        ends = np.array([[x[-1], y[-1]] for x, y in curves.values()])
        write_names(axes, list(curves), *ends.T)
    save_figure(figure, path, overwrite)


def scatter(
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str,
    title: str = "",
    groups: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Named points; `groups` colour them.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    groups = [""] * len(names) if groups is None else list(groups)
    for number, group in enumerate(dict.fromkeys(groups)):
        own = [index for index, other in enumerate(groups) if other == group]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot([x[i] for i in own], [y[i] for i in own], ls="none", **style, label=group or None)
    for x_, y_, name in zip(x, y, names, strict=True):
        axes.annotate(name, (x_, y_), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    if any(groups):
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path, overwrite)
