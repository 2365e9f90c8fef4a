"""Samples with their uncertainty: what is measured of a batch, and the pictures of maps, steps and ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step, make_sampler
from ldm.evaluation.features import Extractor
from ldm.images import DPI, Panel, beyond, save_figure, side_by_side, to_uint8, without_outliers
from ldm.pipelines import PosteriorPipeline
from ldm.uncertainty import control_maps as control_maps
from ldm.uncertainty.propagation import VarianceStep
from ldm.uncertainty.scores import SCORES, Mask, feature_entropy, score_table, total
from ldm.util import derive_seed

CONTROL_MAPS = ("energy", "edges", "differences", "seeds")


@dataclass(frozen=True)
class Measures:
    """What is measured of every image besides its map.

    Attributes:
        masks: {name: mask} of segmentation scores.
        extractor: network for the entropy of features over members; none where None.
        control_maps: of `CONTROL_MAPS`, scored by their sum.
        share, parts: of the percentile and of the patches.
        seeds: noises of the control map `seeds`, drawn from the middle of the trajectory on.
        step_maps: keep the map of every step.
    """

    masks: Mapping[str, Mask] = field(default_factory=dict)
    extractor: Extractor | None = None
    control_maps: Sequence[str] = ()
    share: float = 95.0
    parts: int = 4
    seeds: int = 8
    step_maps: bool = False


def score_names(masks: Sequence[str], controls: Sequence[str] = (), features: bool = False) -> list[str]:
    """Names of the scores that `measure_batch` gives for these masks and control maps, `features` with an extractor."""
    segmented = [f"segmentation_{name}" for name in masks]
    return [*SCORES, *segmented, *["feature_entropy"] * features, *(f"control_map_{name}" for name in controls)]


@torch.no_grad()
def measure_batch(
    posterior: PosteriorPipeline, method: str, labels: Sequence[int] | None, images: Sequence[int], measures: Measures
) -> dict[str, NDArray]:
    """Samples and their uncertainty by one of `METHODS`.

    Returns:
        images uint8 [B, H, W, C]; latents and their variance [B, c, h, w]; map [B, H, W], the pixels' variance with
        channels averaged; step_sums [B, S], the state's variance summed; step_maps [B, S, h, w] where asked for; and
        score_NAME [B] for every score.
    """
    steps, trajectory = [], []
    for last in posterior.steps(method, labels, images):
        trajectory.append(last.step)
        steps.append(last.var.mean(1) if measures.step_maps else last.var.sum((1, 2, 3)))
    pipeline, channels = posterior.pipeline, last.var.shape[1]
    stacked = torch.stack(steps, 1)
    pixels, decoded = posterior.pixel_variance(last, images), pipeline.decode(last.step.x_next)
    scores = score_table(pixels.cpu(), decoded, dict(measures.masks), measures.share, measures.parts)
    if measures.extractor is not None:
        scores["feature_entropy"] = entropy_of_members(posterior, last, measures.extractor)
    scores |= {
        f"control_map_{name}": _control_map(name, posterior, labels, images, trajectory, measures)
        for name in measures.control_maps
    }
    found = {
        "latents": last.step.x_next,
        "variance": last.var,
        "map": pixels.mean(1),
        "step_sums": channels * stacked.sum((2, 3)) if measures.step_maps else stacked,
        **({"step_maps": stacked} if measures.step_maps else {}),
        **{f"score_{name}": value for name, value in scores.items()},
    }
    arrays = {name: value.float().cpu().numpy() for name, value in found.items() if not name.startswith("score_")}
    arrays |= {name: value.double().cpu().numpy() for name, value in found.items() if name.startswith("score_")}
    return {"images": to_uint8(decoded), **arrays}


def entropy_of_members(posterior: PosteriorPipeline, last: VarianceStep, extractor: Extractor) -> Tensor:
    """`feature_entropy` of the members' decoded images [B].

    Raises:
        ValueError: for a method that samples no weights.
    """
    if last.members is None or last.tangent:
        raise ValueError("the entropy of features needs sampled members: --method persistent")
    pictures = to_uint8(posterior.pipeline.decode(last.members.flatten(0, 1)))
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(posterior.pipeline.device)
    features = torch.cat([extractor(extractor.prepared(part)) for part in pictures.split(posterior.chunk)])
    return feature_entropy(features.unflatten(0, last.members.shape[:2]))


def _control_map(
    name: str,
    posterior: PosteriorPipeline,
    labels: Sequence[int] | None,
    images: Sequence[int],
    trajectory: Sequence[Step],
    measures: Measures,
) -> Tensor:
    """Sum [B] of a map that knows no posterior."""
    pipeline = posterior.pipeline
    if name == "edges":
        return total(control_maps.edge_strength(pipeline.decode(trajectory[-1].x_next)))
    if name == "differences":
        return total(control_maps.successive_differences(trajectory))
    if name == "energy":
        features = posterior.predictive(labels).features(trajectory[-1].x, trajectory[-1].u)
        return total(control_maps.feature_energy(posterior.laplace, features))
    middle = trajectory[len(trajectory) // 2]
    sampler, denoiser = make_sampler("DDIM", eta=1.0), posterior.build(labels)(pipeline.model.network)

    def sample_again(seed: int):
        noise = ImageNoise(derive_seed("seeds", pipeline.sampling.seed, seed), tuple(images), device=pipeline.device)
        return sampler(denoiser, pipeline.model.schedule, middle.x, pipeline.times, noise=noise, start=middle.index)

    return total(control_maps.seed_variance(sample_again, measures.seeds))


def step_maps_figure(
    images: NDArray[np.uint8],
    maps: NDArray,
    times: Sequence[float],
    path: str | os.PathLike,
    columns: int = 10,
    label: str = "variance of the state",
    overwrite: bool = False,
) -> None:
    """Draw the maps of N images [N, S, h, w] at up to `columns` of S steps, images at the end, one colour scale
    (`without_outliers`).

    Args:
        images: uint8 [N, H, W, C]; times: u of each step's end [S].

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    count, steps = maps.shape[:2]
    chosen = np.unique(np.linspace(0, steps - 1, min(columns, steps)).round().astype(int))
    figure = Figure(figsize=(0.85 * (len(chosen) + 1) + 1.1, 0.85 * count + 0.45), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes, values = figure.subplots(), maps[:, chosen]
    low, high = without_outliers(values)
    drawn, across, down = _draw_tiles(axes, values, cmap="cividis", vmin=low, vmax=high if high > low else low + 1)
    for centre, step in zip(across, chosen, strict=True):
        where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(centre, 1.01, f"u = {times[step]:.3g}", **where, fontsize=7)
    height, width = maps.shape[2:]
    left = across[-1] + 0.6 * width
    for image, centre in zip(images, down, strict=True):
        extent = (left, left + width, centre + height / 2, centre - height / 2)
        picture = image[..., 0] if image.shape[-1] == 1 else image
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
    axes.set(xlim=(-0.5, left + width), ylim=(down[-1] + height / 2, down[0] - height / 2))
    bar = figure.colorbar(drawn, ax=axes, aspect=25, pad=0.01, extend=beyond(values, low, high))
    bar.set_label(label, fontsize=7)
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

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
    """
    columns = min(columns, len(images))
    rows = max(1, min(rows, len(images) // columns))
    order = np.argsort(scores, kind="stable")
    panels = []
    for chosen, title in ((order, "least"), (order[::-1], "greatest")):
        shown = images[chosen[: rows * columns]].reshape(rows, columns, *images.shape[1:])
        panels.append(Panel(shown, [""] * rows, [""] * columns, f"{title} {name}"))
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
        raise ValueError("no variance above 0 to draw")
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
