"""A cache of latents: what the frozen first stage makes of a data set's images, encoded once and read from disk.

    {folder}/{key}/latents_{block}.npy   float32 [images, views, h, w, c], before scaling; memory-mapped
    {folder}/{key}/deviations_{block}.npy  the same of a KL first stage's standard deviations; the latents are its means
    {folder}/{key}/index_{block}.npy     image that each row shows (another than its own where a file is broken)
    {folder}/{key}/{block}.json          written when the block is complete: what is there is not encoded again

The key hashes the first stage (config and weights), the data set, its transform and the number of views, so another of
them gives another folder. Members of an ensemble see parts of one data set and share its cache. Of a transform that
draws, `views` crops and flips of each image are kept: epoch e shows in the d-th repeat of an image the one that epoch
(e + d) mod views draws, so the first `views` epochs are those of encoding on the fly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ldm.data.base import LabelledImages
from ldm.data.loading import Loader
from ldm.files import open_array
from ldm.jobs import WorkList
from ldm.util import atomic_write

_BLOCK = 2048  # images of a file
_PROBED = 8  # images whose pixels go into the key
# Images [B, C, H, W] -> (latents [B, c, h, w],), or (means, standard deviations).
Encode = Callable[[Tensor], tuple[Tensor, ...]]
_PARTS = ("latents", "deviations")


def innermost(data: Any) -> LabelledImages:
    """The full data set behind subsets.

    Raises:
        ValueError: if it is none of this project's.
    """
    while not isinstance(data, LabelledImages) and hasattr(data, "dataset"):
        data = data.dataset
    if not isinstance(data, LabelledImages):
        raise ValueError(f"latent_cache needs a data set of ldm.data (LabelledImages), got {type(data).__name__}")
    return data


def is_random(data: LabelledImages) -> bool:
    """Whether the transform draws: whether images differ between epochs."""
    before = data.epoch
    shown = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        shown.append([data.item(index)["image"] for index in _spread(len(data._all_labels))])
    data.set_epoch(before)
    return any(not torch.equal(*pair) for pair in zip(*shown, strict=True))


def _spread(count: int) -> list[int]:
    return sorted({place * (count - 1) // (_PROBED - 1) for place in range(_PROBED)})


def count_views(data: LabelledImages, asked: int | None) -> int:
    """Number of views of each image: 1 without random crops or flips, else as many as were asked for.

    Raises:
        ValueError: if the transform draws and nothing was asked for, or gives more than an image, as `NonLeaky` does.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"data.params.latent_views must be at least 1, got {asked}")
    if labels := sorted(set(data.item(0)) - {"image"} - set(data.describe(0))):
        raise ValueError(
            f"the latent cache keeps images, and this transform also gives {', '.join(labels)}, which the network "
            "would not be conditioned on: leave out data.params.latent_cache, or use a transform that changes the "
            "image alone"
        )
    if not is_random(data):
        return 1
    if asked is None:
        raise ValueError(
            "the training images are cropped or flipped at random: say how many views of each image the latent cache "
            "keeps (data.params.latent_views=10), or make them deterministic (random_crop: false, flip: false)"
        )
    return asked


def describe_data(data: LabelledImages) -> dict[str, Any]:
    """What the items of the full data set depend on: labels, files, transform, and the pixels of some of them."""
    digest = hashlib.sha256(data._all_labels.numpy().tobytes())
    digest.update("\n".join(data.relpaths or ()).encode())
    before = data.epoch
    data.set_epoch(0)
    for index in _spread(len(data._all_labels)):
        digest.update(data.item(index)["image"].contiguous().numpy().tobytes())
    data.set_epoch(before)
    return {
        "type": type(data).__name__,
        "images": len(data._all_labels),
        "shape": list(data.image_shape),
        "transform": _describe(data.transform),
        "seed": data.seed,
        "content_sha256": digest.hexdigest(),
    }


def _describe(part: Any) -> Any:
    """A transform as names and values, through all that it is made of."""
    if isinstance(part, (int, float, str, bool, type(None))):
        return part
    if isinstance(part, (list, tuple)):
        return [_describe(one) for one in part]
    name = f"{type(part).__module__}.{getattr(part, '__qualname__', type(part).__qualname__)}"
    return {
        name: {key: _describe(value) for key, value in sorted(vars(part).items())} if hasattr(part, "__dict__") else {}
    }


