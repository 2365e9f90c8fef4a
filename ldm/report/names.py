"""Words on pictures: names beside points, each where it is free, else below with a line to it; letters on colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray

# Of no more points than this every one is named.
ALL_NAMED = 20
# Mean width of a letter, and distance of lines, of names in points.
LETTER = 4.6
LINE = 9.0
# A longer name is cut, so that it does not cover the picture.
LONGEST_NAME = 18


def cut_name(name: str) -> str:
    """Return a name of at most `LONGEST_NAME` letters; what was cut shows as an ellipsis."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def shorten_names(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return names in groups with at most `LONGEST_NAME` letters each.

    Where one is longer, words that all of them begin with are left out, since the others tell them apart.
    """
    words = [name.split() for names in groups.values() for name in names]
    shared = 0
    if any(len(name) > LONGEST_NAME for names in groups.values() for name in names):
        fewest = min(map(len, words)) - 1
        while shared < fewest and len({own[shared] for own in words}) == 1:
            shared += 1
    return {
        group: [cut_name(f"… {' '.join(name.split()[shared:])}" if shared else name) for name in names]
        for group, names in groups.items()
    }


def write_names(
    axes: Axes, names: Sequence[str], x: NDArray[np.float64], y: NDArray[np.float64], left: bool | None = None
) -> None:
    """Write the names of points [N] beside them, none on another and, where there is room, none below the axes.

    The axes' scales and limits must be set before.

    Args:
        left: whether the names stand at the left of their points; None puts those in the right half there, so that
            they end inside the axes.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi  # [N, 2] in points
    middle = (axes.bbox.x0 + axes.bbox.x1) / 2 * 72 / figure.dpi
    at_left = points[:, 0] >= middle if left is None else np.full(len(points), left)
    widths = LETTER * np.array([len(name) for name in names])
    starts = points[:, 0] + np.where(at_left, -6 - widths, 6)
    order = np.argsort(-points[:, 1], kind="stable")
    lowered = _move_apart(starts, widths, points[:, 1], order, -LINE)
    floor = axes.bbox.y0 * 72 / figure.dpi + LINE / 2
    heights = _move_apart(starts, widths, np.maximum(lowered, np.minimum(floor, points[:, 1])), order[::-1], LINE)
    for place in order:
        text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center"}
        moved = heights[place] - points[place, 1]
        if moved:
            line = {"arrowstyle": "-", "lw": 0.5, "color": "#777777", "shrinkA": 0, "shrinkB": 2}
            text["arrowprops"] = {**line, "relpos": (float(at_left[place]), 0.5)}  # from the end next to the point
        shift = (-6 if at_left[place] else 6, moved)
        text["ha"] = "right" if at_left[place] else "left"
        axes.annotate(names[place], (x[place], y[place]), shift, annotation_clip=False, **text)


def _move_apart(
    starts: NDArray[np.float64],
    widths: NDArray[np.float64],
    heights: NDArray[np.float64],
    order: NDArray[np.intp],
    step: float,
) -> NDArray[np.float64]:
    """Return heights [N] at which no name covers one before it in the order: each is moved a line beyond those.

    Args:
        starts, widths, heights: of the names, in points [N].
        order: of the names, from the one that stays.
        step: a line up or down.
    """
    found = heights.copy()
    for count, place in enumerate(order):
        before = order[:count]
        beside = before[
            (starts[place] < starts[before] + widths[before]) & (starts[place] + widths[place] > starts[before])
        ]
        near = beside[np.abs(found[place] - found[beside]) < LINE - 1e-6]
        while len(near):
            found[place] = found[near[0]] + step
            near = beside[np.abs(found[place] - found[beside]) < LINE - 1e-6]
    return found


def ink_on(image: AxesImage, value: float) -> str:
    """Return the colour of letters that can be read on the colour that a value has in a drawn image."""
    red, green, blue, _ = image.to_rgba([value])[0]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
