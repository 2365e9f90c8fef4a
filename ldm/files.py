"""Files written whole or not at all, and small ones that are read back, whose damage is told with the file's name."""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from ldm.partials import name_partial, remove_abandoned_once

if TYPE_CHECKING:
    import numpy as np

# What readers raise for a file that is cut off, empty, or something else than its name says.
_DAMAGE = (
    ValueError,  # json, Unicode and NumPy
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    SyntaxError,  # of pictures
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    SafetensorError,
    yaml.YAMLError,
    csv.Error,
)


@contextmanager
def reading(path: str | os.PathLike, what: str, remedy: str) -> Iterator[None]:
    """Name the file in whatever its reader raises in this block.

    Args:
        path: the file.
        what: what it should be, "a posterior's record" for example.
        remedy: what to do where it is not, as an order.

    Raises:
        ValueError: with the file, the reader's words and the remedy.
    """
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the reader's
            raise
        if str(error).startswith(f"{path} "):  # a reading within this one has named it
            raise
        words = _explain(error)
        raise ValueError(f"{path} is damaged, or is not {what} ({words}): {remedy}") from error


def _explain(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"this is no YAML: {error.problem}, in line {mark.line + 1}, column {mark.column + 1}"
    words = " ".join(str(error).split())[:200] or "it ends too early"
    return f"there is no {words}" if isinstance(error, KeyError) else words


def read_json(path: str | os.PathLike, what: str, remedy: str = "make it again") -> Any:
    """Read a JSON file; see `reading` for the arguments and errors."""
    with reading(path, what, remedy):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_mapping(
    path: str | os.PathLike, what: str, remedy: str = "make it again", required: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a YAML file, or a JSON one (.json), that holds a mapping with at least the keys `required`.

    Raises:
        ValueError: if it holds anything else; see `reading` for the arguments.
    """
    with reading(path, what, remedy):
        text = Path(path).read_text(encoding="utf-8")
        # To YAML 1e-5 is a word.
        content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}, no mapping of keys"
        raise ValueError(f"{path} is not {what}: it holds {held}: {remedy}")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{path} is not {what}: it lacks {', '.join(missing)}: {remedy}")
    return content


def read_arrays(
    path: str | os.PathLike, names: Sequence[str] | None, what: str, remedy: str = "make it again"
) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file, those of `names`, all where None; see `reading` for the arguments and errors."""
    import numpy as np

    with reading(path, what, remedy):
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it holds one array, without names")
        with content:
            missing = [name for name in names or () if name not in content]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}, but {', '.join(content.files) or 'nothing'}")
            return {name: content[name] for name in (content.files if names is None else names)}


def write_arrays(
    path: str | os.PathLike, arrays: Mapping[str, Any], overwrite: bool = False, compressed: bool = False
) -> None:
    """Write arrays by name as an .npz file, whole or not at all; see `atomic_write` for the errors.

    Args:
        arrays: arrays, or what numpy makes one of.
        compressed: make it smaller, and slower to write.
    """
    import numpy as np

    save = np.savez_compressed if compressed else np.savez
    with atomic_write(path, overwrite) as partial:
        save(partial, **arrays)


def open_array(
    path: str | os.PathLike, what: str, remedy: str = "make it again", shape: Sequence[int | None] | None = None
) -> np.ndarray:
    """Open the array of an .npy file without reading it; see `reading` for the arguments and errors.

    Args:
        shape: that it must have, None for an axis of any length.
    """
    import numpy as np

    with reading(path, what, remedy):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several arrays")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it holds {array.dtype}, no numbers")
        fits = shape is None or len(shape) == array.ndim
        if not fits or any(one not in (None, side) for one, side in zip(shape or (), array.shape, strict=False)):
            raise ValueError(f"it has the shape {array.shape}, expected {tuple(shape or ())}")
        return array


def read_metadata(path: str | os.PathLike, *required: str) -> dict[str, str]:
    """Return the words that a .safetensors file keeps beside its tensors.

    Args:
        path: the file.
        required: names among them.

    Raises:
        ValueError: if it is no such file, is damaged, or lacks one of the names.
    """
    again = "remove it, and make it again by the command that wrote it"
    with reading(path, "a file of tensors (safetensors)", again), safe_open(path, framework="pt") as file:
        found = dict(file.metadata() or {})
        missing = [name for name in required if name not in found]
        if missing:
            raise ValueError(f"it does not say its {', '.join(missing)}")
        return found


def _name_file(error: Exception, partial: Path, path: Path) -> None:
    """Let an error of writing `partial` name `path`, as which a user knows the file.

    Raises:
        OSError: in place of an error by which a library says that the system did not take what it wrote: torch's says
            neither where nor why, numpy's how much alone.
    """
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    if isinstance(error, OSError):
        if error.filename is None or Path(error.filename) == partial:
            error.filename = str(path)
            error.filename2 = None
        return
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error) or "I/O error" in str(error):
        cause = error.__cause__ or error.__context__
        stated = re.search(r"os error (\d+)", str(error))  # of safetensors
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.ENOSPC
        number = int(stated[1]) if stated else number
        raise OSError(number, os.strerror(number), str(path)) from error


def check_writable(path: str | os.PathLike) -> None:
    """Before anything is computed, make sure that files can be written at a path, or in the folder that it will be.

    Raises:
        OSError: as the system would at the first file, where the disk is read-only, there is no permission, a part of
            the path is a file, or it is too long.
    """
    place = Path(path).absolute()
    with suppress(FileNotFoundError, NotADirectoryError):
        place.stat()
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    number = 0
    if not nearest.is_dir():
        number = 0 if nearest == place else errno.ENOTDIR  # a file in the way is the command's to replace or refuse
    elif not os.access(nearest, os.W_OK | os.X_OK):
        fixed = hasattr(os, "statvfs") and os.statvfs(nearest).f_flag & os.ST_RDONLY
        number = errno.EROFS if fixed else errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(path))


@contextmanager
def atomic_write(path: str | os.PathLike, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there when the block ends without an error.

    What processes that were killed left unfinished in the folder is removed first.

    Args:
        path: the file.
        overwrite: whether it may be there already.
        durable: be sure that the content is on the disk before it has its name, should the power fail.

    Raises:
        FileExistsError: if `path` exists and `overwrite` is False (checked before anything is written).
        OSError: if the system does not take what is written, with the name of the file.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or ask for it to be overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned_once(path.parent.absolute(), os.getpid())
    partial = name_partial(path)
    try:
        yield partial
        if durable and os.name == "posix":
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        _name_file(error, partial, path)
        raise
    finally:
        partial.unlink(missing_ok=True)
