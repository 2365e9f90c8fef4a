"""Pictures with a label map each, in two folders with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.base import Crop, LabelledImages, Transform, split_positions, to_signed
from ldm.data.decoding import decode_labels
from ldm.data.pictures import Files, cover_size, read_named, read_picture
from ldm.util import ImageSize, generator, read_image_size


class SegmentedImages(LabelledImages):
    """Pictures `image` [H, W, 3] in [-1, 1] with `segmentation` [H, W, K], one channel a label that is 0 or 1.

    Both are scaled to cover H x W pixels (label maps to nearest neighbours), then cut to the middle.

    Args:
        root: folder or .zip of the pictures.
        labels_root: folder or .zip of the label maps: a PNG below it under the same name, whose values are labels.
        n_labels: K; a value of K or above is an error.
        image_size: side in pixels, or [H, W].
        channels: of the pictures, 1 or 3.
        split: "all", or the "train" or "test" part of a fixed split.
        test_fraction: share that is "test".
        transform: see `LabelledImages`; it must not move pixels.
        seed: seed of the transform's draws.

    Raises:
        ValueError: if a picture has no label map.
    """

    def __init__(
        self,
        root: str,
        labels_root: str,
        n_labels: int,
        image_size: ImageSize = 256,
        channels: int = 3,
        split: str = "all",
        test_fraction: float = 0.1,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        self.files = Files(root)
        self.maps = Files(labels_root)
        found = self.files.images()
        lacking = [name for name in found if not self.maps.has(map_name(name))]
        if lacking:
            raise ValueError(f"{len(lacking)} pictures have no label map in {labels_root}: {map_name(lacking[0])}, ...")
        kept = split_positions(torch.zeros(len(found), dtype=torch.int64), split, test_fraction, "segmented")
        names = [found[place] for place in kept.tolist()]
        shape = (*read_image_size(image_size), channels)
        super().__init__([0] * len(names), ["picture"], shape, transform=transform, seed=seed)
        self.relpaths = names
        self.n_labels = n_labels

    def read(self, index: int) -> Tensor:
        height, width, channels = self.image_shape
        size = (height, width)
        picture = to_signed(read_picture(self.files, self.names[index], channels, size))
        return Crop(size)(picture, generator("crop"))

    @property
    def names(self) -> list[str]:
        """Paths of the pictures below their root."""
        return self.relpaths or []

    def describe(self, index: int) -> dict[str, Any]:
        return {**super().describe(index), "segmentation": self.read_labels(index)}

    def read_labels(self, index: int) -> Tensor:
        """Return the label map of a picture, float32 [H, W, K].

        Raises:
            ValueError: if it holds a label of K or above.
        """
        size = self.image_shape[:2]
        name = map_name(self.names[index])
        values = torch.from_numpy(read_named(self.maps, name, decode_labels).astype(np.int64))
        if values.ndim != 2 or int(values.max()) >= self.n_labels:
            raise ValueError(
                f"label map {name} must be grey or of a palette with values below n_labels {self.n_labels}, got "
                f"shape {tuple(values.shape)} and values up to {int(values.max())}"
            )
        sides = cover_size((values.shape[0], values.shape[1]), size)
        scaled = F.interpolate(values[None, None].float(), sides, mode="nearest")[0, 0].long()
        return F.one_hot(Crop(size)(scaled, generator("crop")), self.n_labels).float()


def map_name(picture: str) -> str:
    """Return the name of a picture's label map: its own, as PNG."""
    return str(PurePosixPath(picture).with_suffix(".png"))
