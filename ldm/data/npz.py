"""Large .npz files, written and read piece by piece; and labels read from a file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.files import reading
from ldm.util import atomic_write

_LABELS = "a file of labels (whole numbers, arr_1 or arr_0 of an .npz)"


class ChunkedArray(NamedTuple):
    """An array of known shape and type, whose rows come in pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[np.ndarray]


def write_npz(path: str | Path, arrays: Mapping[str, ChunkedArray], overwrite: bool = False) -> None:
    """Write arrays to an .npz file with one piece in memory at a time, whole or not at all.

    Raises:
        ValueError: if the pieces of an array do not add up to its shape.
    """
    with atomic_write(path, overwrite) as partial, zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
        for name, (shape, dtype, rows) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(np.empty((0, *shape[1:]), dtype))
                np.lib.format.write_array_header_1_0(member, {**header, "shape": tuple(shape)})
                written = 0
                for piece in rows:
                    member.write(np.ascontiguousarray(piece, dtype).tobytes())
                    written += len(piece)
            if written != shape[0]:
                raise ValueError(f"{name} should have {shape[0]} rows, its pieces have {written}")


class Rows:
    """The rows of an array in an .npz file, [N, ...], read from the disk piece by piece.

    Rows that are stored are read where they lie. Compressed ones are unpacked from the first on: reading forwards goes
    on from the last piece, reading backwards begins again.

    Raises:
        ValueError: if the file is damaged, holds no such array, or stores it in Fortran order.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.member = path, f"{name}.npy"
        opening = reading(path, f"an .npz file with {name}", "make it, or fetch it, again")
        with opening, zipfile.ZipFile(path) as archive, archive.open(self.member) as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, fortran, self.dtype = read[version](file)
            self.header, info = file.tell(), archive.getinfo(self.member)
            size = int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
            if info.file_size != self.header + size:
                raise ValueError(f"{self.member} has {info.file_size - self.header} bytes, expected {size}")
        if fortran:
            raise ValueError(f"{path}: {name} is stored in Fortran order; save it in C order")
        self.bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize  # of a row
        self.stored = self._place(info) if info.compress_type == zipfile.ZIP_STORED else None
        self._unpacking: tuple[int, Any, int] | None = None  # process, file, bytes of rows read

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unpacking": None}

    def __len__(self) -> int:
        return self.shape[0]

    def _place(self, info: zipfile.ZipInfo) -> int:
        """Where the first row lies: after the zip's local header (30 bytes, name, extra field) and the array's."""
        with self.path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        return info.header_offset + 30 + int(lengths.sum()) + self.header

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop - 1, those that exist."""
        rows = max(0, min(stop, len(self)) - start)
        first, size = start * self.bytes, rows * self.bytes
        with reading(self.path, f"an .npz file with {self.member}", "make it, or fetch it, again"):
            if self.stored is not None:
                content = np.fromfile(self.path, np.uint8, size, offset=self.stored + first)
            else:
                content = np.frombuffer(self._unpacked(first, size), np.uint8)
            return content.view(self.dtype).reshape(rows, *self.shape[1:])

    def _unpacked(self, first: int, size: int) -> bytes:
        known = self._unpacking
        if known is None or known[0] != os.getpid() or known[2] > first:
            with zipfile.ZipFile(self.path) as archive:
                file = archive.open(self.member)  # stays open with the archive closed
            file.read(self.header)
            known = (os.getpid(), file, 0)
        _, file, place = known
        file.seek(first - place, os.SEEK_CUR)
        content = file.read(size)
        self._unpacking = (os.getpid(), file, first + len(content))
        return content


def read_labels(path: str | Path) -> list[int]:
    """Labels of a text file (numbers apart by white space), an .npy file, or an .npz file (its arr_1, else arr_0).

    Raises:
        ValueError: if the file is absent or holds something other than a row of whole numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of labels at {path}, and there is none: check the path")
    with reading(path, _LABELS, "give another file of labels"):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                values = content["arr_1" if "arr_1" in content else "arr_0"]
        elif path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.array([int(word) for word in path.read_text(encoding="utf-8").split()])
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{path}: expected a row of whole numbers, got {values.dtype} {values.shape}")
    return values.tolist()
