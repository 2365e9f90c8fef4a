"""Figures of uncertainties: by training-set size (bin), as distributions, and as curves. Saved atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gaussian_kde

from ldm.images import save_figure
from ldm.report.names import ALL_NAMED, LETTER, shorten_names, write_names

# Paul Tol's "bright" scheme, which stays apart for colour-blind readers.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")  # one after the colours are used up
# A ceiling higher than this many times the data is written down instead of drawn, so that it does not flatten them.
CEILING_IN_VIEW = 2.5
# Positive values whose largest is more than this many times the least are drawn on a logarithmic axis.
LOG_FROM = 10
LEGEND: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "loc": "upper left"}
TITLE_SIZE = 9  # points of a title's letters
BESIDE = 0.75  # inches of a figure beside its axes: the ticks and the label on the left


class Curve(NamedTuple):
    """Points x, y [N] of a line; if given, the ends of a band around it, low and high [N], and the points' names."""

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    names: Sequence[str] = ()


def per_bin_plot(
    values: Mapping[str, ArrayLike],
    path: str | os.PathLike,
    ylabel: str,
    xlabel: str = "training images per class",
    title: str = "",
    note: str = "",
    ceiling: tuple[str, float] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Draw each bin's values as a strip of points with mean and standard deviation beside it, bins evenly spaced.

    Positive values over more than a decade have a logarithmic axis.

    Args:
        values: bin name -> values, one for each class, in the order to draw.
        path: .png or .pdf.
        ylabel: quantity and unit, e.g. "mutual information (nats)".
        xlabel: what the bins are.
        title: text above.
        note: a line below the title, e.g. Spearman and AUROC with their intervals.
        ceiling: name and value of an upper limit, e.g. ("ln M", 1.609); written down if it is far above the data.
        names: of the classes of each bin, in the order of its values; written where there are up to 20 in all.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is no bin, or a bin is empty or not finite.
    """
    bins = _check_bins(values)
    every = np.concatenate(list(bins.values()))
    named = {} if names is None or len(every) > ALL_NAMED else shorten_names({bin_: names[bin_] for bin_ in bins})
    longest = max((len(name) for own in named.values() for name in own), default=0)
    figure, axes = _axes(1.9 + (1.05 + max(0, longest - 4) * 1.2 * LETTER / 72) * len(bins), 3.6)
    for place, (colour, bin_values) in enumerate(zip(_cycle(len(bins)), bins.values(), strict=True)):
        alpha = 0.9 if len(bin_values) <= 20 else 0.5
        offsets = np.full(len(bin_values), place + 0.08) if named else place - 0.12 + _spread(bin_values)
        axes.plot(offsets, bin_values, "o", color=colour, alpha=alpha, ms=4.5, mew=0, clip_on=False)
        axes.errorbar(place + 0.24, bin_values.mean(), bin_values.std(), fmt="D", color="#222222", ms=4.5, capsize=3.5)
    axes.set_xticks(range(len(bins)), [f"{name}\n(n = {len(bin_values)})" for name, bin_values in bins.items()])
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.margins(y=0.08)
    log = spans_decades(every)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(every.min() / 1.3, axes.get_ylim()[1])
    elif every.min() >= 0:
        axes.set_ylim(bottom=0)
    note = _draw_ceiling(axes, ceiling, every.max() * (LOG_FROM / CEILING_IN_VIEW if log else 1), note)
    _write_texts(axes, xlabel, ylabel, title, note, "points: classes; diamond: mean ± s.d.")
    if named:
        places = np.repeat(np.arange(len(bins)), [len(own) for own in named.values()]) + 0.08
        write_names(axes, [name for own in named.values() for name in own], places, every, left=True)
    save_figure(figure, path, overwrite)


def spans_decades(values: NDArray[np.float64]) -> bool:
    """Whether values are positive and spread so far that a linear axis would press the small ones together."""
    return bool(values.min() > 0 and values.max() > LOG_FROM * values.min())


def distribution_plot(
    values: Mapping[str, ArrayLike],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str = "training images per class",
    title: str = "",
    note: str = "",
    lower: float | None = 0.0,
    overwrite: bool = False,
) -> None:
    """Draw each bin's density as a ridge (peak scaled to 1) over a rug of its values, with the mean as a line.

    Densities are Gaussian kernels of Scott's bandwidth, reflected at `lower` where the quantity ends (0 for nats), or
    kernels of the logarithms, on a logarithmic axis, where positive values span more than a decade; a bin with fewer
    than three different values shows its rug and mean only. Arguments and errors as `per_bin_plot`.
    """
    bins = _check_bins(values)
    least = min(bin_values.min() for bin_values in bins.values())
    if lower is not None and least < lower:
        raise ValueError(f"a value, {least:g}, lies below lower={lower:g}; pass lower=None for signed quantities")
    log = spans_decades(np.concatenate(list(bins.values())))
    # What densities are taken of, and back; the mean stays that of the values.
    forth, back = (np.log10, lambda z: 10**z) if log else (np.asarray, np.asarray)
    end = None if log else lower
    ends = forth(least), forth(max(bin_values.max() for bin_values in bins.values()))
    reach = 0.12 * (ends[1] - ends[0]) or 0.5
    grid = np.linspace(ends[0] - reach if end is None else max(end, ends[0] - reach), ends[1] + reach, 400)
    across = back(grid)
    figure, axes = _axes(5.6, 1.5 + 0.75 * len(bins))
    for place, (colour, bin_values) in enumerate(zip(_cycle(len(bins)), bins.values(), strict=True)):
        base = len(bins) - 1 - place
        if len(np.unique(bin_values)) >= 3:
            density = 0.78 * _density(forth(bin_values), grid, end)
            axes.fill_between(across, base, base + density, color=colour, alpha=0.35, lw=0)
            axes.plot(across, base + density, color=colour, lw=1.2)
        axes.plot(bin_values, np.full(len(bin_values), base), "|", color=colour, ms=7, mew=0.8)
        axes.vlines(bin_values.mean(), base, base + 0.82, color="#222222", lw=1.3)
        axes.axhline(base, color="#BBBBBB", lw=0.6, zorder=0)
    names = [f"{name}\n(n = {len(bin_values)})" for name, bin_values in bins.items()]
    axes.set_yticks(range(len(bins))[::-1], names)
    axes.set_xscale("log" if log else "linear")
    axes.set_xlim(across[0], across[-1])
    axes.set_ylim(-0.2, len(bins) - 0.05)
    _write_texts(axes, xlabel, ylabel, title, note, "ridge: density, peak scaled to 1; line: mean; ticks: classes")
    axes.grid(False)
    save_figure(figure, path, overwrite)


def _draw_scales(
    axes: Axes, curves: Mapping[str, Curve], invert_x: bool, log: bool, xnames: Mapping[float, str] | None
) -> None:
    """The axes of `curve_plot`; whole numbers (steps, epochs) have no ticks between them."""
    if all(float(x).is_integer() for curve in curves.values() for x in curve.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if invert_x:
        axes.invert_xaxis()
    if log:
        axes.set_yscale("log")
    if xnames is not None:
        axes.set_xticks(list(xnames), list(xnames.values()))


def curve_plot(
    curves: Mapping[str, Curve],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str,
    title: str = "",
    note: str = "",
    ceiling: tuple[str, float] | None = None,
    invert_x: bool = False,
    log: bool = False,
    legend: str | None = None,
    xnames: Mapping[float, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Draw named curves with their bands, told apart by colour and line, and by marker if they have up to 25 points.

    Args:
        curves: name -> Curve; NaN leaves a gap.
        invert_x: noise on the left, clean image on the right (diffusion time falls while sampling).
        log: logarithmic y axis; values at or below 0 leave gaps, and the ceiling is always drawn.
        legend: what the curves' names are.
        xnames: names to write at these x instead of numbers.

    The other arguments and errors are those of `per_bin_plot`.
    """
    if not curves:
        raise ValueError("curve_plot needs at least one curve")
    figure, axes = _axes(5.6, 3.6)
    highest = -np.inf
    for number, (colour, (name, curve)) in enumerate(zip(_cycle(len(curves)), curves.items(), strict=True)):
        x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
        if x.ndim != 1 or x.shape != y.shape or not np.isfinite(y).any():
            raise ValueError(f"curve '{name}' needs x and y [N] with a finite value, got {x.shape} and {y.shape}")
        if log:
            y = np.where(y > 0, y, np.nan)
        again = number // len(COLOURS)  # curves of one colour differ in marker and line
        marker = MARKERS[(number + 3 * again) % len(MARKERS)] if len(x) <= 25 else None
        line = LINES[again % len(LINES)]
        axes.plot(x, y, color=colour, ls=line, lw=1.6, marker=marker, ms=4, label=name)
        if curve.low is not None and curve.high is not None:
            low = np.maximum(curve.low, np.nanmin(y)) if log else curve.low
            axes.fill_between(x, low, curve.high, color=colour, alpha=0.18, lw=0)
        highest = max(highest, np.nanmax(y))
    _draw_scales(axes, curves, invert_x, log, xnames)
    note = _draw_ceiling(axes, ceiling, np.inf if log else highest, note)
    axes.legend(title=legend, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3, **LEGEND)
    named = [curve for curve in curves.values() if curve.names]
    if named:
        x, y = (np.concatenate([np.asarray(curve[axis], dtype=float) for curve in named]) for axis in (0, 1))
        write_names(axes, [name for curve in named for name in curve.names], x, y)
    _write_texts(axes, xlabel, ylabel, title, note, "")
    save_figure(figure, path, overwrite)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own with one plain pair of axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8)
    return figure, axes


