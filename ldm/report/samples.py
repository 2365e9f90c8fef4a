"""What a folder of samples holds: a grid of the first, the file of all, and pictures of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.checkpoint import save_tensors
from ldm.data.npz import ChunkedArray, write_npz
from ldm.ensembles.classes import SHOW_ALL
from ldm.images import labelled_grid, save_image, tile_images
from ldm.pipelines.sampling import SamplePlan

GRID_SIDE = 10
# A grid whose rows are classes has no more of them; what it leaves out is said above it.
GRID_ROWS = 40


def write_samples(
    out: Path,
    plan: SamplePlan,
    read: Callable[[str], ChunkedArray],
    pngs: bool = False,
    latents: bool = False,
    class_names: Sequence[str] = (),
) -> None:
    """Write samples.npz (arr_0: images uint8 [N, H, W, C]; arr_1: classes [N]) and grid.png.

    Args:
        read: gives the `images` and the `latents` of the plan, each time from the first on.
        pngs: also write pngs/{image}.png.
        latents: also write latents.safetensors.
        class_names: written beside the images of the grid; numbers stand for them where there are none.
    """
    arrays = {"arr_0": read("images")}  # [N, H, W, C]
    if plan.labels is not None:
        labels = np.asarray(plan.labels)
        arrays["arr_1"] = ChunkedArray(labels.shape, labels.dtype, [labels])
    write_npz(out / "samples.npz", arrays, overwrite=True)
    layout = _lay_out(plan)
    found: dict[int, np.ndarray] = {}
    images = (image for piece in read("images").rows for image in piece)
    for number, image in enumerate(images):
        if pngs:
            save_image(image, out / "pngs" / f"{number:06d}.png", overwrite=True)
        if number in layout.images:
            found[number] = image
    _draw_grid(layout, np.stack([found[number] for number in layout.images]), class_names, out / "grid.png")
    if latents:
        tensors = {"latents": torch.from_numpy(np.concatenate(list(read("latents").rows)))}
        save_tensors(tensors, out / "latents.safetensors", overwrite=True)


@dataclass(frozen=True)
class _Layout:
    """Which images a grid shows, row by row, and the class that a row or a column stands for.

    Attributes:
        images: their numbers.
        columns: images in a row; None where the images have no order by class.
        rows_of, columns_of: classes of the rows, or of the columns.
        title: what the grid leaves out.
    """

    images: Sequence[int]
    columns: int | None = None
    rows_of: Sequence[int] = ()
    columns_of: Sequence[int] = ()
    title: str = ""


def _lay_out(plan: SamplePlan) -> _Layout:
    """Choose the images of a grid: up to ten of each class, a class a row or, where classes come in turn, a column."""
    if plan.labels is not None and plan.columns:
        each = plan.columns if plan.arc is not None else min(plan.columns, GRID_SIDE)
        classes = list(plan.labels[:: plan.columns])
        rows = classes[:GRID_ROWS]
        shown = [row * plan.columns + column for row in range(len(rows)) for column in range(each)]
        title = f"the first {len(rows)} of {len(classes)} classes" if len(rows) < len(classes) else ""
        return _Layout(shown, each, rows, title=title)
    cycle = _find_cycle(plan.labels)
    if plan.labels is not None and cycle:
        return _Layout(range(min(plan.count, GRID_SIDE * cycle)), cycle, columns_of=plan.labels[:cycle])
    return _Layout(range(min(plan.count, GRID_SIDE**2)), plan.columns)


def _find_cycle(labels: Sequence[int] | None) -> int | None:
    """Return the number of classes that come in turn, where a row of a grid has room for them, else None."""
    if labels is None:
        return None
    cycle = len(set(labels))
    turns = all(label == labels[place % cycle] for place, label in enumerate(labels))
    return cycle if turns and 1 < cycle <= SHOW_ALL else None


def _draw_grid(layout: _Layout, shown: NDArray[np.uint8], names: Sequence[str], path: Path) -> None:
    """Draw a grid with the names of its classes; without classes, the images alone."""
    if not (layout.rows_of or layout.columns_of):
        zoom = max(1, 64 // shown.shape[1])
        save_image(tile_images(shown, layout.columns, zoom=zoom), path, overwrite=True)
        return
    columns = layout.columns or 1
    rows = -(-len(shown) // columns)
    blank = np.full((rows * columns - len(shown), *shown.shape[1:]), 255, dtype=np.uint8)
    shown = np.concatenate([shown, blank])
    across = [_name(label, names) for label in layout.columns_of] or [""] * columns
    down = [_name(label, names) for label in layout.rows_of] or [""] * rows
    labelled_grid(shown.reshape(rows, columns, *shown.shape[1:]), path, down, across, layout.title, overwrite=True)


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if 0 <= label < len(names) else str(label)
