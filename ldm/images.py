"""Images in and out: [-1, 1] floats to bytes, grids, labelled grids, heat maps with one colour bar, saving.

Where a function takes `images` it takes a float tensor [..., C, H, W] in [-1, 1] or uint8 arrays [..., H, W, C] as
`to_uint8` returns them; C is 1 or 3.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.fonts import save_with_letters
from ldm.util import atomic_write

ImageArray = Tensor | NDArray[np.uint8]
DPI = 150
NO_DATES = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None}}
# Images smaller than this many pixels are enlarged by a whole factor in figures, so that 8 x 8 digits can be seen.
READABLE_PIXELS = 96
GRID_PADDING = 4


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Round [B, C, H, W] in [-1, 1] to bytes [B, H, W, C]: 127.5 (x + 1), values outside clipped to 0 and 255.

    Raises:
        ValueError: if the shape is another, or a value is NaN or infinite (such a sample has diverged).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(f"expected a float tensor [B, 1 or 3, H, W], got {images.dtype} {tuple(images.shape)}")
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"images {broken[:10]} of {len(images)} hold NaN or infinite values: the sampler or decoder diverged; "
            "look at its latents (half precision? guidance scale?) before saving"
        )
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def tile_images(
    images: ImageArray, columns: int | None = None, padding: int = 2, zoom: int = 1, fill: int = 255
) -> NDArray[np.uint8]:
    """Lay N images out row by row, each pixel enlarged to zoom x zoom, with `padding` pixels between and around.

    Args:
        images: float tensor [N, C, H, W] in [-1, 1] or uint8 [N, H, W, C].
        columns: images in a row; None takes ceil(sqrt(N)).
        padding: pixels, after enlarging.
        zoom: whole enlargement factor, nearest neighbour.
        fill: grey value (0 .. 255) of the padding and of empty places.

    Returns:
        uint8 [rows (zoom H + padding) + padding, columns (zoom W + padding) + padding, C].

    Raises:
        ValueError: if there are no images, or a count is below its minimum.
    """
    pixels = _as_bytes(images, axes=4)
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if count == 0 or columns < 1 or padding < 0 or zoom < 1:
        raise ValueError(
            f"expected at least 1 image, columns >= 1, padding >= 0, zoom >= 1; got {count} images, columns {columns}, "
            f"padding {padding}, zoom {zoom}"
        )
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    step_y, step_x = zoom * height + padding, zoom * width + padding
    rows = math.ceil(count / columns)
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, channels), fill, dtype=np.uint8)
    for index, image in enumerate(pixels):
        y, x = padding + index // columns * step_y, padding + index % columns * step_x
        canvas[y : y + zoom * height, x : x + zoom * width] = image
    return canvas


def save_image(image: NDArray[np.uint8], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write uint8 [H, W, 1 or 3] atomically, in the format that the path's suffix names.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if the array has another type or shape.
    """
    pixels = _as_bytes(image, axes=3)
    with atomic_write(path, overwrite) as file:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file)


