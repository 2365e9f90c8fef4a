"""Pickles read without running what they name: only plain values, and numpy arrays where asked for."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.pickles import BROKEN_PICKLE, check_sizes

# What an array's pickle calls: its rebuilder, its class, its dtype. The rebuilder's module moved with numpy 2.
ARRAY_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that refuses every name but those of numpy arrays, and those too unless `arrays`."""

    def __init__(self, file: BinaryIO, arrays: bool, encoding: str):
        super().__init__(file, encoding=encoding)
        self.allowed = ARRAY_NAMES if arrays else {}

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed object.

        Raises:
            pickle.UnpicklingError: for any other.
        """
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.allowed[module, name]


def load_plain(path: str | Path, arrays: bool = False, encoding: str = "ASCII") -> Any:
    """Read a pickle of dicts, lists, tuples, strings, bytes and numbers, and numpy arrays if `arrays`.

    Args:
        path: the file.
        arrays: admit numpy arrays of numbers.
        encoding: of Python 2 strings; "bytes" keeps them as bytes.

    Raises:
        ValueError: if the file is no pickle, or names anything else; nothing of it has been run.
    """
    kinds = "plain values and numpy arrays" if arrays else "plain values"
    content = Path(path).read_bytes()
    try:
        check_sizes(content)
        return RestrictedUnpickler(io.BytesIO(content), arrays, encoding).load()
    except BROKEN_PICKLE as error:
        raise ValueError(f"{path} must be a pickle of {kinds}, and is refused: {error}") from error
