"""One training at a time in a run directory: a lock that names its process, and that a dead process does not keep."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.partials import remove_abandoned
from ldm.training.processes import is_first
from ldm.training.runs import RunDirectory

LOCK_FILE = "training.lock"
# Seconds between two signs of life of the process that holds a lock, and after which one on another host is dead.
SIGNS, SILENCE = 20.0, 180.0


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run directory.

    Args:
        host: its machine.
        process: its number there.
        started: when it started, as the system counts, which tells it from a later process of its number.
        job: its SLURM job; a job that is requeued keeps its number.
    """

    host: str
    process: int
    started: str
    job: str = ""

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), find_start(os.getpid()) or "", os.environ.get("SLURM_JOB_ID", ""))

    def has_ended(self, silence: float) -> bool:
        """Whether the process is no more; on another host that is taken from its silence in seconds."""
        own = Holder.own()
        if self.host == own.host:
            return find_start(self.process) != self.started
        return silence > SILENCE or bool(self.job and self.job == own.job)


def find_start(process: int) -> str | None:
    """Return when a process of this machine started, "" where the system does not tell, None if it is no more."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


@contextmanager
def hold_run(run: RunDirectory) -> Iterator[None]:
    """Be the one training in a run directory, and remove what killed ones left half written.

    Of several processes the first holds it. Those of a SLURM step are refused as it is, so that none waits for it.

    Raises:
        ValueError: naming the process that trains there.
    """
    path, own = run.path / LOCK_FILE, Holder.own()
    if not is_first():
        _refuse_other_job(path, own)
        yield
        return
    _take(path, own)
    remove_abandoned(run.checkpoints)
    ended = threading.Event()
    threading.Thread(target=_show_life, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _take(path: Path, own: Holder) -> None:
    """Write a lock, in place of one whose process has ended."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(json.dumps(asdict(own)) + "\n")
        while not _link(new, path):
            with suppress(FileNotFoundError):  # it was let go in this moment
                silence = new.stat().st_mtime - path.stat().st_mtime  # by one clock, that of the file system
                holder = _read(path)
                if not (silence > SILENCE if holder is None else holder.has_ended(silence)):
                    raise _describe(path, holder, silence)
                _remove(path, holder, new)
    finally:
        new.unlink(missing_ok=True)


def _refuse_other_job(path: Path, own: Holder) -> None:
    """Raise a ValueError if another job than this process's is training; within one, the first process knows."""
    holder = _read(path)
    if own.job and holder is not None and holder.job != own.job:
        silence = 0.0
        with suppress(OSError):
            silence = time.time() - path.stat().st_mtime
        if not holder.has_ended(silence):
            raise _describe(path, holder, silence)


def _describe(path: Path, holder: Holder | None, silence: float) -> ValueError:
    where = "another process" if holder is None else f"process {holder.process} on {holder.host}"
    return ValueError(
        f"{where} is training in {path.parent} and gave its last sign of life {max(0, silence):.0f} s ago: wait for "
        f"its end, or stop it; if it is no more, remove {path}"
    )


def _link(new: Path, path: Path) -> bool:
    """Give a file its second name, unless another file has it."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError:  # where there are no links
        try:
            with open(path, "x") as file:
                file.write(new.read_text())
        except FileExistsError:
            return False
    return True


def _remove(path: Path, holder: Holder | None, new: Path) -> None:
    """Remove the lock of `holder`; one that another process has written in its place meanwhile is put back."""
    aside = new.with_name(f"{new.name}.old")
    path.rename(aside)
    if _read(aside) != holder:
        _link(aside, path)
    aside.unlink()


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None where the file is absent or says nothing."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _show_life(path: Path, ended: threading.Event) -> None:
    """Touch a lock from time to time."""
    while not ended.wait(SIGNS):
        with suppress(OSError):
            os.utime(path)
