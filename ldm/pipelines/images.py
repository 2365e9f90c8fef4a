"""Sets of images to measure, whatever holds them, as bytes uint8 [B, C, H, W] by position in an explicit order.

A source has a length, `read(start, stop)`, and `describe()`: what the images are and in which order. Measures look at
bytes, as they would be stored, so that a folder, an array and a run to sample from give the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import load_content
from ldm.data.base import LabelledImages, check_choice
from ldm.data.npz import Rows
from ldm.data.own import build_dataset
from ldm.data.pictures import Files, read_picture
from ldm.evaluation.extraction import ImageSet
from ldm.images import to_uint8
from ldm.util import ImageSize, generator, read_image_size, shorten_size

TENSOR_SUFFIXES = (".pt", ".pth", ".safetensors")
_PROBED = 8  # images whose bytes `describe` hashes
# What floats of pictures in [-1, 1] reach at most, as a decoder gives them; 255, and NaN, are no pictures.
_MOST = 2.0
# Names under which a file of several tensors may hold its images.
IMAGE_NAMES = ("arr_0", "images", "samples", "x")


def as_bytes(images: Tensor | np.ndarray, name: str) -> Tensor:
    """uint8 [N, C, H, W] from uint8 with channels first or last, or from floats [N, C, H, W] in [-1, 1].

    Raises:
        ValueError: for other shapes and types.
    """
    images = torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images)
    if images.ndim == 4 and images.is_floating_point() and images.shape[1] in (1, 3):
        return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
    if images.ndim == 4 and images.dtype == torch.uint8 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.dtype == torch.uint8 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name}: expected images uint8 [N, H, W, C] or [N, C, H, W], or floats [N, C, H, W] in [-1, 1], with 1 or 3 "
        f"channels; got {images.dtype} {tuple(images.shape)}"
    )


def probed(source: ImageSet) -> dict[str, str]:
    """{content_sha256: hash of some images, spread over a source}, for `describe`: tells it from others of its size,
    such as samples drawn again into the same folder."""
    digest, last = hashlib.sha256(), len(source) - 1
    for place in sorted({number * last // (_PROBED - 1) for number in range(_PROBED)}) if last >= 0 else ():
        digest.update(source.read(place, place + 1).contiguous().numpy().tobytes())
    return {"content_sha256": digest.hexdigest()}


class FolderImages:
    """Image files below a folder or in a .zip, sorted by their path below it (code points, "/" between parts).

    Args:
        root: folder or .zip.
        channels: 1 (grey) or 3 (RGB).
        image_size: side in pixels, or height and width, that they are scaled to cover and cut to; as they are where
            not given.
    """

    def __init__(self, root: str | Path, channels: int = 3, image_size: ImageSize | None = None):
        check_choice("channels", channels, (1, 3))
        self.files = Files(root)
        self.channels = channels
        self.size = None if image_size is None else read_image_size(image_size)
        self.names = self.files.images()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1.

        Raises:
            ValueError: if they have different sizes.
        """
        images = [self._one(name) for name in self.names[start:stop]]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(f"images of different sizes {sorted(shapes)[:4]}; give --image_size to scale them")
        return torch.stack(images)

    def _one(self, name: str) -> Tensor:
        pixels = read_picture(self.files, name, self.channels, self.size)
        if self.size is not None:
            top = (pixels.shape[0] - self.size[0]) // 2
            left = (pixels.shape[1] - self.size[1]) // 2
            pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        return pixels.permute(2, 0, 1)

    def describe(self) -> dict[str, Any]:
        order = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {
            "folder": str(self.files.roots[0]),
            "count": len(self),
            "order": "sorted paths",
            "names_sha256": order,
            **probed(self),
            "image_size": self.size if self.size is None else shorten_size(self.size),
            "channels": self.channels,
        }


class NpzImages:
    """The images `arr_0`, uint8 [N, H, W, C], of an .npz file (ADM's batches), read row by row from the disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows = Rows(self.path, "arr_0")
        if len(self.rows.shape) != 4 or 0 in self.rows.shape[1:] or self.rows.dtype != np.uint8:
            raise ValueError(f"{path}: arr_0 must be uint8 [N, H, W, C], got {self.rows.dtype} {self.rows.shape}")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1."""
        return as_bytes(self.rows.read(start, stop), str(self.path))

    def describe(self) -> dict[str, Any]:
        size = self.path.stat().st_size
        return {"npz": str(self.path), "count": len(self), "order": "rows", "bytes": size, **probed(self)}


