"""Archives unpacked without escaping their folder; files that are there are kept, nothing is overwritten."""

from __future__ import annotations

import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from tqdm import tqdm

from ldm.util import atomic_write

_CHUNK = 1 << 20  # bytes
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
ArchiveEntry = tuple[str, int, Callable[[], BinaryIO]]


def safe_path(folder: Path, name: str) -> Path:
    """Return where an archive's member goes.

    Raises:
        ValueError: if its name would lead out of `folder`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or PureWindowsPath(name).drive:
        raise ValueError(f"refusing to unpack '{name}': it would lead out of {folder}")
    return folder.joinpath(*parts)


def tar_entries(archive: tarfile.TarFile) -> Iterator[ArchiveEntry]:
    """Yield the files of a tar as (name, size in bytes, open), in their order; links and devices raise ValueError."""
    for member in archive:
        if member.isfile():
            yield member.name, member.size, lambda member=member: archive.extractfile(member)
        elif not member.isdir():
            raise ValueError(f"refusing to unpack '{member.name}' of {archive.name}: it is no plain file")


def zip_entries(archive: zipfile.ZipFile) -> Iterator[ArchiveEntry]:
    """Yield the files of a zip like `tar_entries`."""
    for member in archive.infolist():
        if not member.is_dir():
            yield member.filename, member.file_size, lambda member=member: archive.open(member)


def unpack(archive: str | Path, folder: str | Path) -> list[Path]:
    """Unpack a .zip or a .tar (compressed or not) into `folder`; return the paths of its files.

    Every name is checked before anything is written. Files that are there with the right length are kept, so that a
    second call goes on where the first one stopped.

    Raises:
        ValueError: if a name leads out of `folder`, a member is a link, the archive is damaged, or a file is there with
            another length.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                return write_entries(list(zip_entries(content)), folder, archive.name)
        with tarfile.open(archive) as content:
            entries = list(tar_entries(content))
            while content.fileobj.read(_CHUNK):  # to the end, where gzip has its checksum
                pass
            return write_entries(entries, folder, archive.name)
    except DAMAGE as error:
        reason = str(error).split("\n", 1)[0].rstrip(":") or "it ends early"  # tarfile lists every way it tried
        raise ValueError(f"{archive} is damaged or no archive ({reason}); move it away and fetch it again") from error


def write_entries(entries: list[ArchiveEntry], folder: Path, label: str) -> list[Path]:
    """Write an archive's files, each whole or not at all; see `unpack`."""
    targets = [safe_path(folder, name) for name, _, _ in entries]
    for target, (_, size, _) in zip(targets, entries, strict=True):
        if target.exists() and target.stat().st_size != size:
            raise ValueError(f"{target} is there with {target.stat().st_size} bytes, not {size}; move it away first")
    for target, (_, _, source) in zip(targets, tqdm(entries, desc=f"unpack {label}", unit="file"), strict=True):
        if not target.exists():
            with atomic_write(target, durable=False) as partial, source() as reader, open(partial, "wb") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
    return targets


def check_whole(path: str | Path) -> None:
    """Read a zip file (such as torch's checkpoints) through and compare its own checksums; other files pass.

    Raises:
        ValueError: if it is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path} is damaged (its part {damaged}); move it away and fetch it again")
