"""Checksums and archives of made-up content."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def packed(path, members: dict[str, bytes]):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path
