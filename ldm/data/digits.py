"""The handwritten digits that scikit-learn carries: 1,797 grey images of 8x8 pixels, 10 classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, check_choice, split_positions, with_channels
from ldm.data.bins import ClassSize, Subsets
from ldm.data.plans import read_member_subset
from ldm.util import ImageSize, read_image_size

_SIDE = 8  # pixels
_BRIGHTEST = 16  # the brightest of the 17 grey levels 0..16


class Digits(LabelledImages):
    """Scikit-learn's digits as images [H, W, channels] in [-1, 1].

    The split is stratified and fixed: it depends on `test_fraction` only. `index` counts within the split.

    Args:
        split: "train", "test" or "all".
        image_size: side in pixels, or [height, width], each 8 or more.
        resize: how sizes above 8 are made, "bilinear" or "nearest".
        test_fraction: share of each class held out as "test".
        channels: 1, or 3 equal ones.
        subset: folder of `decu data bins` that says which images to keep; all where not given.
        component: which member's bootstrap of the subset; the subset without bootstrap where not given.
        dataset_name: "binned_classes" or "masked_classes", which of the folder's lists.
        transform: see `LabelledImages`.
        seed: seed of the transform's draws.

    Attributes:
        subsets: the plan of the subset, None without one.
        bins: its {class: class_size}, empty without one.
    """

    def __init__(
        self,
        split: str = "train",
        image_size: ImageSize = _SIDE,
        resize: str = "bilinear",
        test_fraction: float = 0.2,
        channels: int = 1,
        subset: str | None = None,
        component: int | None = None,
        dataset_name: str = "binned_classes",
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("resize", resize, ("bilinear", "nearest"))
        size = read_image_size(image_size)
        if min(size) < _SIDE:
            raise ValueError(f"image_size must be at least {_SIDE}, got {image_size}")
        if component is not None and subset is None:
            raise ValueError(f"component {component} needs subset, the folder that `decu data bins` wrote; got none")
        pixels, digits = load_digits(return_X_y=True)
        labels = torch.as_tensor(digits, dtype=torch.int64)
        kept = split_positions(labels, split, test_fraction, "digits")
        images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, _SIDE, _SIDE, 1)[kept] / (_BRIGHTEST / 2) - 1
        super().__init__(
            labels[kept],
            [str(digit) for digit in range(10)],
            (*size, channels),
            transform=transform,
            seed=seed,
        )
        self.images = with_channels(enlarge(images, size, resize), channels)
        self.subsets: Subsets | None = None
        self.bins: dict[int, ClassSize] = {}
        if subset is not None:
            config = {"target": "ldm.data.digits.Digits", "params": {"split": split, "test_fraction": test_fraction}}
            self.subsets, positions = read_member_subset(subset, dataset_name, component, self, config)
            self.bins = self.subsets.bins
            self.select(positions)

    def read(self, index: int) -> Tensor:
        """Return image `index` of the split, [H, W, C] in [-1, 1]."""
        return self.images[index]


def enlarge(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize images [N, H, W, C] to [N, *size, C]; `mode` is "bilinear" or "nearest"."""
    if images.shape[1:3] == size:
        return images
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(images.movedim(-1, 1), size, mode=mode, **corners).movedim(1, -1).contiguous()
