"""The figure of restored pictures: what was given, the mean, the intervals' length, and the pixels outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ldm.images import save_figure

# Pictures drawn at most.
MOST_RESTORED = 10


def restored_figure(arrays: Mapping[str, NDArray], half: NDArray, name: str, path: Path) -> None:
    """Draw a column for each picture, the first ones.

    Args:
        arrays: clean, noisy and mean [N, C, H, W] in [-1, 1]; half: half the intervals' length [N, C, H, W].
        name: of the map.
    """
    count = min(len(half), MOST_RESTORED)
    longest = 2 * half[:count].mean(1).max()
    rows = ("clean", "noisy", "mean", f"length, {name}\n0 to {longest:.2g}", "|error|, outside red")
    figure = Figure(figsize=(0.8 * count + 1.3, 0.85 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for number in range(count):
        pictures = [np.moveaxis(arrays[key][number], 0, -1) for key in ("clean", "noisy", "mean")]
        for axes, picture in zip(grid[:3, number], pictures, strict=True):
            shown = ((picture + 1) / 2).clip(0, 1)
            axes.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        grid[3, number].imshow(2 * half[number].mean(0), cmap="magma", vmin=0, vmax=longest)
        error = np.abs(arrays["clean"][number] - arrays["mean"][number])
        outside = (error > half[number]).any(0)
        grey = np.repeat((error.mean(0) / max(error.max(), 1e-9))[..., None], 3, -1)
        grey[outside] = (0.9, 0.2, 0.2)
        grid[4, number].imshow(grey)
    for row, word in zip(grid, rows, strict=True):
        row[0].set_ylabel(word, fontsize=7, rotation=0, ha="right", va="center")
    for axes in grid.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path, overwrite=True)
