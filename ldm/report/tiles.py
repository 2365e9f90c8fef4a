"""Pictures and maps side by side in one pair of axes, which draws a hundred of them as fast as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tiles:
    """Cells in rows and columns, each one unit wide; `make_tiles` makes them.

    Attributes:
        axes: what they are drawn in.
        ratio: height of a cell over its width.
        gap: free space on each side of a picture, in widths of a cell.
    """

    axes: Axes
    ratio: float
    gap: float = 0.025

    def draw(self, row: int, column: int, values: NDArray, **colours: Any) -> AxesImage:
        """Draw a picture [h, w] or [h, w, 3] into a cell; `colours` are imshow's (cmap, vmin, vmax)."""
        top = row * self.ratio
        extent = (column + self.gap, column + 1 - self.gap, top + self.ratio - self.gap, top + self.gap)
        return self.axes.imshow(values, interpolation="nearest", extent=extent, **colours)

    def label(self, rows: Sequence[str] = (), columns: Sequence[str] = (), size: int = 7) -> None:
        """Write a text at the left of each row and above each column, in points of `size`; none where none is given."""
        self.axes.set_yticks((np.arange(len(rows)) + 0.5) * self.ratio, rows, fontsize=size)
        self.axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=size)


def make_tiles(figure: Figure, rows: int, columns: int, ratio: float = 1.0) -> Tiles:
    """Make the cells of a figure, without frames or ticks; the first row is at the top."""
    axes = figure.subplots()
    axes.set_frame_on(False)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows * ratio, 0)
    axes.tick_params(length=0, bottom=False, labelbottom=False, labeltop=True)
    tiles = Tiles(axes, ratio)
    tiles.label()
    return tiles
