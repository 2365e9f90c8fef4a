"""Pictures of classes by name: ranked with their intervals, and against their numbers of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from ldm.images import save_figure
from ldm.report.names import ALL_NAMED, write_names
from ldm.report.plots import COLOURS, spans_decades

# More classes are shown by the first and the last of the ranking.
MOST_NAMES = 60
# Points of more classes are small and let those below shine through.
MANY = 200


@dataclass(frozen=True)
class RankedClass:
    """A class in a ranking: its name, its number of training images (None where unknown), score and interval."""

    name: str
    images: int | None
    score: float
    low: float | None = None
    high: float | None = None

    @property
    def label(self) -> str:
        """The name with the number of images."""
        return self.name if self.images is None else f"{self.name} ({self.images})"


def ranked_plot(
    classes: Sequence[RankedClass], path: str | os.PathLike, xlabel: str, title: str = "", overwrite: bool = False
) -> None:
    """Draw every class as a dot with its interval, by name, the highest on top; the number of images in brackets.

    Of more than 60 classes the 30 highest and the 30 lowest are drawn, and the title says so.

    Args:
        classes: at least one, in any order.
        path: .png or .pdf.
        xlabel: the quantity and its unit.
        title: text above.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is no class.
    """
    if not classes:
        raise ValueError("a ranking needs at least one class")
    ordered, half = sorted(classes, key=lambda one: -one.score), MOST_NAMES // 2
    if len(ordered) > MOST_NAMES:
        title = f"{title}\nthe {half} highest and the {half} lowest of {len(ordered)} classes".strip()
        ordered = [*ordered[:half], *ordered[-half:]]
    figure = Figure(figsize=(7.0, 1.2 + 0.21 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E4E4E4", lw=0.6)
    axes.set_axisbelow(True)
    places = np.arange(len(ordered))
    scores = np.array([one.score for one in ordered])
    for place, one in zip(places, ordered, strict=True):
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [place, place], color=COLOURS[0], lw=1.4, solid_capstyle="butt")
    axes.plot(scores, places, "o", color=COLOURS[0], ms=5)
    if len(ordered) < len(classes):
        axes.axhline(half - 0.5, color="#777777", lw=1, ls=":")
        between = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center", "fontsize": 8}
        words = f"{len(classes) - len(ordered)} classes between"
        axes.text(0.5, half - 0.5, words, **between, backgroundcolor="white", color="#444444")
    axes.set_yticks(places, [one.label for one in ordered], fontsize=8)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    if spans_decades(scores):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=min(0.0, *(one.low or 0.0 for one in ordered)))
    axes.tick_params(axis="x", labelsize=8)
    brackets = "in brackets: training images; " if any(one.images is not None for one in classes) else ""
    axes.set_xlabel(f"{xlabel}\n{brackets}lines: 95 % intervals", fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path, overwrite)


def images_plot(
    classes: Sequence[RankedClass],
    path: str | os.PathLike,
    ylabel: str,
    title: str = "",
    named: Sequence[int] = (),
    expected: Sequence[float] | None = None,
    overwrite: bool = False,
) -> None:
    """Draw the score of each class against its number of training images, on logarithmic axes.

    Args:
        classes: those that have images and a score above 0 are drawn.
        path: .png or .pdf.
        ylabel: the quantity and its unit.
        title: text above.
        named: places of the classes that are marked, and named; of up to 20 classes all are named, else where none
            is marked the three highest.
        expected: the score that the numbers of images explain, [N], drawn as a line.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", lw=0.6)
    axes.set_axisbelow(True)
    shown = [place for place, one in enumerate(classes) if one.images and one.score > 0]
    images = np.array([classes[place].images for place in shown], dtype=float)
    scores = np.array([classes[place].score for place in shown])
    marked = [place in set(named) for place in shown]
    many = len(shown) > MANY
    axes.loglog(images, scores, "o", color=COLOURS[0], ms=3 if many else 5, alpha=0.45 if many else 1, mew=0)
    if expected is not None:
        order = np.argsort(images)
        axes.plot(images[order], np.asarray(expected)[shown][order], color="#222222", lw=1.2, ls="--", zorder=3)
    stands_out = [row for row, mark in enumerate(marked) if mark]
    told = _choose_named(scores, stands_out)
    for row in stands_out:
        axes.plot(images[row], scores[row], "o", color=COLOURS[1], ms=6)
    write_names(axes, [classes[shown[row]].name for row in told], images[told], scores[told])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    key = "dashed: what the number of images explains; " if expected is not None else ""
    named_of = {len(shown): "every class is named", len(stands_out): "red and named: more than that"}
    highest = f"named: the {len(told)} highest" + (", red: more than that" if stands_out else "")
    stands = named_of.get(len(told), highest)
    axes.set_xlabel(f"training images of the class\n{key}{stands}", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path, overwrite)


def _choose_named(scores: NDArray[np.float64], stands_out: Sequence[int]) -> list[int]:
    """Return the places to name, the highest first: all of few classes, else those that stand out, else three."""
    order = np.argsort(-scores).tolist()
    if len(scores) <= ALL_NAMED:
        return order
    return [place for place in order if place in set(stands_out)][:ALL_NAMED] or order[:3]
