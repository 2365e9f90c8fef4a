"""Partial files: what `ldm.util.atomic_write` writes before it has its name, and what killed processes left of it."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

# `.NAME.HOST-PROCESS-TOKEN.partial.SUFFIX`, which tells whose it was; without them where 0.1.0 wrote it.
_PARTIAL = re.compile(r"\..*\.(?:(?P<host>[0-9a-f]{6})-(?P<process>\d+)-)?[0-9a-f]{8}\.partial(?:\.[^.]*)?")
_DAY = 86400.0  # seconds


def name_partial(path: Path) -> Path:
    """Return a new name for a file that is not whole yet, beside it, which tells whose it is."""
    # A process's number is its own on one machine only.
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.stem}.{owner}.partial{path.suffix}")


def remove_abandoned(folder: Path) -> None:
    """Remove the partial files that `atomic_write` left in a folder where its process was killed.

    Those of this machine whose process is no more go, and of all others those that are older than a day.
    """
    try:
        found = [(entry, _PARTIAL.fullmatch(entry.name)) for entry in os.scandir(folder) if entry.name.startswith(".")]
    except OSError:
        return
    for entry, match in found:
        if match is None:
            continue
        with suppress(OSError):
            dead = match["host"] == _host() and not _is_alive(int(match["process"]))
            if dead or time.time() - entry.stat().st_mtime > _DAY:
                os.unlink(entry.path)


@cache
def remove_abandoned_once(folder: Path, process: int) -> None:
    """Do so at the first file that a process writes there: folders may hold very many files."""
    remove_abandoned(folder)


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
