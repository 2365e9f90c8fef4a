"""LSUN's LMDB databases as image files: every record is an encoded picture, written as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.util import atomic_write

# Pictures of each published database (Yu et al. 2015, arXiv 1506.03365).
TOWER = {"tower_train": 708_264, "tower_val": 300}
# Bytes of each archive NAME_lmdb.zip, by the records of tensorflow-datasets; LSUN publishes no checksum.
ARCHIVES = {"tower_train": 12_010_237_081, "tower_val": 5_223_709}
_SUFFIXES = {b"RIFF": ".webp", b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png"}


def library() -> Any:
    """The library lmdb.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        needed = "pip install 'decu-uncertainty[lsun]'"
        raise ValueError(f"LSUN's files are databases that the library lmdb reads; install it: {needed}") from error
    return lmdb


def database(folder: Path) -> Any:
    """The LMDB environment of a folder, opened for reading."""
    return library().open(str(folder), readonly=True, lock=False, readahead=False, max_readers=1)


def detect_suffix(content: bytes, name: str = "a record") -> str:
    """The file suffix of an encoded picture, by its first bytes; `name` is what an error calls it.

    Raises:
        ValueError: for a format that LSUN does not use.
    """
    for start, suffix in _SUFFIXES.items():
        if content.startswith(start):
            return suffix
    raise ValueError(f"{name} begins with {content[:8]!r}, which is no webp, jpg or png picture")


def export(source: str | Path, folder: str | Path, expected: int | None = None) -> int:
    """Write every picture of the database `source` to folder/ab/KEY.webp (ab: the key's last two letters).

    Files that are there with the right length are kept, so that a second call goes on where the first one stopped.

    Args:
        expected: number of pictures it must hold.

    Returns:
        The number of pictures.

    Raises:
        ValueError: if the database has another number of pictures, or a file is there with another length.
    """
    source, folder = Path(source), Path(folder)
    with database(source) as environment:
        count = environment.stat()["entries"]
        if expected is not None and count != expected:
            raise ValueError(f"{source} holds {count} pictures, the published database {expected}; fetch it again")
        with environment.begin(buffers=False) as transaction:
            for key, content in tqdm(transaction.cursor(), total=count, desc=source.name, unit="image"):
                name = key.decode()
                target = folder / name[-2:] / f"{name}{detect_suffix(content, f'{name} of {source}')}"
                if target.exists():
                    if target.stat().st_size != len(content):
                        raise ValueError(f"{target} is there with another length than the record; move it away first")
                    continue
                with atomic_write(target, durable=False) as partial:
                    partial.write_bytes(content)
    return count


def prepare_tower(folder: str | Path) -> list[Path]:
    """Export both databases below `folder` to folder/images/tower_train and folder/images/tower_val."""
    folder = Path(folder)
    for name, count in TOWER.items():
        export(folder / f"{name}_lmdb", folder / "images" / name, count)
    return [folder / "images" / name for name in TOWER]
