"""Fetching published files: resumed, verified, unpacked without escaping; nothing of the user's is overwritten."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from tqdm import tqdm

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without any byte
Entry = tuple[str, int, Callable[[], BinaryIO]]


def fetch(
    url: str,
    path: str | Path,
    size: int | None = None,
    md5: str | None = None,
    attempts: int = 5,
    quiet: bool = False,
) -> Path:
    """Download `url` to `path` through `path`.part, which a later call resumes; a correct file is left as it is.

    Args:
        url: http or https address.
        path: where the file goes.
        size: its length in bytes, where known.
        md5: its checksum in hexadecimal, where known.
        attempts: connections that may break before giving up.
        quiet: without progress bars, for one of many small files.

    Raises:
        ValueError: if a file already at `path`, or the one fetched, is not the expected one; the first is left alone,
            the second kept as `path`.rejected.
        ConnectionError: if the download does not complete; what came stays for the next call.
    """
    path = Path(path)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must begin with http:// or https://, got '{url}'")
    if path.exists():
        fault = fault_of(path, size, md5, quiet)
        if fault:
            raise ValueError(f"{path} is not what {url} should hold: {fault}; move it away to fetch it anew")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    problem: Exception | None = None
    for _ in range(attempts):
        try:
            if resume(url, part, quiet):
                break
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{url} answered {error.code} {error.reason}; give a mirror with --url") from error
        except (OSError, http.client.HTTPException) as error:
            problem = error
    else:
        done = part.stat().st_size if part.exists() else 0
        raise ConnectionError(f"{url} broke off after {done} bytes ({problem or 'closed early'}); run again to resume")
    fault = fault_of(part, size, md5, quiet)
    if fault:
        rejected = path.with_name(f"{path.name}.rejected")
        os.replace(part, rejected)
        raise ValueError(f"what {url} sent is not the published file: {fault}; it is kept as {rejected}")
    os.replace(part, path)
    return path


def resume(url: str, part: Path, quiet: bool = False) -> bool:
    """Fetch what is missing of `part`; return whether it is complete by the server's own length."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ldm-prep-data", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
                return True
            part.unlink()  # longer than the file: begin again
            return False
        raise
    with reply:
        if reply.status != http.client.PARTIAL_CONTENT:
            start = 0
        length = reply.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if total is not None and shutil.disk_usage(part.parent).free < total - start:
            raise ValueError(f"{part.parent} has too little space: {total - start} bytes are still to come from {url}")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=quiet)
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def fault_of(path: Path, size: int | None, md5: str | None, quiet: bool = False) -> str:
    """Return what distinguishes a file from the published one, or nothing."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"expected {size} bytes, got {found}"
    if md5 is not None:
        digest = hashlib.md5(usedforsecurity=False)
        bar = tqdm(total=found, unit="B", unit_scale=True, desc=f"md5 {path.name}", disable=quiet)
        with open(path, "rb") as file, bar:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != md5:
            return f"expected md5 {md5}, got {digest.hexdigest()}"
    return ""


def safe_path(folder: Path, name: str) -> Path:
    """Return where an archive's member goes.

    Raises:
        ValueError: if its name would lead out of `folder`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or PureWindowsPath(name).drive:
        raise ValueError(f"refusing to unpack '{name}': it would lead out of {folder}")
    return folder.joinpath(*parts)


def tar_entries(archive: tarfile.TarFile) -> Iterator[Entry]:
    """Yield the files of a tar as (name, size in bytes, open), in their order; links and devices raise ValueError."""
    for member in archive:
        if member.isfile():
            yield member.name, member.size, lambda member=member: archive.extractfile(member)
        elif not member.isdir():
            raise ValueError(f"refusing to unpack '{member.name}' of {archive.name}: it is no plain file")


def zip_entries(archive: zipfile.ZipFile) -> Iterator[Entry]:
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
            with zipfile.ZipFile(archive) as opened:
                return write_entries(list(zip_entries(opened)), folder, archive.name)
        with tarfile.open(archive) as opened:
            return write_entries(list(tar_entries(opened)), folder, archive.name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{archive} is damaged or no archive ({error}); move it away and fetch it anew") from error


def write_entries(entries: list[Entry], folder: Path, label: str) -> list[Path]:
    """Write an archive's files, each whole or not at all; see `unpack`."""
    targets = [safe_path(folder, name) for name, _, _ in entries]
    for target, (_, size, _) in zip(targets, entries, strict=True):
        if target.exists() and target.stat().st_size != size:
            raise ValueError(f"{target} is there with {target.stat().st_size} bytes, not {size}; move it away first")
    for target, (_, _, source) in zip(targets, tqdm(entries, desc=f"unpack {label}", unit="file"), strict=True):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            try:
                with source() as reader, open(partial, "wb") as writer:
                    shutil.copyfileobj(reader, writer, CHUNK)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
    return targets
