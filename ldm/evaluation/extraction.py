"""Features of a set of images, on disk: extracted in parts that processes share, then read as memory maps.

A folder holds `pooled.npy`, `logits.npy`, `spatial.npy` (those the extractor gives, float32 [N, .]), `statistics.npz`
(mu, sigma, mu_s, sigma_s, as published ones) and `parts/`, which lets a stopped extraction continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.arguments import check_value
from ldm.evaluation.features import Activations, Extractor
from ldm.evaluation.statistics import (
    PUBLISHED_NAMES,
    FeatureArray,
    FeatureStatistics,
    load_statistics,
    moments,
    save_statistics,
)
from ldm.files import open_array, read_arrays, read_mapping, reading, write_arrays
from ldm.jobs import WorkList
from ldm.memory import keep_freed_memory
from ldm.trust import accept, find_targets, trusting
from ldm.util import atomic_write

FEATURE_KINDS = Activations._fields
# Images in a part: what a process takes at once, and what is lost when it is stopped.
PART = 500


class ImageSet(Protocol):
    """Images uint8 [B, C, H, W] by position; see `ldm.pipelines.images`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


# (images uint8 [B, C, H, W], their positions) -> images
Change = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images in the order of their source: any of pooled [N, D], logits [N, K], spatial [N, S].

    `given` holds statistics without features, as published files do.
    """

    pooled: FeatureArray | None = None
    logits: FeatureArray | None = None
    spatial: FeatureArray | None = None
    given: Mapping[str, FeatureStatistics] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return 0 if self.pooled is None else len(self.pooled)

    def has_statistics(self, kind: str) -> bool:
        """True if there are features or statistics of a kind."""
        return kind in self.given or getattr(self, kind) is not None

    def statistics(self, kind: str, device: str | torch.device = "cpu") -> FeatureStatistics:
        """Mean and covariance of a kind of features, "pooled" or "spatial"."""
        if kind in self.given:
            return self.given[kind]
        return moments(getattr(self, kind), device=device).statistics()

    def rows(self, chosen: NDArray[np.int64]) -> FeatureSet:
        """The features of some images, in memory, in the order given."""
        kinds = {kind: getattr(self, kind) for kind in FEATURE_KINDS}
        return FeatureSet(
            **{kind: None if value is None else np.asarray(value[chosen]) for kind, value in kinds.items()}
        )


def split_images(count: int) -> dict[str, tuple[int, int]]:
    """{key: (start, stop)} of every part."""
    spans = [(start, min(start + PART, count)) for start in range(0, count, PART)]
    return {f"{start:07d}_{stop - start}": (start, stop) for start, stop in spans}


@torch.no_grad()
def compute_activations(
    source: ImageSet,
    span: tuple[int, int],
    extractor: Extractor,
    batch_size: int,
    device: str | torch.device,
    change: Change | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """{kind: float32 [stop - start, .]} of the images start .. stop - 1."""
    found: list[Activations] = []
    for start in range(*span, batch_size):
        stop = min(start + batch_size, span[1])
        images = source.read(start, stop)
        if change is not None:
            images = change(images, range(start, stop))
        found.append(extractor.activations(images.to(device)))
        if progress is not None:
            progress(stop - start)
    kinds = [kind for kind in FEATURE_KINDS if getattr(found[0], kind) is not None]
    return {kind: torch.cat([getattr(part, kind) for part in found]).float().cpu().numpy() for kind in kinds}


def extract(
    source: ImageSet,
    extractor: Extractor,
    folder: str | Path,
    *,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    shard: tuple[int, int] = (0, 1),
    change: Change | None = None,
    change_settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeatureSet | None:
    """Extract what `folder` lacks and open it; None while parts of other processes are missing.

    Args:
        source: the images.
        extractor: the network, on `device`.
        shard: (rank, world): this process takes every world-th part.
        change: applied to the images before the network, a distortion for example; `change_settings` name it.
        progress: called with the number of images of each batch, first with those that are not left to this process.

    Raises:
        ValueError: if the folder holds features of other images or another network.
    """
    folder = Path(folder)
    settings = {
        "images": source.describe(),
        "features": extractor.describe(),
        "change": dict(change_settings) if change_settings else None,
    }
    work, parts = WorkList(folder / "parts", settings, shard), split_images(len(source))
    if not parts:
        raise ValueError("there are no images to measure")
    pending = work.pending(parts)
    keep_freed_memory()
    if progress is not None:
        progress(len(source) - sum(parts[key][1] - parts[key][0] for key in pending))
    for key in pending:
        save_part(work, key, compute_activations(source, parts[key], extractor, batch_size, device, change, progress))
    if not work.complete(parts):
        return None
    if not (folder / "statistics.npz").exists():
        _join(work, list(parts), len(source), folder)
    # The work list holds these settings, which the caller named.
    named = [("", settings["features"]["extractor"]), *find_targets(settings)]
    with trusting({target for _, target in named if "." in str(target)}):
        return open_features(folder)


def join_parts(work: WorkList, keys: Sequence[str], count: int, folder: Path) -> list[str]:
    """Write the parts `{key}.npz` as one array [count, .] a name, `{name}.npy`; return the names."""
    names = list(work.load(keys[0]))
    for name in names:
        width = work.load(keys[0])[name][1]
        with atomic_write(folder / f"{name}.npy", overwrite=True) as partial:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, width))
            start = 0
            for key in keys:
                part, again = work.folder / f"{key}.npz", work.again(key)
                rows = read_arrays(part, [name], "a part of the features", again)[name]
                with reading(part, "a part of these features", again):
                    array[start : start + work.load(key)[name][0]] = rows
                start += len(rows)
            array.flush()
            del array
    return names


def _join(work: WorkList, keys: list[str], count: int, folder: Path) -> None:
    """Write the parts as one array a kind, and their statistics; the statistics last, as a sign that all is there."""
    statistics = {}
    for kind in join_parts(work, keys, count, folder):
        if kind in PUBLISHED_NAMES and count > 1:
            statistics[kind] = moments(open_array(folder / f"{kind}.npy", "an array of features")).statistics()
    save_statistics(statistics, folder / "statistics.npz", overwrite=True)


def save_part(work: WorkList, key: str, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Write the arrays of a part and mark it as done."""
    write_arrays(work.folder / f"{key}.npz", arrays, overwrite=True)
    work.save(key, {name: list(array.shape) for name, array in arrays.items()})


