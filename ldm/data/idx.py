"""The MNIST family in its own file format: idx files, plain or gzipped.

Format: 4 bytes of magic (two zeros, the type 8 = uint8, the number of axes), 4 bytes big-endian per axis, the values.
Source: yann.lecun.com/exdb/mnist (the description of the format).
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, check_choice, to_signed, with_channels
from ldm.data.pictures import resize_pixels
from ldm.util import ImageSize, read_image_size, shorten_size

IMAGES_MAGIC = 0x00000803  # uint8, three axes
LABELS_MAGIC = 0x00000801  # uint8, one axis
_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: str | Path, magic: int) -> Tensor:
    """Read an idx file of uint8 values, gzipped or not (by its content, not its name).

    Args:
        path: the file.
        magic: the magic number it must have, which fixes the number of axes.

    Raises:
        ValueError: if the magic number or the number of values is another.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a broken gzip file ({error}); fetch it again") from error
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise ValueError(f"{path} must start with magic number 0x{magic:08x}, got 0x{found:08x}; is it another file?")
    axes = magic & 0xFF
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    values = np.frombuffer(content, dtype=np.uint8)[4 + 4 * axes :]
    if len(content) < 4 + 4 * axes or values.size != math.prod(shape):
        raise ValueError(f"{path} must hold {'x'.join(map(str, shape))} values, got {values.size}; fetch it again")
    return torch.from_numpy(values.reshape(shape).copy())


def find_idx(root: Path, prefix: str, kind: str, data_name: str = "mnist") -> Path:
    """Return the idx file of a split, plain before gzipped, with the published name or the one with a dot.

    Args:
        data_name: the data set, for the message where it is missing.

    Raises:
        ValueError: if the folder has none.
    """
    axes = {"images": 3, "labels": 1}[kind]
    stems = (f"{prefix}-{kind}-idx{axes}-ubyte", f"{prefix}-{kind}.idx{axes}-ubyte")
    for path in (root / f"{stem}{suffix}" for suffix in ("", ".gz") for stem in stems):
        if path.is_file():
            return path
    raise ValueError(
        f"{root} has no {stems[0]} nor {stems[0]}.gz; fetch them into {root.parent / data_name} with: "
        f"decu data prepare --dataset {data_name} --root {root.parent}"
    )


class IdxImages(LabelledImages):
    """A data set of the MNIST family as images [H, W, channels] in [-1, 1], background -1.

    Args:
        root: folder of the idx files, plain or .gz.
        split: "train" or "test".
        image_size: side in pixels, or [height, width].
        fit: how another size than the files' is made: "pad" puts background around, "resize" scales (antialiased).
        channels: 1, or 3 equal ones.
        transform: see `LabelledImages`.
        seed: seed of the transform's draws.
    """

    data_name = "mnist"  # of decu data prepare
    names: tuple[str, ...] | None = None  # of the classes; the numbers 0.. where a subclass gives none

    def __init__(
        self,
        root: str,
        split: str = "train",
        image_size: ImageSize = 28,
        fit: str = "pad",
        channels: int = 1,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("split", split, tuple(_PREFIX))
        check_choice("fit", fit, ("pad", "resize"))
        folder = Path(root)
        self.pixels = read_idx(find_idx(folder, _PREFIX[split], "images", self.data_name), IMAGES_MAGIC)  # [N, H, W]
        labels = read_idx(find_idx(folder, _PREFIX[split], "labels", self.data_name), LABELS_MAGIC).to(torch.int64)
        if len(labels) != len(self.pixels):
            raise ValueError(f"{root} needs a label for each of its {len(self.pixels)} images, got {len(labels)}")
        size = read_image_size(image_size)
        files = tuple(self.pixels.shape[1:])
        if fit == "pad" and any(side < least for side, least in zip(size, files, strict=True)):
            raise ValueError(
                f"fit='pad' needs image_size of at least {shorten_size(files)}, got {image_size}; "
                "fit='resize' makes smaller images"
            )
        names = self.names or tuple(str(label) for label in range(int(labels.max()) + 1))
        super().__init__(labels, names, (*size, channels), transform=transform, seed=seed)
        self.fit = fit

    def read(self, index: int) -> Tensor:
        """Return image `index`, [H, W, C] in [-1, 1]."""
        pixels = self.pixels[index, :, :, None]
        height, width, channels = self.image_shape
        if self.fit == "resize":
            pixels = resize_pixels(pixels, (height, width))
        spare = [height - pixels.shape[0], width - pixels.shape[1]]
        (top, bottom), (left, right) = ((extra // 2, extra - extra // 2) for extra in spare)
        return to_signed(with_channels(F.pad(pixels, (0, 0, left, right, top, bottom)), channels))


class MNIST(IdxImages):
    """Handwritten digits, 60,000 and 10,000 images of 28x28 pixels. Source: yann.lecun.com/exdb/mnist."""

    names = tuple(str(digit) for digit in range(10))


class FashionMNIST(IdxImages):
    """Articles of clothing in MNIST's format and numbers. Source: Xiao et al. 2017, arXiv 1708.07747."""

    data_name = "fashion-mnist"
    names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )


class KMNIST(IdxImages):
    """Cursive Japanese characters in MNIST's format and numbers. Source: Clanuwat et al. 2018, arXiv 1812.01718."""

    data_name = "kmnist"
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
