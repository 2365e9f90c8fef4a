"""Figures of variances along a flow and its diffusion twin: curves over steps, images between their maps, step counts.

States of different paths are compared as x / (alpha + sigma), in which data and noise have the share of a straight
path, against the noise share sigma / (alpha + sigma): so a flow with 10 steps and a diffusion with 50 have one axis.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ldm.experiments.flow_study import VarianceTrajectory
from ldm.experiments.flow_study import sample_trajectory as sample_trajectory
from ldm.images import DPI, beyond, save_figure, to_uint8, without_outliers
from ldm.report.plots import COLOURS, LINES, MARKERS
from ldm.report.tiles import make_tiles

# How `imshow` draws a picture of bytes.
GREY = {"cmap": "gray", "vmin": 0, "vmax": 255}
# A legend at the right of its axes, where it covers no line.
LEGEND_BESIDE: dict[str, Any] = {"fontsize": 7, "frameon": False, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def curves_by_class(
    trajectories: Sequence[VarianceTrajectory], path: str | os.PathLike, overwrite: bool = False
) -> None:
    """Mean variance of an element over the trajectory, a line a class, a panel a model, one vertical scale."""
    figure, panels = _panels(len(trajectories))
    for axes, trajectory in zip(panels, trajectories, strict=True):
        labels = np.asarray(trajectory.labels)
        for label in sorted(set(trajectory.labels)):
            mean = trajectory.totals[:, labels == label].mean(1)
            look = {"color": COLOURS[label % len(COLOURS)], "ls": LINES[label // len(COLOURS) % len(LINES)]}
            axes.plot(trajectory.shares.numpy(), mean.numpy(), label=str(label), linewidth=1.2, **look)
        _share_axis(axes, f"{trajectory.name}, {len(trajectory.shares) - 1} steps")
    panels[0].set_ylabel("variance of an element", fontsize=8)
    panels[-1].legend(title="class", title_fontsize=7, **LEGEND_BESIDE)
    save_figure(figure, path, overwrite)


def curves_by_pixel(
    trajectories: Sequence[VarianceTrajectory], path: str | os.PathLike, image: int = 0, overwrite: bool = False
) -> None:
    """Variance of single elements of an image over the trajectory: the greatest, the median, the least, their mean."""
    figure, panels = _panels(len(trajectories))
    for axes, trajectory in zip(panels, trajectories, strict=True):
        elements = trajectory.variances[:, image].flatten(1).numpy()  # [S + 1, D]
        shares = trajectory.shares.numpy()
        order, width = elements[-1].argsort(), trajectory.variances.shape[-1]
        shown = ((-1, "greatest"), (-len(order) // 4, "upper quarter"), (len(order) // 2, "median"), (0, "least"))
        for (place, name), colour in zip(shown, COLOURS, strict=False):
            element = int(order[place])
            where = f"({element // width % trajectory.variances.shape[-2]}, {element % width})"
            axes.plot(shares, elements[:, element], label=f"{name} {where}", linewidth=1.2, color=colour)
        axes.plot(shares, elements.mean(1), label="mean", color="black", linestyle=":", linewidth=1.2)
        axes.legend(title="element (row, column)", title_fontsize=7, **LEGEND_BESIDE)
        _share_axis(axes, f"{trajectory.name}, class {trajectory.labels[image]}")
    panels[0].set_ylabel("variance of an element", fontsize=8)
    save_figure(figure, path, overwrite)


def interleaved(
    trajectory: VarianceTrajectory, path: str | os.PathLike, count: int = 5, columns: int = 11, overwrite: bool = False
) -> None:
    """States and, below each, their variance maps, from noise to image; all maps on one scale (`without_outliers`)."""
    chosen = np.unique(
        np.linspace(0, len(trajectory.shares) - 1, min(columns, len(trajectory.shares))).round().astype(int)
    )
    count = min(count, len(trajectory.labels))
    maps = trajectory.variances[:, :count].mean(2)
    values = maps[chosen].numpy()
    high = without_outliers(values)[1] or 1.0
    figure = _figure(0.8 * len(chosen) + 0.9, 1.6 * count + 0.3, w_pad=0.02, h_pad=0.02)
    tiles = make_tiles(figure, 2 * count, len(chosen), maps.shape[-2] / maps.shape[-1])
    rows = [text for label in trajectory.labels[:count] for text in (f"class {label}", "variance")]
    tiles.label(rows, [f"{float(trajectory.shares[step]):.2f}" for step in chosen])
    for column, step in enumerate(chosen):
        for row in range(count):
            tiles.draw(2 * row, column, _picture(trajectory, step, row), **GREY)
            drawn = tiles.draw(2 * row + 1, column, maps[step, row].numpy(), cmap="cividis", vmin=0, vmax=high)
    bar = figure.colorbar(drawn, ax=tiles.axes, aspect=30, pad=0.01, extend=beyond(values, 0.0, high))
    bar.set_label("variance of an element of the state", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(f"{trajectory.name}: states and variances by noise share", fontsize=8)
    save_figure(figure, path, overwrite)


def _picture(trajectory: VarianceTrajectory, step: int, row: int) -> np.ndarray:
    """The last state as its picture, others as their first one or three channels."""
    if step == len(trajectory.shares) - 1:
        image = trajectory.pictures[row]
    else:
        state = trajectory.states[step, row]
        image = state[: 3 if len(state) >= 3 else 1].clamp(-1, 1)
    pixels = to_uint8(image[None].float())[0]
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def maps_by_method(
    pictures: Tensor,
    maps: Mapping[str, Tensor],
    path: str | os.PathLike,
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Draw N images and their maps [N, h, w] by several methods, a row a method, each row on its own scale.

    The ends of a row's scale are printed beside it: patterns compare, and scales read. `names` stand above the images.
    """
    count = len(pictures)
    figure = _figure(0.8 * count + 2.4, 0.82 * (len(maps) + 1), w_pad=0.02, h_pad=0.02)
    tiles = make_tiles(figure, len(maps) + 1, count, pictures.shape[-2] / pictures.shape[-1])
    for column, pixels in enumerate(to_uint8(pictures.float())):
        tiles.draw(0, column, pixels.squeeze(), **GREY)
    texts = [""]
    for row, (name, values) in enumerate(maps.items(), start=1):
        low, high = min(0.0, float(values.min())), float(values.max())
        for column in range(count):
            tiles.draw(row, column, values[column].numpy(), cmap="cividis", vmin=low, vmax=high)
        texts.append(f"{name}\n{low:.2g} .. {high:.2g}" if low < 0 else f"{name}\nto {high:.2g}")
    tiles.label(texts, names, size=6)
    save_figure(figure, path, overwrite)


