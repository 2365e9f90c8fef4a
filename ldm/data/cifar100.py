"""CIFAR-100: 100 classes in 20 groups, from the Python or the binary batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, check_choice, to_signed
from ldm.data.cifar import VALUES, batch
from ldm.data.pictures import resize_pixels
from ldm.data.safe_pickle import load_plain
from ldm.files import reading
from ldm.util import ImageSize, read_image_size

_SIDE = 32  # pixels
LABEL_KINDS = ("fine", "coarse")
# Folder of each layout, and the end of its files' names.
BATCH_FILES = {"python": ("cifar-100-python", ""), "binary": ("cifar-100-binary", ".bin")}


class CIFAR100(LabelledImages):
    """CIFAR-100 as images [H, W, 3] in [-1, 1]. Source: Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.

    Args:
        root: folder of the batches, or the one above it.
        split: "train" (50,000) or "test" (10,000).
        labels: "fine" (100 classes) or "coarse" (the 20 groups of five).
        image_size: side in pixels, or [height, width]; others than 32 are made by bicubic scaling.
        transform: see `LabelledImages`.
        seed: seed of the transform's draws.

    Raises:
        ValueError: if the root holds no batches, or they are damaged.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        labels: str = "fine",
        image_size: ImageSize = _SIDE,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("split", split, ("train", "test"))
        check_choice("labels", labels, LABEL_KINDS)
        layout, folder = find_batches(Path(root), split)
        if layout == "python":
            self.pixels, numbers = read_pickled(folder / split, labels)
            names = [as_text(name) for name in load_fields(folder / "meta")[f"{labels}_label_names"]]
        else:
            self.pixels, numbers = read_records(folder / f"{split}.bin", labels)
            listed = folder / f"{labels}_label_names.txt"
            with reading(listed, "the names of CIFAR-100's classes", "fetch the data set again"):
                names = listed.read_text(encoding="utf-8").split()
        super().__init__(numbers, names, (*read_image_size(image_size), 3), transform=transform, seed=seed)

    def read(self, index: int) -> Tensor:
        """Return image `index`, [H, W, 3] in [-1, 1]."""
        return to_signed(resize_pixels(self.pixels[index], self.image_shape[:2]))


def find_batches(root: Path, split: str) -> tuple[str, Path]:
    """Return the layout found at `root`, python or binary, and the folder of its files.

    Raises:
        ValueError: if there is neither.
    """
    for layout, (name, suffix) in BATCH_FILES.items():
        for folder in (root, root / name):
            if (folder / f"{split}{suffix}").is_file():
                return layout, folder
    raise ValueError(
        f"{root} has no CIFAR-100: expected {split} or {split}.bin in it; fetch it with: "
        f"decu data prepare --dataset cifar100 --root {root.parent}"
    )


def load_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a pickled file by name, without running what it may name.

    Raises:
        ValueError: if it holds anything but a mapping of arrays and plain values.
    """
    content = load_plain(path, arrays=True, encoding="bytes")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}; fetch it again")
    return {
        as_text(name): [as_text(one) for one in value] if is_names(value) else value for name, value in content.items()
    }


def is_names(value: Any) -> bool:
    """Tell whether a field is a list of words."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], (bytes, str))


def as_text(word: Any) -> str:
    """Return a word that Python 2 may have written as bytes."""
    return word.decode() if isinstance(word, bytes) else str(word)


def read_pickled(path: Path, labels: str) -> tuple[Tensor, Tensor]:
    """Return pixels [N, 32, 32, 3] uint8 and the fine or coarse labels [N] of a Python batch.

    Raises:
        ValueError: if it lacks them, or they have other shapes.
    """
    fields = load_fields(path)
    if not {"data", f"{labels}_labels"} <= set(fields):
        raise ValueError(f"{path} must hold 'data' and '{labels}_labels', got {sorted(fields)}")
    return batch(path, np.asarray(fields["data"]), np.asarray(fields[f"{labels}_labels"]))


def read_records(path: Path, labels: str) -> tuple[Tensor, Tensor]:
    """Return the same of a binary batch, records of a coarse and a fine label byte and 3,072 pixel bytes."""
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % (2 + VALUES):
        raise ValueError(f"{path} must hold records of {2 + VALUES} bytes, got {content.size} bytes; fetch it again")
    records = content.reshape(-1, 2 + VALUES)
    return batch(path, records[:, 2:], records[:, 1 if labels == "fine" else 0])