FEATURES = "the settings of features"
# What they say of the network that made them; what is absent is None.
_MADE: dict[str, Any] = {
    "extractor": str,
    "weights": str | None,
    "params": Mapping[str, Any] | None,
    "channels": int | None,
}
EXTRACT_AGAIN = "extract the features again (decu evaluate reference) into another folder"


def is_feature_folder(path: str | Path) -> bool:
    """Whether a folder is one of `extract`, complete or not."""
    return any((Path(path) / name).exists() for name in ("parts/settings.json", "statistics.npz"))


def open_features(folder: str | Path) -> FeatureSet:
    """Open a folder of `extract` without reading the features into memory.

    Raises:
        FileNotFoundError: if the extraction was not completed.
        ValueError: if a file is damaged, or it names a network that is not known (`ldm.trust`).
    """
    folder = Path(folder)
    needed = (folder / "parts" / "settings.json", folder / "statistics.npz")
    if not all(file.is_file() for file in needed):
        raise FileNotFoundError(f"{folder} holds no complete features; run `decu evaluate reference` (again)")
    paths = {kind: folder / f"{kind}.npy" for kind in FEATURE_KINDS}
    arrays = {}
    for kind, path in paths.items():
        if path.exists():
            arrays[kind] = open_array(path, "an array of features", EXTRACT_AGAIN, (None, None))
    lengths = {kind: len(array) for kind, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the features in {folder} are of different numbers of images, {lengths}: {EXTRACT_AGAIN}")
    settings, statistics = read_mapping(needed[0], FEATURES, EXTRACT_AGAIN, ("features",)), load_statistics(needed[1])
    for kind, one in statistics.items():
        if kind in arrays and arrays[kind].shape[1] != len(one.mean):
            widths = f"{len(one.mean)} features, and {paths[kind]} of {arrays[kind].shape[1]}"
            raise ValueError(f"{needed[1]} is of {widths}: {EXTRACT_AGAIN}")
    made = settings["features"]
    for key, hint in _MADE.items():
        given = made.get(key) if isinstance(made, dict) else None
        with reading(needed[0], FEATURES, EXTRACT_AGAIN):
            check_value(given, hint, f"features.{key}")
    if "." in made["extractor"]:
        accept({"features": {"target": made["extractor"]}}, folder)
    return FeatureSet(**arrays, given=statistics, settings=accept(settings, folder))