def against_steps(
    lines: Mapping[str, Mapping[int, float]],
    path: str | os.PathLike,
    label: str,
    log: bool = True,
    overwrite: bool = False,
) -> None:
    """One number against the number of steps, a line a method."""
    figure, (axes,) = _panels(1)
    for number, (name, values) in enumerate(lines.items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(list(values), list(values.values()), markersize=3, linewidth=1.2, label=name, **look)
    axes.set_xscale("log")
    axes.set_yscale("log" if log else "linear")
    ticks = sorted({count for values in lines.values() for count in values})
    axes.set_xticks(ticks, [str(count) for count in ticks], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.legend(**LEGEND_BESIDE)
    save_figure(figure, path, overwrite)


def _panels(count: int):
    figure = _figure(3.6 * count + 0.6, 3.0)
    panels = list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    for axes in panels:
        axes.tick_params(labelsize=7)
    return figure, panels


def _figure(width: float, height: float, **pads: float) -> Figure:
    """A figure in inches, whose layout keeps its parts apart; `pads` are those of the constrained layout, in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", **pads)
    return figure


def _share_axis(axes, title: str) -> None:
    axes.set_xlim(1, 0)
    axes.set_xlabel("noise share, from noise to data", fontsize=8)
    axes.set_title(title, fontsize=9)
