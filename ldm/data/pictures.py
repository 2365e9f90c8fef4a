"""Image files: listing and reading them in folders or zip files, decoding and resizing with Pillow."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ldm.data.decoding import MODES, decode_pixels
from ldm.files import reading

_Read = TypeVar("_Read")

_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What files, zip files and Pillow raise for a file that is absent, damaged, or no picture.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
# Folders and files that systems, network drives and editors leave beside pictures.
_BY_PRODUCTS = re.compile(
    r"(?:^|/)(?:\.|(?:__MACOSX|@eaDir|@tmp|@Recycle|@Recently-Snapshot|#recycle|#snapshot|~snapshot|\$RECYCLE\.BIN|"
    r"RECYCLER|RECYCLED|System Volume Information|lost\+found|FOUND\.\d{3})(?:/|$))",
    re.IGNORECASE,
)


class BrokenImageError(ValueError):
    """An image file is missing or cannot be decoded."""


class Files:
    """The files of one or more roots, each a folder or a .zip, by their path below the root ("/" between parts).

    A zip file is opened when first read, once in each process, so that loader workers do not share a file position.

    Raises:
        ValueError: if a root is neither a folder nor a zip file.
    """

    def __init__(self, roots: str | Path | Sequence[str | Path]):
        self.roots = [Path(root) for root in ([roots] if isinstance(roots, str | Path) else roots)]
        self._owners: dict[str, int] = {}
        self._zips: dict[tuple[int, int], zipfile.ZipFile] = {}
        for root in self.roots:
            if not (root.is_dir() or (root.is_file() and zipfile.is_zipfile(root))):
                raise ValueError(
                    f"expected a folder or a .zip file, got '{root}'" + ("" if root.exists() else ", absent")
                )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zips": {}}

    def images(self, folder: str = "") -> list[str]:
        """Return the sorted paths of the image files below `folder` of all roots.

        Raises:
            ValueError: if two roots hold the same path, or there are no images.
        """
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        found = []
        for owner in range(len(self.roots)):
            for name in self._names(owner, prefix):
                if name.startswith(prefix) and name.lower().endswith(_SUFFIXES) and not hidden(name):
                    if self._owners.setdefault(name, owner) != owner:
                        raise ValueError(f"'{name}' is in {self.roots[self._owners[name]]} and in {self.roots[owner]}")
                    found.append(name)
        if not found:
            places = ", ".join(str(root / prefix) for root in self.roots)
            raise ValueError(f"no image files ({' '.join(_SUFFIXES)}) in {places}")
        return sorted(found)

    def others(self) -> list[str]:
        """Return the sorted paths of all other files of all roots, by-products of operating systems included."""
        names = {name for owner in range(len(self.roots)) for name in self._names(owner, "")}
        files = (name for name in names if not name.endswith("/"))
        return sorted(name for name in files if hidden(name) or not name.lower().endswith(_SUFFIXES))

    def has(self, name: str) -> bool:
        """Tell whether the first root holds a file `name`."""
        if self.roots[0].is_dir():
            return (self.roots[0] / name).is_file()
        return name in self._zip(0).NameToInfo

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        owner = self._owners.get(name, 0)
        if self.roots[owner].is_dir():
            return (self.roots[owner] / name).read_bytes()
        try:
            return self._zip(owner).read(name)
        except KeyError as error:
            raise FileNotFoundError(f"{self.roots[owner]} holds no '{name}'") from error

    def _names(self, owner: int, prefix: str) -> list[str]:
        root = self.roots[owner]
        if root.is_dir():
            walk = os.walk(root / prefix, followlinks=True)
            folders = ((Path(top).relative_to(root).as_posix(), files) for top, _, files in walk)
            return [file if folder == "." else f"{folder}/{file}" for folder, files in folders for file in files]
        return self._zip(owner).namelist()

    def _zip(self, owner: int) -> zipfile.ZipFile:
        key = (os.getpid(), owner)
        if key not in self._zips:
            with reading(self.roots[owner], "a zip of pictures", "pack or fetch it again"):
                self._zips[key] = archive = zipfile.ZipFile(self.roots[owner])
                for info in archive.infolist():  # some programs of Windows write the parts of a path so
                    info.filename = info.filename.replace("\\", "/")
                    archive.NameToInfo[info.filename] = info
        return self._zips[key]


def hidden(name: str) -> bool:
    """Tell whether a path is a by-product of a system or a network drive (`.DS_Store`, `@eaDir/...`)."""
    return _BY_PRODUCTS.search(name) is not None


# How files of PNG, JPEG, GIF, BMP, TIFF, WebP and JPEG 2000 begin.
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0\x0cjP  ")


def read_names(content: bytes, file: str | Path) -> list[str]:
    """Return the lines of a list in UTF-8, names with spaces and all; empty ones are left out.

    Args:
        content: what the file holds.
        file: its path, for the message.

    Raises:
        ValueError: if it is no text.
    """
    with reading(file, "a list, one name a line in UTF-8", "write it again"):
        text = content.decode("utf-8-sig")
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def read_picture(files: Files, name: str, channels: int, *scaling: Any, remedy: str = "mend or remove it") -> Tensor:
    """Return a picture file as uint8 [H, W, channels]; `scaling` are further arguments of `decode`.

    Raises:
        BrokenImageError: if it cannot be read, naming the file; `remedy` says what to do.
    """
    return read_named(files, name, lambda content: decode(content, channels, *scaling), remedy)


def read_named(files: Files, name: str, read: Callable[[bytes], _Read], remedy: str = "mend or remove it") -> _Read:
    """Return what `read` makes of a file's content.

    Raises:
        BrokenImageError: if the file cannot be read, naming it.
    """
    try:
        content = files.read(name)
        try:
            return read(content)
        except UnidentifiedImageError as error:  # whose text names an object in memory
            if content.startswith(_SIGNATURES):
                raise ValueError("the picture is damaged or cut off") from error
            start = f"it begins with {content[:12]!r}" if content else "it is empty"
            raise ValueError(f"no picture, {start}") from error
    except UNREADABLE as error:
        roots = ", ".join(str(root) for root in files.roots)
        system = isinstance(error, OSError) and error.errno is not None
        words = str(error.strerror).lower() if system else str(error)
        raise BrokenImageError(f"cannot read image '{name}' in {roots}: {words}; {remedy}") from error


def decode(
    content: bytes,
    channels: int,
    size: tuple[int, int] | None = None,
    stretch: bool = False,
    box: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Decode an image file to uint8 [H, W, channels], see `decode_pixels`.

    Args:
        content: the file's bytes.
        channels: 1 (grey) or 3 (RGB).
        size: height and width that the image is scaled to cover, one side exactly, in its proportions; as it is where
            not given.
        stretch: scale both sides to `size` exactly, changing the proportions.
        box: (top, left, height, width) of the part that is kept, before scaling.

    Raises:
        ValueError: if the box is not inside of the image.
    """
    tensor = torch.from_numpy(decode_pixels(content, channels))
    if box is not None:
        top, left, height, width = box
        if top + height > len(tensor) or left + width > tensor.shape[1]:
            raise ValueError(
                f"an image of {list(tensor.shape[:2])} pixels has no part {box} (top, left, height, width)"
            )
        tensor = tensor[top : top + height, left : left + width]
    if size is None:
        return tensor
    return resize_pixels(tensor, size if stretch else cover_size((tensor.shape[0], tensor.shape[1]), size))


def cover_size(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image [h, w] scaled in its proportions so that it just covers `size`."""
    scale = max(size[0] / sides[0], size[1] / sides[1])
    # Rounded, and never below the size by a rounding error.
    return max(size[0], round(scale * sides[0])), max(size[1], round(scale * sides[1]))


def resize_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [H, W, C] to [*size, C] by Pillow's bicubic filter, antialiased when shrinking."""
    if tuple(pixels.shape[:2]) == tuple(size):
        return pixels
    channels = pixels.shape[-1]
    image = Image.fromarray(pixels[:, :, 0].numpy() if channels == 1 else pixels.numpy(), MODES[channels])
    resized = np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.reshape(*size, channels))
