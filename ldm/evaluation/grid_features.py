"""Features of a data set at many places of a backbone, read once: in memory, or on disk as memory maps.

A folder holds `{time}_{tap}.npy` (float32 [N, D]), `labels.npy` and `parts/`, which lets a stopped reading continue and
processes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.evaluation.extraction import join_parts, save_part, split_images
from ldm.evaluation.taps import Backbone, Place, Reading, place_name
from ldm.files import open_array
from ldm.jobs import WorkList
from ldm.util import atomic_write


class StateSource(Protocol):
    """Clean states of a model and their classes, by position; see `ldm.pipelines.states`."""

    labels: Tensor

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class GridFeatures:
    """Features of N images: {(time, tap): float32 [N, D]}, and their classes [N]."""

    arrays: Mapping[Place, NDArray[np.float32]]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def _span(
    states: StateSource, span: tuple[int, int], backbone: Backbone, reading: Reading, batch_size: int
) -> dict[Place, NDArray[np.float32]]:
    """Features of the states start .. stop - 1."""
    device = next(backbone.network.parameters()).device
    found: dict[Place, list[Tensor]] = {place: [] for place in reading.places}
    for start in range(*span, batch_size):
        images = range(start, min(start + batch_size, span[1]))
        x0 = states.read(images.start, images.stop).to(device)
        for place, value in backbone.features(x0, images, reading).items():
            found[place].append(value.cpu())
    return {place: torch.cat(values).numpy() for place, values in found.items()}


def read_features(
    states: StateSource,
    backbone: Backbone,
    reading: Reading,
    *,
    batch_size: int = 100,
    progress: Callable[[int], None] | None = None,
) -> GridFeatures:
    """All features in memory; `progress` is called with the number of images of each finished part."""
    found: dict[Place, list[NDArray[np.float32]]] = {place: [] for place in reading.places}
    for span in split_images(len(states)).values():
        for place, values in _span(states, span, backbone, reading, batch_size).items():
            found[place].append(values)
        if progress is not None:
            progress(span[1] - span[0])
    return GridFeatures({place: np.concatenate(values) for place, values in found.items()}, states.labels.numpy())


def make_feature_parts(
    states: StateSource,
    backbone: Backbone,
    reading: Reading,
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 100,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> tuple[WorkList, dict[str, tuple[int, int]]]:
    """Read what `folder` lacks of this process's share, and return all parts: {key: (start, stop)} of a work list.

    Args:
        settings: what the features depend on beside the states and the reading: the model's weights.
        shard: (rank, world): this process takes every world-th part.
        progress: called with the number of images of each finished part.

    Raises:
        ValueError: if the folder holds features of other images, weights or places.
    """
    all_settings = {"states": states.describe(), "reading": reading.describe(), **settings}
    work, parts = WorkList(Path(folder) / "parts", all_settings, shard), split_images(len(states))
    for key in work.pending(parts):
        arrays = _span(states, parts[key], backbone, reading, batch_size)
        save_part(work, key, {place_name(place): value for place, value in arrays.items()})
        if progress is not None:
            progress(parts[key][1] - parts[key][0])
    return work, parts


def load_or_make_features(
    states: StateSource,
    backbone: Backbone,
    reading: Reading,
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 100,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> GridFeatures | None:
    """Read what `folder` lacks and open it without loading it; None while parts of other processes are missing.

    Arguments and errors: see `make_feature_parts`.
    """
    work, parts = make_feature_parts(
        states, backbone, reading, folder, settings, batch_size=batch_size, shard=shard, progress=progress
    )
    folder = Path(folder)
    if not work.complete(parts):
        return None
    if not (folder / "labels.npy").exists():
        join_parts(work, list(parts), len(states), folder)
        with atomic_write(folder / "labels.npy", overwrite=True) as partial:
            np.save(partial, states.labels.numpy())
        for key in parts:
            (work.folder / f"{key}.npz").unlink(missing_ok=True)
    paths = {place: folder / f"{place_name(place)}.npy" for place in reading.places}
    again, count = f"delete {folder}, and start the command again", len(states)
    arrays = {place: open_array(path, "an array of features", again, (count, None)) for place, path in paths.items()}
    labels = open_array(folder / "labels.npy", "the labels of features", again, (count,))
    return GridFeatures(arrays, np.array(labels))
