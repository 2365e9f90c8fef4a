"""Large .npz files, written piece by piece; and labels read from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.util import atomic_write


class Pieces(NamedTuple):
    """An array of known shape and type, whose rows come in pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[np.ndarray]


def write_npz(path: str | Path, arrays: Mapping[str, Pieces], overwrite: bool = False) -> None:
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


def read_labels(path: str | Path) -> list[int]:
    """Labels of a text file (numbers apart by white space), an .npy file, or an .npz file (its arr_1, else arr_0).

    Raises:
        ValueError: if the file is absent or holds something other than a row of whole numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file of labels at {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path) as content:
                values = content["arr_1" if "arr_1" in content else "arr_0"]
        else:
            values = np.load(path) if path.suffix == ".npy" else np.array([int(w) for w in path.read_text().split()])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} holds no labels: expected whole numbers, arr_1 or arr_0 of an .npz ({error})"
        ) from error
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{path}: expected a row of whole numbers, got {values.dtype} {values.shape}")
    return values.tolist()
