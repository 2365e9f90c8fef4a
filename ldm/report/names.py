"""Words on pictures: names beside points, each where it is free, else below with a line to it; letters on colours."""

from __future__ import annotations

from collections.abc import Sequence
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


def write_names(
    axes: Axes, names: Sequence[str], x: NDArray[np.float64], y: NDArray[np.float64], left: bool | None = None
) -> None:
    """Write the names of points [N] beside them, none on another; the axes' scales and limits must be set before.

    Args:
        left: whether the names stand at the left of their points; None puts those in the right half there, so that
            they end inside the axes.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi  # [N, 2] in points
    middle = (axes.bbox.x0 + axes.bbox.x1) / 2 * 72 / figure.dpi
    taken: list[tuple[float, float, float]] = []
    for place in np.argsort(-points[:, 1], kind="stable"):
        across, height = points[place]
        width = LETTER * len(names[place])
        at_left = across >= middle if left is None else left
        start = across - 6 - width if at_left else across + 6
        lowered = height
        while any(abs(lowered - at) < LINE and start < end and start + width > begin for begin, end, at in taken):
            lowered -= LINE
        taken.append((start, start + width, lowered))
        text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center"}
        if lowered != height:
            text["arrowprops"] = {"arrowstyle": "-", "lw": 0.5, "color": "#777777", "shrinkA": 0, "shrinkB": 2}
        shift = (-6 if at_left else 6, lowered - height)
        text["ha"] = "right" if at_left else "left"
        axes.annotate(names[place], (x[place], y[place]), shift, annotation_clip=False, **text)


def ink_on(image: AxesImage, value: float) -> str:
    """Return the colour of letters that can be read on the colour that a value has in a drawn image."""
    red, green, blue, _ = image.to_rgba([value])[0]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
