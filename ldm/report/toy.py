"""True epistemic uncertainty in the plane beside what an ensemble sees: the picture and the table's comments."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Circle
from matplotlib.ticker import LogFormatterMathtext, NullFormatter
from numpy.typing import ArrayLike

from ldm.experiments.toy_study import ESTIMATES, Growth, PlaneMap, Toy
from ldm.images import save_figure
from ldm.records import Row
from ldm.report.plots import COLOURS, MARKERS, Curve

# Maps and curves span at most this many decades below their maximum.
DECADES = 4
_CONTOURS = 25
INK = "#222222"
# The estimates of the curves.
_DRAWN = ("kl", "bhattacharyya", "wasserstein", "plain_kl")


class Scatter(NamedTuple):
    """Estimate against truth [P] in nats, with the observations [P] of each point's class."""

    truth: ArrayLike
    estimate: ArrayLike
    observations: ArrayLike
    title: str


def toy_figure(
    maps: Sequence[PlaneMap],
    curves: Mapping[str, Curve],
    growths: Mapping[str, Growth],
    scatter: Scatter,
    path: str | os.PathLike,
    members: int,
    estimate: str,
    overwrite: bool = False,
) -> None:
    """Draw the maps (truth above estimate, one logarithmic colour scale) and below them three panels.

    Args:
        maps: one column each.
        curves: name -> nats against observations (x [K], the same in all); the first is the truth.
        growths: name -> how the information of an ensemble grows with its size.
        scatter: estimate against truth, one point a state.
        path: .png or .pdf.
        members: M of the estimates; ln M is drawn as their ceiling.
        estimate: name of what the lower maps and the scatter show.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is no map, curve or growth, or a map is nowhere positive.
    """
    if not maps or not curves or not growths:
        raise ValueError(
            f"the toy's figure needs maps, curves and growths, got {len(maps)}, {len(curves)}, {len(growths)}"
        )
    figure = Figure(figsize=(max(8.4, 2.6 * len(maps) + 0.6), 8.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.72, 1))
    _draw_maps(above, maps, estimate)
    panels = below.subplots(1, 3)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E8E8E8", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7)
    _draw_curves(panels[0], curves, members)
    _draw_growths(panels[1], growths)
    _draw_scatter(panels[2], scatter, members, estimate)
    save_figure(figure, path, overwrite)


def estimate_curves(rows: Sequence[Row], counts: Sequence[int]) -> dict[str, Curve]:
    """Return the truth and the estimates against observations, means over classes and states."""

    def mean(name: str, count: int) -> float:
        values = [row[name] for row in rows if row["observations"] == count]
        return math.nan if values[0] is None else float(np.mean(values))

    names = {"truth": "truth", **{name: ESTIMATES[name] for name in _DRAWN}}
    return {words: Curve(counts, [mean(name, count) for count in counts]) for name, words in names.items()}


def describe_estimates(figures: Mapping[str, Mapping[str, float]], share: float, states: int) -> list[str]:
    """Return in words what `summarise_estimates` and `share_bracketed` found of some states."""
    lines = [f"Monte Carlo between Bhattacharyya and KL (4 standard errors): {share:.2%} of {states} states"]
    for name, one in figures.items():
        within = f"among states of equal observations {one['spearman_within']:.3f}"
        ratio = f"geometric mean ratio to it {one['ratio']:.2f}"
        lines.append(f"{name}: Spearman with the truth {one['spearman']:.3f}, {within}; {ratio}")
    return lines


def describe_toy(toy: Toy) -> list[str]:
    """Return in words where members branch, and what the columns of the table are."""
    settings = toy.settings
    u, s = float(toy.times[toy.at]), float(toy.times[toy.at + 1])
    return [
        f"step {toy.at} of {settings.steps}, from t = {u:g} to {s:g}, eta {settings.eta:g}; "
        f"{settings.members} members, seed {settings.seed}",
        "truth, kl, monte_carlo (and its standard error), bhattacharyya, plain_kl, exact_kl in nats; wasserstein is "
        "PaiDE of squared latent distances at eta 0; z in latent units",
    ]


