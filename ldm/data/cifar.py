"""CIFAR-10 in any of the forms it comes in: Python batches, binary batches, or image files in class folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, check_choice, to_signed
from ldm.data.folder import ImageFolder
from ldm.data.pictures import resize_pixels
from ldm.data.safe_pickle import load_plain
from ldm.util import ImageSize, read_image_size

_SIDE = 32  # pixels
VALUES = 3 * _SIDE * _SIDE
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
LAYOUTS = ("auto", "python", "binary", "folders")
FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}


class CIFAR10(LabelledImages):
    """CIFAR-10 as images [H, W, 3] in [-1, 1]. Source: Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.

    Args:
        root: folder of the batches (or the one above it), or folder or .zip of `train/<class>/*`, `test/<class>/*`.
        split: "train" (50,000) or "test" (10,000).
        image_size: side in pixels, or [height, width]; others than 32 are made by bicubic scaling.
        layout: "python", "binary", "folders", or "auto" for the first one found.
        transform: see `LabelledImages`.
        seed: seed of the transform's draws.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        image_size: ImageSize = _SIDE,
        layout: str = "auto",
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("split", split, tuple(BATCHES))
        check_choice("layout", layout, LAYOUTS)
        found, folder = find_layout(Path(root), split, layout)
        self.pixels: Tensor | None = None  # [N, 32, 32, 3] uint8
        self.pictures: ImageFolder | None = None
        if found == "folders":
            self.pictures = ImageFolder(root, split, class_names=CLASS_NAMES, image_size=image_size, crop="none")
            self.relpaths = self.pictures.relpaths
            labels = self.pictures.labels
        else:
            reader = {"python": read_python_batch, "binary": read_binary_batch}[found]
            suffix = {"python": "", "binary": ".bin"}[found]
            batches = [reader(folder / f"{name}{suffix}") for name in BATCHES[split]]
            self.pixels = torch.cat([pixels for pixels, _ in batches])
            labels = torch.cat([numbers for _, numbers in batches])
        super().__init__(labels, CLASS_NAMES, (*read_image_size(image_size), 3), transform=transform, seed=seed)

    def read(self, index: int) -> Tensor:
        """Return image `index`, [H, W, 3] in [-1, 1]."""
        if self.pictures is not None:
            return self.pictures.read(index)
        return to_signed(resize_pixels(self.pixels[index], self.image_shape[:2]))


def find_layout(root: Path, split: str, layout: str) -> tuple[str, Path]:
    """Return the layout found at `root` and the folder of its files.

    Raises:
        ValueError: if there is none of the wanted layout.
    """
    for kind, suffix in (("python", ""), ("binary", ".bin")):
        for folder in (root, root / FOLDERS[kind]):
            if layout in ("auto", kind) and (folder / f"{BATCHES[split][0]}{suffix}").is_file():
                return kind, folder
    if layout in ("auto", "folders") and (root.is_file() or (root / split).is_dir()):
        return "folders", root
    raise ValueError(
        f"{root} has no CIFAR-10 in layout '{layout}': expected {BATCHES[split][0]}, {BATCHES[split][0]}.bin, "
        f"{split}/<class>/ in it, or the path of a .zip of that; fetch it with: "
        f"decu data prepare --dataset cifar10 --root {root.parent}"
    )


def read_python_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read a Python batch without running what a pickle may name; return pixels [N, 32, 32, 3] uint8 and labels [N].

    Raises:
        ValueError: if it holds anything but arrays and plain values, or has other shapes.
    """
    content = load_plain(path, arrays=True, encoding="bytes")
    fields = {}
    if isinstance(content, dict):
        fields = {name.decode() if isinstance(name, bytes) else name: value for name, value in content.items()}
    if not {"data", "labels"} <= set(fields):
        raise ValueError(f"{path} must hold 'data' and 'labels', got {sorted(map(str, fields))}")
    return batch(path, np.asarray(fields["data"]), np.asarray(fields["labels"]))


def read_binary_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read a binary batch, records of one label byte and 3,072 pixel bytes; same result as `read_python_batch`."""
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % (1 + VALUES):
        raise ValueError(f"{path} must hold records of {1 + VALUES} bytes, got {content.size} bytes; fetch it again")
    records = content.reshape(-1, 1 + VALUES)
    return batch(path, records[:, 1:], records[:, 0])


def batch(path: Path, data: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Check a batch's rows (red, green, blue planes) and return pixels [N, 32, 32, 3] uint8 and labels [N] int64."""
    if data.dtype != np.uint8 or data.shape != (len(labels), VALUES):
        raise ValueError(f"{path} must hold uint8 rows [{len(labels)}, {VALUES}], got {data.dtype} {list(data.shape)}")
    pixels = torch.from_numpy(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1).copy())
    return pixels, torch.from_numpy(labels.astype(np.int64))
