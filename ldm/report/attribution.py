"""The figure of an attribution: samples with the training pictures that carry them and their certainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ldm.images import save_figure

# Samples drawn at most.
MOST_SAMPLES = 12


def nearness(trained: NDArray, pictures: NDArray) -> NDArray[np.float64]:
    """Return the distance of each training picture from each sample [G, N], root mean square of -1 .. 1.

    Args:
        trained: [G, H, W, C] in [-1, 1]; pictures: bytes [N, H, W, C].
    """
    a = trained.reshape(len(trained), -1).astype(np.float64)
    b = pictures.reshape(len(pictures), -1).astype(np.float64) / 127.5 - 1
    if a.shape[1] != b.shape[1]:
        return np.full((len(a), len(b)), np.nan)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(squares.clip(min=0) / a.shape[1])


def attribution_figure(
    pictures: NDArray,
    trained: NDArray,
    certainty: NDArray,
    mean: NDArray,
    maps: Sequence[Sequence[NDArray]],
    top: int,
    path: Path,
    sample_names: Sequence[str] = (),
    trained_names: Sequence[str] = (),
) -> None:
    """Draw a row for each sample: the sample, the pictures that carry its certainty and its mean, and two maps.

    Args:
        pictures: samples, bytes [N, H, W, C]; trained: [G, H, W, C] in [-1, 1].
        certainty, mean: what the pictures carry [G, N].
        maps: of each sample the change of the mean and the rise of the variance by its first picture [h, w].
        top: pictures of either kind.
        sample_names, trained_names: classes of the samples [N] and of the training pictures [G]; none where empty.
    """
    count = min(len(pictures), MOST_SAMPLES)
    columns = 3 + 2 * top
    high = 1.1 if trained_names else 0.95
    figure = Figure(figsize=(0.8 * columns + 0.4, high * count + 0.5), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False)
    for sample in range(count):
        row = grid[sample]
        words = ["sample"] if sample == 0 else []
        words += sample_names[sample : sample + 1]
        _draw(row[0], (pictures[sample] / 127.5 - 1), "\n".join(words))
        for offset, (kind, values) in enumerate((("certainty", certainty), ("mean", mean))):
            order = np.argsort(-values[:, sample], kind="stable")[:top]
            for rank, place in enumerate(order):
                title = f"{kind}\n" if sample == 0 and rank == 0 else ""
                shown = f"{100 * values[place, sample]:.2g}%" if kind == "certainty" else f"{values[place, sample]:.1e}"
                of = f"{trained_names[place]}\n" if trained_names else ""
                _draw(row[1 + offset * top + rank], trained[place], title + of + shown)
        for offset, (name, values) in enumerate(zip(("mean map", "certainty map"), maps[sample], strict=True)):
            axes = row[1 + 2 * top + offset]
            reach = float(np.abs(values).max()) or 1.0
            scale = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if offset == 0 else {"cmap": "magma", "vmin": 0}
            axes.imshow(values, **scale)
            axes.set_title(name if sample == 0 else "", fontsize=6)
            axes.set_axis_off()
    figure.suptitle("Training pictures that carry each sample's certainty (rise of its variance) and mean", fontsize=8)
    save_figure(figure, path, overwrite=True)


def _draw(axes, picture: NDArray, title: str) -> None:
    """Draw one picture [H, W, C] in [-1, 1] without axes."""
    shown = ((picture + 1) / 2).clip(0, 1)
    axes.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=6)
    axes.set_axis_off()
