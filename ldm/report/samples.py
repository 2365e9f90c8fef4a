"""What a folder of samples holds: a grid of the first, the file of all, and pictures of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ldm.checkpoint import save_tensors
from ldm.data.npz import ChunkedArray, write_npz
from ldm.images import save_image, tile_images
from ldm.pipelines.sampling import SamplePlan

GRID_SIDE = 10


def write_samples(
    out: Path, plan: SamplePlan, read: Callable[[str], ChunkedArray], pngs: bool = False, latents: bool = False
) -> None:
    """Write samples.npz (arr_0: images uint8 [N, H, W, C]; arr_1: classes [N]) and grid.png.

    Args:
        read: gives the `images` and the `latents` of the plan, each time from the first on.
        pngs: also write pngs/{image}.png.
        latents: also write latents.safetensors.
    """
    arrays = {"arr_0": read("images")}  # [N, H, W, C]
    if plan.labels is not None:
        labels = np.asarray(plan.labels)
        arrays["arr_1"] = ChunkedArray(labels.shape, labels.dtype, [labels])
    write_npz(out / "samples.npz", arrays, overwrite=True)
    columns = _columns(plan)
    wanted = _shown_images(plan, columns)
    found: dict[int, np.ndarray] = {}
    images = (image for piece in read("images").rows for image in piece)
    for number, image in enumerate(images):
        if pngs:
            save_image(image, out / "pngs" / f"{number:06d}.png", overwrite=True)
        if number in wanted:
            found[number] = image
    shown = np.stack([found[number] for number in wanted])
    zoom = max(1, 64 // shown.shape[1])
    save_image(tile_images(shown, columns, zoom=zoom), out / "grid.png", overwrite=True)
    if latents:
        tensors = {"latents": torch.from_numpy(np.concatenate(list(read("latents").rows)))}
        save_tensors(tensors, out / "latents.safetensors", overwrite=True)


def _columns(plan: SamplePlan) -> int | None:
    """Return the columns of the grid, where a row is a class: all frames of an arc, else up to ten images."""
    if not plan.columns:
        return None
    return plan.columns if plan.arc is not None else min(plan.columns, GRID_SIDE)


def _shown_images(plan: SamplePlan, columns: int | None) -> list[int]:
    """Return the numbers of the images in the grid: the first ones, or the first `columns` of each class."""
    if columns is None or plan.columns is None:
        return list(range(min(plan.count, GRID_SIDE**2)))
    rows = min(plan.count // plan.columns, GRID_SIDE)
    return [row * plan.columns + column for row in range(rows) for column in range(columns)]