class TensorImages:
    """Images of one tensor: uint8 with channels first or last, or floats [N, C, H, W] in [-1, 1]."""

    def __init__(self, images: Tensor | np.ndarray, name: str = "tensor"):
        if getattr(images, "ndim", 0) != 4 or 0 in images.shape[1:]:
            given = f"shape {tuple(images.shape)}" if hasattr(images, "shape") else f"a {type(images).__name__}"
            raise ValueError(f"{name}: expected images with four axes, none of them empty, got {given}")
        self.images, self.name = images, name

    @classmethod
    def of_file(cls, path: str | Path) -> TensorImages:
        """The tensor of a .pt, .pth or .safetensors file: the only one, or that named arr_0, images, samples or x.

        Raises:
            ValueError: if the file has no such tensor.
        """
        content = load_content(path)
        if isinstance(content, Tensor):
            return cls(content, str(path))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}; expected one tensor, or tensors by name")
        names = [name for name in IMAGE_NAMES if name in content] or list(content) * (len(content) == 1)
        if not names:
            raise ValueError(f"{path} holds {sorted(content)[:6]}; expected one tensor, or one named {IMAGE_NAMES}")
        return cls(content[names[0]], str(path))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1.

        Raises:
            ValueError: for other types, and for floats that are no pictures in [-1, 1].
        """
        images = torch.as_tensor(self.images[start:stop])
        if images.is_floating_point() and not (images.abs() <= _MOST).all():
            largest = float(images.abs().max())
            raise ValueError(f"{self.name}: floats should be pictures in [-1, 1], and some are {largest:g}: scale them")
        return as_bytes(images, self.name)

    def describe(self) -> dict[str, Any]:
        return {"tensor": self.name, "count": len(self), "order": "rows", **probed(self)}


class DataSetImages:
    """The images of one of the project's data sets, in its own order; `config` is what it was built from."""

    def __init__(self, data: LabelledImages, config: Any = None):
        self.data, self.config = data, config

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1."""
        images = [self.data[index]["image"] for index in range(start, min(stop, len(self)))]
        return as_bytes(torch.stack(images).permute(0, 3, 1, 2), type(self.data).__name__)

    def everything(self) -> tuple[Tensor, Tensor]:
        """All images uint8 [N, C, H, W] and labels [N]."""
        parts = [self.read(start, start + 1000) for start in range(0, len(self), 1000)]
        return torch.cat(parts), torch.as_tensor(self.data.labels)

    def describe(self) -> dict[str, Any]:
        return {"data": self.config or type(self.data).__name__, "count": len(self), "order": "data set"}


class SampledImages:
    """Images to be sampled from a loaded model (`ldm.pipelines.open_model`): image i is that of (seed, i).

    A conditional model takes its classes in turn.
    """

    def __init__(self, pipeline: Any, count: int):
        self.pipeline, self.count = pipeline, count

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1, sampled now."""
        classes = self.pipeline.n_classes
        labels = [image % classes for image in range(start, stop)] if classes else None
        images = self.pipeline.decode(self.pipeline.sample_latents(labels, range(start, stop)))
        return as_bytes(images, "samples")

    def describe(self) -> dict[str, Any]:
        return {"sampled": self.pipeline.describe(), "count": self.count, "order": "image numbers, classes in turn"}


class Chosen:
    """Some images of another source, by position, in the order given."""

    def __init__(self, source: ImageSet, positions: Sequence[int], why: str):
        wrong = [position for position in positions if not 0 <= position < len(source)]
        if wrong or not len(positions):
            raise ValueError(f"{why}: expected positions 0..{len(source) - 1}, got {wrong[:5] or 'none'}")
        self.source, self.positions, self.why = source, list(positions), why

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1 of the choice; runs of neighbours are read together."""
        wanted = np.asarray(self.positions[start:stop])
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return torch.cat([self.source.read(int(run[0]), int(run[-1]) + 1) for run in runs])

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.asarray(self.positions, dtype="<i8").tobytes()).hexdigest()
        return {**self.source.describe(), "chosen": self.why, "count": len(self), "positions_sha256": digest}


def positions_of(source: ImageSet, words: Iterable[str]) -> list[int]:
    """Positions of lines that are numbers, or for a folder paths below it.

    Raises:
        ValueError: for a path that the folder does not hold.
    """
    places = {name: place for place, name in enumerate(getattr(source, "names", ()))}
    found = []
    for word in filter(None, (word.strip() for word in words)):
        if word in places:
            found.append(places[word])
        elif word.isdigit():
            found.append(int(word))
        else:
            raise ValueError(f"'{word}' is neither the path of one of these {len(source)} images nor a position")
    return found


def load_images(path: str | Path, channels: int = 3, image_size: ImageSize | None = None) -> ImageSet:
    """The images of a folder, .zip, .npz, .pt, .pth or .safetensors file.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it holds no images, or an array's have another size than `image_size`: they are not scaled.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: expected a folder, .zip, .npz, .pt or .safetensors")
    if path.suffix in (".npz", *TENSOR_SUFFIXES):
        array = NpzImages(path) if path.suffix == ".npz" else TensorImages.of_file(path)
        if image_size is not None and len(array):
            own, wanted = tuple(array.read(0, 1).shape[2:]), read_image_size(image_size)
            if own != wanted:
                raise ValueError(
                    f"--image_size scales picture files, and {path} is an array of images {own[0]}x{own[1]}, not "
                    f"{wanted[0]}x{wanted[1]}: give its size, to which the pictures of the other side are scaled"
                )
        return array
    return FolderImages(path, channels, image_size)


def real_images(config: Any, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` images [N, H, W, C] and labels [N] of the data set of a config, drawn by the seed."""
    data = build_dataset(config)
    chosen = torch.randperm(len(data), generator=generator("real", seed))[:most].tolist()
    if not chosen:
        return np.zeros((0, *data.image_shape), np.float32), np.zeros(0, np.int64)
    items = [data[index] for index in chosen]
    return np.stack([np.asarray(item["image"]) for item in items]), np.asarray([item["class_label"] for item in items])