class LatentStore:
    """The latents of one data set under one first stage, by image and view.

    Args:
        folder: of all caches.
        settings: what the latents depend on, see the module.
        images, views: numbers of them.
        shard: (rank, number) of this process among those that encode.
        sampled: whether the latents of a KL first stage are read with their standard deviations.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        images: int,
        views: int,
        shard: tuple[int, int] = (0, 1),
        sampled: bool = True,
    ):
        settings = {**settings, "images": images, "views": views}
        text = json.dumps(settings, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.images, self.views, self.block, self.sampled = images, views, _BLOCK, sampled
        self.work = WorkList(self.folder, settings, shard)
        self.keys = [str(block) for block in range(-(-images // self.block))]
        self._open: dict[str, np.ndarray] = {}

    @property
    def complete(self) -> bool:
        """Whether every image is there."""
        return self.work.complete(self.keys)

    def fill(self, data: LabelledImages, encode: Encode, batch: int, workers: int = 0) -> Iterator[int]:
        """Encode the blocks of this process's share that are missing; yields the number of images done so far.

        Args:
            encode: images [B, C, H, W] in [-1, 1] -> see `Encode`.
            batch: images of one call. workers: processes that read images.
        """
        done, before = 0, data.epoch
        for key in self.work.pending(self.keys):
            rows = range(int(key) * self.block, min((int(key) + 1) * self.block, self.images))
            views, shown = [], torch.zeros(len(rows), dtype=torch.int64)
            for view in range(self.views):
                data.set_epoch(view)
                seen, found = 0, []
                for images, indices in _loader(data, rows, batch, workers):
                    parts = encode(images.movedim(-1, 1).contiguous().float())
                    found.append([part.cpu().float() for part in parts])
                    shown[seen : seen + len(indices)] = indices
                    seen, done = seen + len(indices), done + len(indices)
                    yield done
                views.append([torch.cat(parts).movedim(1, -1) for parts in zip(*found, strict=True)])
            kept = dict(zip(_PARTS, zip(*views, strict=True), strict=False))
            for name, values in kept.items():
                self._write(f"{name}_{key}", torch.stack(values, 1).contiguous().numpy())
            self._write(f"index_{key}", shown.numpy())
            self.work.save(key, {"images": len(rows), "parts": list(kept)})
        data.set_epoch(before)

    def check_deviations(self, data: LabelledImages, encode: Encode) -> None:
        """Where deviations are to be read, make sure that a cache written before there were any needs none.

        Raises:
            ValueError: if the first stage gives a distribution and some blocks hold means alone.
        """
        older = [key for key in self.keys if "parts" not in self.work.load(key)] if self.sampled else []
        if older and len(encode(data.item(0)["image"].movedim(-1, 0)[None].contiguous().float())) > 1:
            raise ValueError(
                f"the latent cache {self.folder} was written before standard deviations were kept, and holds none in "
                f"{len(older)} of its {len(self.keys)} files: remove it, so that the images are encoded again, or "
                "train on the means alone, as it was then (--first_stage mode)"
            )

    def _write(self, name: str, values: np.ndarray) -> None:
        with atomic_write(self.folder / f"{name}.npy", overwrite=True) as partial, open(partial, "wb") as file:
            np.save(file, values)

    def _block(self, name: str) -> np.ndarray:
        if name not in self._open:
            again = f"delete {self.folder}, so that the images are encoded again"
            self._open[name] = open_array(self.folder / f"{name}.npy", "a part of the latent cache", again)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def read(self, index: int, view: int) -> tuple[tuple[Tensor, ...], int]:
        """Latent [h, w, c] of an image in a view, or mean and deviation, and the number of the image that it shows."""
        block, row = divmod(index, self.block)
        names = [name for name in _PARTS if self._has(name, block)]
        parts = [torch.from_numpy(np.array(self._block(f"{name}_{block}")[row, view % self.views])) for name in names]
        return tuple(parts), int(self._block(f"index_{block}")[row])

    def _has(self, name: str, block: int) -> bool:
        if name == _PARTS[0] or not self.sampled:
            return name == _PARTS[0]
        return f"{name}_{block}" in self._open or (self.folder / f"{name}_{block}.npy").exists()


def _loader(data: LabelledImages, rows: Sequence[int], batch: int, workers: int) -> DataLoader:
    return Loader(Subset(_Numbered(data), rows), batch_size=batch, num_workers=workers)


class _Numbered(Dataset):
    """(image, index) of every image of a full data set, whatever its subset."""

    def __init__(self, data: LabelledImages):
        self.data = data

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.data.item(index)
        return item["image"], item["index"]


class LatentImages(Dataset):
    """A data set whose items hold latents [h, w, c] as `image` and say so by `encoded`; else as the data set itself.

    Of a KL first stage `image` is the posterior's mean, and `latent_std` its standard deviation.
    """

    def __init__(self, data: LabelledImages, store: LatentStore):
        self.data, self.store = data, store

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "store"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def item(self, index: int, draw: int = 0) -> dict[str, Any]:
        """Item of image `index` of the full data set; `draw` numbers its repeats within one epoch."""
        parts, shown = self.store.read(index, self.data.epoch + draw)
        latents = dict(zip(("image", "latent_std"), parts, strict=False))
        return {**latents, "encoded": True, **self.data.describe(shown)}

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.item(int(self.data.positions[position]), int(self.data._draws[position]))


def with_latents(data: Any, store: LatentStore) -> Any:
    """A data set, or a subset of one, that reads its latents from a store."""
    if isinstance(data, LabelledImages):
        return LatentImages(data, store)
    data.dataset = with_latents(data.dataset, store)
    return data