def _write_texts(axes: Axes, xlabel: str, ylabel: str, title: str, note: str, key: str) -> None:
    """Axis labels, the title with its note in smaller letters below, and the key to the drawing under the axis."""
    axes.set_xlabel(f"{xlabel}\n{key}" if key else xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    figure = axes.get_figure(root=True)
    assert figure is not None
    width = 72 * (figure.get_figwidth() - BESIDE)
    lines = [line for text in (title, note) if text for line in text.split("\n")]
    wrapped = [part for line in lines for part in wrap_text(line, width, TITLE_SIZE)]
    axes.set_title("\n".join(wrapped), fontsize=TITLE_SIZE, loc="left")
    further = max(0, len(wrapped) - 2) * 1.2 * TITLE_SIZE / 72  # inches of lines that would press the axes flat
    figure.set_figheight(figure.get_figheight() + further)


def wrap_text(text: str, width: float, size: float) -> list[str]:
    """Break a line between words into lines of at most `width` points at a font size; a longer word stands alone."""
    font = FontProperties(size=size)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_to_path.get_text_width_height_descent(longer, font, ismath=False)[0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _draw_ceiling(axes: Axes, ceiling: tuple[str, float] | None, highest: float, note: str) -> str:
    """Draw the limit if it lies near the data, else add it to the note; returns the note."""
    if ceiling is None:
        return note
    name, value = ceiling
    if value > CEILING_IN_VIEW * highest:
        return "\n".join(filter(None, (note, f"{name} = {value:.4g} is above the axis")))
    axes.axhline(value, color="#222222", lw=1, ls="--")
    axes.set_ylim(top=max(axes.get_ylim()[1], (1.6 if axes.get_yscale() == "log" else 1.1) * value))
    corner = {"xy": (0.01, value), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"{name} = {value:.4g}", xytext=(0, 3), fontsize=8, va="bottom", **corner)
    return note


def _check_bins(values: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    bins = {str(name): np.asarray(bin_values, dtype=np.float64).ravel() for name, bin_values in values.items()}
    broken = [name for name, bin_values in bins.items() if not len(bin_values) or not np.isfinite(bin_values).all()]
    if not bins or broken:
        raise ValueError(f"expected at least one bin, each with finite values; got {len(bins)} bins, broken: {broken}")
    return bins


def _cycle(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _spread(values: NDArray[np.float64], width: float = 0.32) -> NDArray[np.float64]:
    """Sideways offsets that keep neighbouring values apart: the golden-ratio sequence along the sorted values."""
    order = np.argsort(values, kind="stable")
    offsets = np.empty(len(values))
    offsets[order] = (np.arange(1, len(values) + 1) * 0.6180339887 + 0.382) % 1 - 0.5
    return width * min(1, (len(values) - 1) / 8) * offsets


def _density(values: NDArray[np.float64], grid: NDArray[np.float64], lower: float | None) -> NDArray[np.float64]:
    """Kernel density on the grid, mass below `lower` reflected, scaled to a peak of 1."""
    kernel = gaussian_kde(values)
    density = kernel(grid) if lower is None else kernel(grid) + kernel(2 * lower - grid)
    return density / density.max()