def _draw_maps(figure: SubFigure, maps: Sequence[PlaneMap], estimate: str) -> None:
    values = np.concatenate([np.ravel(part) for column in maps for part in (column.truth, column.estimate)])
    high = values.max()
    if not high > 0:
        raise ValueError(f"the maps are nowhere above 0 (their maximum is {high:g}), so they have no colour scale")
    low = max(values[values > 0].min(), high * 10.0**-DECADES)
    levels = np.geomspace(min(low, 0.5 * high), high, _CONTOURS)
    levels[-1] *= 1 + 1e-9  # so that rounding leaves the maximum inside
    norm = LogNorm(levels[0], levels[-1])
    grid = figure.subplots(2, len(maps), sharex=True, sharey=True, squeeze=False)
    for row, name in enumerate(("true mutual information", estimate)):
        grid[row, 0].set_ylabel(f"{name}\n\n$z_2$", fontsize=8)
        for column, content in enumerate(maps):
            axes, shown = grid[row, column], (content.truth, content.estimate)[row]
            drawn = axes.contourf(
                np.maximum(shown, levels[0]), levels, cmap="cividis", norm=norm, extent=content.extent, origin="lower"
            )
            axes.set_aspect("equal")
            dots = {"color": "white", "mec": INK, "mew": 0.4, "ms": 4.0 if len(content.points) <= 30 else 2.0}
            axes.plot(*content.points.T, "o", **dots)
            axes.add_patch(Circle(content.centre, content.radius, fill=False, color="white", lw=1, ls="--"))
            axes.set(xlim=content.extent[:2], ylim=content.extent[2:])
            axes.tick_params(labelsize=7)
            if row == 0:
                axes.set_title(content.title, fontsize=9)
            else:
                axes.set_xlabel("$z_1$", fontsize=8)
    bar = figure.colorbar(drawn, ax=list(grid.flat), pad=0.01, aspect=32, format=LogFormatterMathtext())
    decades = 10.0 ** np.arange(math.ceil(math.log10(levels[0])), math.floor(math.log10(high)) + 1)
    bar.set_ticks(decades if len(decades) > 1 else levels[[0, -1]])
    bar.ax.minorticks_off()
    bar.set_label("mutual information of the step at $z$ (nats)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], members: int) -> None:
    """Nats against observations, which are evenly spaced: their list may begin with 0."""
    ticks = np.asarray(next(iter(curves.values())).x)
    places = np.arange(len(ticks))
    top = math.log(members)
    for number, (name, curve) in enumerate(curves.items()):
        y = np.asarray(curve.y, dtype=float)
        y = np.where(y > 0, y, np.nan)
        colour = INK if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(places, y, color=colour, lw=1.8 if number == 0 else 1.2, marker=marker, ms=3.2, label=name)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(places, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
        top = max(top, np.nanmax(y))
    _ceiling(axes, math.log(members), f"ln {members}")
    axes.set_yscale("log")
    axes.set_ylim(top=2 * top)
    axes.set_xticks(places, [str(tick) for tick in ticks], rotation=90 if len(ticks) > 9 else 0)
    axes.set_xlabel("observations of the class", fontsize=8)
    axes.set_ylabel("mutual information (nats)", fontsize=8)
    axes.set_title("mean over classes and states", fontsize=8, loc="left")
    axes.legend(fontsize=6, frameon=False, loc="lower left", handlelength=1.6, labelspacing=0.3, borderaxespad=0.2)


def _draw_growths(axes: Axes, growths: Mapping[str, Growth]) -> None:
    for number, (name, growth) in enumerate(growths.items()):
        members, information = np.asarray(growth.members), np.asarray(growth.information)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(members, information, lw=1.2, ms=3.2, label=name, **style)
        axes.axhline(growth.truth, color=style["color"], lw=1, ls="--")
    sizes = np.unique(np.concatenate([np.asarray(growth.members) for growth in growths.values()]))
    axes.plot(sizes, np.log(sizes), color=INK, lw=1, ls=":", label="ceiling ln M")
    axes.plot([], [], color=INK, lw=1, ls="--", label="truth")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("members M, exact draws of the posterior", fontsize=8)
    axes.set_ylabel("mutual information (nats)", fontsize=8)
    axes.set_title("what M members can show", fontsize=8, loc="left")
    axes.set_ylim(top=8 * max(growth.truth for growth in growths.values()))
    axes.legend(fontsize=6, frameon=False, loc="upper left", ncols=2, columnspacing=1, borderaxespad=0.2)


def _draw_scatter(axes: Axes, scatter: Scatter, members: int, estimate: str) -> None:
    truth, values = np.asarray(scatter.truth, dtype=float), np.asarray(scatter.estimate, dtype=float)
    counts = np.asarray(scatter.observations)
    levels = np.unique(counts)
    colour = np.searchsorted(levels, counts)
    drawn = axes.scatter(truth, values, c=colour, cmap="viridis_r", s=5, lw=0, alpha=0.6)
    axes.set(xscale="log", yscale="log")
    low = max(min(truth.min(), values[values > 0].min()), truth.max() * 10.0 ** -(DECADES + 1))
    ends = np.array([low, 1.5 * max(truth.max(), values.max())])
    axes.plot(ends, ends, color=INK, lw=1, ls="--")
    axes.set(xlim=ends, ylim=ends)
    _ceiling(axes, math.log(members), f"ln {members}", left=True)
    axes.xaxis.set_major_formatter(LogFormatterMathtext())
    axes.set_xlabel("true mutual information (nats)", fontsize=8)
    axes.set_ylabel(f"{estimate.splitlines()[0]} (nats)", fontsize=8)
    axes.set_title(scatter.title, fontsize=8, loc="left")
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02, aspect=24)
    bar.set_ticks(np.arange(len(levels)), labels=[str(level) for level in levels])
    bar.ax.tick_params(labelsize=6)
    bar.set_label("observations", fontsize=7)
    bar.solids.set_alpha(1)


def _ceiling(axes: Axes, value: float, name: str, left: bool = False) -> None:
    axes.axhline(value, color=INK, lw=0.8, ls=":")
    corner = {"xy": (0.0 if left else 1.0, value), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    side = {"ha": "left", "xytext": (2, 2)} if left else {"ha": "right", "xytext": (-2, 2)}
    axes.annotate(name, fontsize=7, va="bottom", **corner, **side)