def save_figure(figure: Figure, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write a figure atomically as PNG or PDF; the same figure gives the same bytes, since no date is stored.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if the suffix is neither .png nor .pdf.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in NO_DATES:
        raise ValueError(f"figures are saved as .png or .pdf, got '{path}'")
    draw = partial(figure.savefig, dpi=DPI, metadata=NO_DATES[suffix], bbox_inches="tight", pad_inches=0.12)
    with atomic_write(path, overwrite) as file:
        save_with_letters(figure, partial(draw, file))


def labelled_grid(
    images: ImageArray,
    path: str | os.PathLike,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Draw R x K images with the labels of their rows (left) and columns (below).

    Args:
        images: float tensor [R, K, C, H, W] in [-1, 1] or uint8 [R, K, H, W, C].
        path: .png or .pdf.
        row_labels, column_labels: R and K texts.
        title: text above the grid.
        overwrite: replace an existing file.

    Raises:
        FileExistsError, ValueError: as `save_figure` and `to_uint8`; or if the number of labels does not fit.
    """
    side_by_side([Panel(images, row_labels, column_labels, title)], path, overwrite)


class Panel(NamedTuple):
    """One labelled grid of a figure; the arguments of `labelled_grid`."""

    images: ImageArray
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    title: str = ""


def side_by_side(panels: Sequence[Panel], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Draw labelled grids beside each other, aligned at the top, on one scale.

    Raises:
        FileExistsError, ValueError: as `labelled_grid`; or if there is no panel.
    """
    if not panels:
        raise ValueError("a figure needs at least one panel")
    canvases = []
    for images, row_labels, column_labels, _ in panels:
        pixels = _as_bytes(images, axes=5)
        rows, columns, height, width = pixels.shape[:4]
        if (len(row_labels), len(column_labels)) != (rows, columns):
            raise ValueError(
                f"images [{rows}, {columns}, ...] need {rows} row and {columns} column labels, got {len(row_labels)} "
                f"and {len(column_labels)}"
            )
        flat = pixels.reshape(-1, *pixels.shape[2:])
        zoom = max(1, math.ceil(READABLE_PIXELS / min(height, width)))
        canvases.append(tile_images(flat, columns, GRID_PADDING, zoom))
    gaps = [0.0, *(0.35 + 0.07 * max(map(len, panel.row_labels), default=0) for panel in panels[1:])]
    total = sum(gaps) + sum(canvas.shape[1] for canvas in canvases) / DPI
    tallest = max(canvas.shape[0] for canvas in canvases) / DPI
    figure, left = _figure(total, tallest), 0.0
    for gap, canvas, panel in zip(gaps, canvases, panels, strict=True):
        width, height = canvas.shape[1] / DPI, canvas.shape[0] / DPI
        place = ((left + gap) / total, 1 - height / tallest, width / total, height / tallest)
        _draw_grid(figure.add_axes(place, frameon=False), canvas, panel)
        left += gap + width
    save_figure(figure, path, overwrite)


def _draw_grid(axes, canvas: NDArray[np.uint8], panel: Panel) -> None:
    """A canvas of `tile_images` with the labels of its cells."""
    _show(axes, canvas)
    rows, columns = len(panel.row_labels), len(panel.column_labels)
    cell_y, cell_x = (canvas.shape[0] - GRID_PADDING) // rows, (canvas.shape[1] - GRID_PADDING) // columns
    # A letter of size 8 is about 5 points wide; labels are wrapped to their column, or turned if a word is too long.
    letters = max(1, int(cell_x * 72 / DPI / 5))
    narrow = max(len(word) for label in panel.column_labels for word in [*label.split(), ""]) > letters
    texts = list(panel.column_labels) if narrow else [_wrap(label, letters) for label in panel.column_labels]
    axes.set_xticks((np.arange(columns) + 0.5) * cell_x, texts, rotation=90 if narrow else 0, fontsize=8)
    axes.set_yticks((np.arange(rows) + 0.5) * cell_y, panel.row_labels, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(panel.title, fontsize=10)


def heat_maps(
    images: ImageArray,
    maps: Tensor | NDArray[np.floating],
    path: str | os.PathLike,
    label: str = "nats",
    titles: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    columns: int = 8,
    overwrite: bool = False,
) -> None:
    """Draw N images with their maps below, all maps on one colour scale with one colour bar.

    Args:
        images: float tensor [N, C, H, W] in [-1, 1] or uint8 [N, H, W, C].
        maps: [N, h, w], finite; their resolution may differ from the images'.
        path: .png or .pdf.
        label: quantity and unit at the colour bar.
        titles: N texts above the images.
        limits: ends of the colour scale in the maps' unit; None takes 0 (or the least value below it) to the maximum.
            Where values lie beyond them the colour bar ends in an arrow.
        columns: pairs in a row.
        overwrite: replace an existing file.

    Raises:
        FileExistsError, ValueError: as `save_figure` and `to_uint8`; or if the numbers differ or a map is not finite.
    """
    pixels = _as_bytes(images, axes=4)
    values = torch.as_tensor(maps).detach().double().cpu().numpy()
    titles = [""] * len(pixels) if titles is None else titles
    if values.ndim != 3 or not len(values) == len(pixels) == len(titles) > 0:
        raise ValueError(
            f"expected N images, maps [N, h, w] and N titles; got {len(pixels)}, {values.shape}, {len(titles)}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"maps {np.flatnonzero(~np.isfinite(values).all((1, 2))).tolist()} hold NaN or infinity")
    low, high = limits if limits is not None else (min(0.0, values.min()), values.max())
    high = high if high > low else low + 1
    columns = min(columns, len(pixels))
    blocks = math.ceil(len(pixels) / columns)
    figure = _figure(1.15 * columns + 0.7, 2.45 * blocks + 0.1)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, value, title) in enumerate(zip(pixels, values, titles, strict=True)):
        above, below = grid[2 * (index // columns) :, index % columns][:2]
        _show(above, image)
        above.set_title(title, fontsize=7, pad=3)
        drawn = below.imshow(
            value, cmap="cividis", vmin=low, vmax=high if high > low else low + 1, interpolation="nearest"
        )
    bar = figure.colorbar(drawn, ax=list(grid.flat), aspect=25 * blocks, pad=0.02, extend=beyond(values, low, high))
    bar.set_label(_wrap(label, 32 * blocks), fontsize=8)  # no longer than the bar
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    save_figure(figure, path, overwrite)


def beyond(values: NDArray, low: float, high: float) -> str:
    """Matplotlib's `extend` of a colour bar from low to high: which ends values lie beyond."""
    ends = (bool(values.min() < low), bool(values.max() > high))
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[ends]


def without_outliers(values: NDArray, share: float = 99.5) -> tuple[float, float]:
    """Limits of a colour scale: 0 (or the least value below it) to what `share` percent of the values do not exceed.

    A map's scale would else be that of its one greatest pixel, all others dark.
    """
    low, high = min(0.0, float(values.min())), float(np.percentile(values, share))
    return low, high if high > low else float(values.max())


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, outside matplotlib's global state."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _show(axes, image: NDArray[np.uint8]) -> None:
    """Draw uint8 [H, W, C] with its pixel edges at whole coordinates."""
    height, width, channels = image.shape
    picture = image[..., 0] if channels == 1 else image
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=(0, width, height, 0))


def _wrap(label: str, letters: int) -> str:
    return "\n".join(piece for line in label.split("\n") for piece in textwrap.wrap(line, letters) or [""])


def _as_bytes(images: ImageArray, axes: int) -> NDArray[np.uint8]:
    """Bytes [..., H, W, C] with `axes` axes, from such bytes or from floats [..., C, H, W]."""
    if isinstance(images, Tensor) and images.is_floating_point() and images.ndim == axes and axes >= 4:
        flat = to_uint8(images.reshape(-1, *images.shape[-3:]))
        return flat.reshape(*images.shape[:-3], *flat.shape[1:])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != axes:
        kind, shape = getattr(images, "dtype", type(images).__name__), tuple(getattr(images, "shape", ()))
        raise ValueError(
            f"expected uint8 numpy with {axes} axes [..., H, W, C]{' or a float tensor [..., C, H, W]' * (axes > 3)}, "
            f"got {kind} {shape}; `to_uint8` converts tensors"
        )
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels in the last axis, got shape {images.shape}")
    return images
