"""Samples with their uncertainty on disk: arrays, scores, and the pictures of maps, steps and ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from torch import Tensor

from ldm.files import write_arrays
from ldm.images import (
    DPI,
    Panel,
    beyond,
    heat_maps,
    save_figure,
    save_image,
    side_by_side,
    tile_images,
    to_uint8,
    without_outliers,
)
from ldm.pipelines.images import load_images
from ldm.report.tables import check_numbers, read_csv, write_csv


def choose_steps(times: Sequence[float] | NDArray, columns: int) -> list[int]:
    """Return up to `columns` places of falling times [S], evenly over the steps, the last always among them.

    Where the last but one is within a 500th of the first time from the last it is left out: its picture would be the
    same again, as of LDM's last two steps, u = 2 and u = 1 of 1,000.
    """
    steps = len(times)
    chosen = np.unique(np.linspace(0, steps - 1, min(columns, steps)).round().astype(int)).tolist()
    if len(chosen) > 2 and times[chosen[-2]] - times[chosen[-1]] <= times[0] / 500:
        del chosen[-2]
    return chosen


def step_maps_figure(
    images: NDArray[np.uint8],
    maps: NDArray,
    times: Sequence[float] | NDArray,
    path: str | os.PathLike,
    columns: int = 10,
    label: str = "variance of the state",
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Draw the maps of N images [N, S, h, w] at some of S steps (`choose_steps`), images at the end, one colour scale
    (`without_outliers`).

    Args:
        images: uint8 [N, H, W, C]; times: u of each step's end [S], 0 where the image is clean.
        names: texts at the left of the rows [N], their classes for example; none where empty.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    count = len(maps)
    chosen = choose_steps(times, columns)
    figure = Figure(figsize=(0.85 * (len(chosen) + 1) + 1.1, 0.85 * count + 0.45), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes, values = figure.subplots(), maps[:, chosen]
    low, high = without_outliers(values)
    drawn, across, down = _draw_tiles(axes, values, cmap="cividis", vmin=low, vmax=high if high > low else low + 1)
    for centre, step in zip(across, chosen, strict=True):
        where: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(centre, 1.01, f"u = {times[step]:.3g}", **where, fontsize=7)
    height, width = maps.shape[2:]
    left = across[-1] + 0.6 * width
    for image, centre in zip(images, down, strict=True):
        extent = (left, left + width, centre + height / 2, centre - height / 2)
        picture = image[..., 0] if image.shape[-1] == 1 else image
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
    axes.set(xlim=(-0.5, left + width), ylim=(down[-1] + height / 2, down[0] - height / 2))
    if names:
        axes.set_axis_on()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.set_yticks(down, list(names), fontsize=7)
    latent = f"\nof latents {height} x {width}" if maps.shape[2:] != images.shape[1:3] else ""
    beside = axes.inset_axes((1.02, 0, 0.03, 1))  # as high as the rows
    bar = figure.colorbar(drawn, cax=beside, extend=beyond(values, low, high))
    bar.set_label(f"{label}{latent}\nu: time, 0 is clean", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
    save_figure(figure, path, overwrite)


def _draw_tiles(axes: Axes, tiles: NDArray, **options: Any) -> tuple[AxesImage, NDArray, NDArray]:
    """Draw [R, K, h, w] as one picture with empty gutters between the tiles, much faster than axes for each.

    Returns the picture and the centres of columns and of rows, in pixels.
    """
    rows, columns, height, width = tiles.shape
    gap = max(1, round(0.06 * width))
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for row, column in np.ndindex(rows, columns):
        y, x = row * (height + gap), column * (width + gap)
        canvas[y : y + height, x : x + width] = tiles[row, column]
    axes.set_axis_off()
    drawn = axes.imshow(canvas, interpolation="nearest", **options)
    return drawn, *((np.arange(n) * (side + gap) + (side - 1) / 2) for n, side in ((columns, width), (rows, height)))


def ranked_figure(
    images: NDArray[np.uint8],
    scores: NDArray,
    path: str | os.PathLike,
    name: str,
    columns: int = 10,
    rows: int = 4,
    overwrite: bool = False,
) -> None:
    """Draw the most and the least certain images side by side, row by row in the order of their score.

    No image is in both: of few images there are fewer rows, or columns.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    each = max(1, len(images) // 2)
    columns = min(columns, each)
    rows = max(1, min(rows, each // columns))
    order = np.argsort(scores, kind="stable")
    panels = []
    for places, title in ((order, "least"), (order[::-1], "greatest")):
        chosen = places[: rows * columns]
        shown = images[chosen].reshape(rows, columns, *images.shape[1:])
        ends = sorted((scores[chosen[0]], scores[chosen[-1]]))
        title = f"{title} {name}\n{ends[0]:.3g} to {ends[1]:.3g}"
        panels.append(Panel(shown, [""] * rows, [""] * columns, title))
    side_by_side(panels, path, overwrite)


def sweep_figure(
    maps: NDArray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike,
    row_label: str,
    column_label: str,
    overwrite: bool = False,
) -> None:
    """Draw maps [R, K, h, w] of one image under R x K settings on one logarithmic colour scale.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if a map has no positive value.
    """
    positive = maps[maps > 0]
    if not positive.size:
        raise ValueError("every variance is 0: there is nothing to draw on a logarithmic scale")
    figure = Figure(figsize=(0.95 * maps.shape[1] + 1.5, 0.95 * maps.shape[0] + 0.8), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots()
    low, high = max(positive.min(), positive.max() * 1e-8), positive.max()
    norm = LogNorm(low, high if high > low else 10 * low)
    drawn, across, down = _draw_tiles(axes, np.maximum(maps, low), cmap="cividis", norm=norm)
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks(across, columns)
    axes.set_yticks(down, rows)
    axes.set_ylabel(row_label, fontsize=9)
    axes.set_xlabel(column_label, fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02)
    bar.set_label("variance of the pixel", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    save_figure(figure, path, overwrite)


def write_variance_report(
    out: Path,
    found: Mapping[str, NDArray],
    labels: Sequence[int] | None,
    times: Sequence[float] | NDArray,
    *,
    comment: str,
    rank_by: str,
    shown: int,
    class_names: Sequence[str] = (),
) -> None:
    """Write samples.npz, scores.csv, maps.png, steps.png and ranked.png of samples with their variances.

    Args:
        found: arrays of `ldm.experiments.variance_samples.measure_batch`, of all images.
        labels: the class of every image [N]; None for an unconditional model.
        times: u of each step's end [S].
        comment: the first line of the table.
        rank_by: the score that ranked.png is in the order of.
        shown: images in maps.png; steps.png has up to eight.
        class_names: names of the classes; numbers stand for them where there are none.
    """
    images = found["images"]
    class_names = class_names if len(class_names) > max(labels or (0,)) else ()
    kept = {name: found[name] for name in ("map", "variance", "latents", "step_sums")}
    kept["step_maps"] = found["step_maps"][:shown]
    if labels is not None:
        kept["arr_1"] = np.asarray(labels)
    write_arrays(out / "samples.npz", {"arr_0": images, "times": times, **kept}, overwrite=True, compressed=True)
    scores = {name.removeprefix("score_"): value for name, value in found.items() if name.startswith("score_")}
    rows = []
    for image in range(len(images)):
        row: dict[str, Any] = {"image": image}
        if labels is not None:
            row["class"] = int(labels[image])
            row |= {"name": class_names[labels[image]]} if class_names else {}
        rows.append({**row, **{name: float(value[image]) for name, value in scores.items()}})
    write_csv(out / "scores.csv", rows, [comment], overwrite=True)
    maps = found["map"][:shown]
    names = [class_names[label] if class_names else f"class {label}" for label in labels or ()]
    titles = names[:shown] or None
    limits = without_outliers(maps)
    label = "variance of the pixel"
    heat_maps(images[:shown], maps, out / "maps.png", label, titles=titles, limits=limits, overwrite=True)
    first = min(8, len(found["step_maps"]))
    step_maps_figure(
        images[:first], found["step_maps"][:first], times, out / "steps.png", names=names[:first], overwrite=True
    )
    ranked_figure(images, scores[rank_by], out / "ranked.png", rank_by, overwrite=True)


def name_scores(row: Mapping[str, Any]) -> list[str]:
    """Return which columns of scores.csv are scores."""
    return [name for name in row if name not in ("image", "class", "name")]


def read_scores(samples: Path) -> list[dict[str, Any]]:
    """Read the scores of a folder of samples: a row an image, with a number for each score.

    Raises:
        ValueError: if they cannot be read, or are not as many as the samples.
    """
    file, again = samples / "scores.csv", "sample again (decu laplace sample)"
    rows = read_csv(file, ("image",), again)
    check_numbers(file, rows, [*name_scores(rows[0]), *({"class"} & rows[0].keys())], again)
    count = len(load_images(samples / "samples.npz"))
    if len(rows) != count:
        raise ValueError(f"{file} has {len(rows)} rows, and there are {count} images beside it: {again}")
    return rows


def write_variants(pictures: Tensor, out: Path, kind: str, shown: int) -> None:
    """Write variants_KIND.png and .npz of variants [V, N, C, H, W] in [-1, 1]: image by image, the first `shown` in
    the picture."""
    pixels = to_uint8(pictures.transpose(0, 1).flatten(0, 1))
    count = len(pictures)
    canvas = tile_images(pixels[: shown * count], count, zoom=max(1, 48 // pixels.shape[1]))
    save_image(canvas, out / f"variants_{kind}.png", overwrite=True)
    write_arrays(out / f"variants_{kind}.npz", {"arr_0": pixels}, overwrite=True, compressed=True)
