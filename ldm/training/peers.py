"""The other processes of a training: who loses one says which it is, and ends within seconds.

A process that is killed says nothing. Lightning's first process then kills itself as well, and those that it started
wait for it until a time-out of half an hour; here each ends with a sentence and code 1. A process that hangs without
ending is lost after that time-out, `torch.distributed`'s own.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Seconds between two looks at the others, and that a process has to end by itself, in words of its own, before it is
# ended where it is.
LOOKS, GRACE = 0.5, 5.0
# What torch's connections between processes say where one has ended.
LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "TCPStore",
    "ncclRemoteError",
)
RESUME = "--resume continues from the last checkpoint"
_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:\d+")


class LostProcess(Exception):
    """Another process of the training ended before its time.

    Args:
        told: whether nobody else says so.
    """

    def __init__(self, words: str, told: bool = True):
        super().__init__(words)
        self.told = told


def has_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the training is gone, which had a reason of its own."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


@contextmanager
def watching(trainer: pl.Trainer, first: bool, launched: bool) -> Iterator[None]:
    """Watch the other processes of a training while it runs.

    Args:
        trainer: of the training.
        first: whether this is the first process.
        launched: whether the first one started this one, as Lightning does without a cluster.

    Raises:
        LostProcess: where torch says that one is gone.
    """
    if trainer.world_size == 1:
        yield
        return
    find_lost = _watch_children(trainer) if first else _watch_parent() if launched else lambda: None
    ended = threading.Event()
    threading.Thread(target=_look, args=(find_lost, ended), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not has_lost_process(error):
            raise
        words = _wait_for(find_lost)
        raise LostProcess(
            words or describe_peer(error, trainer.global_rank, trainer.world_size), first or not launched or bool(words)
        ) from error
    finally:
        ended.set()


def describe_peer(error: BaseException, rank: int, count: int) -> str:
    """Return a sentence on a process that is known by its broken connection alone.

    Args:
        error: of torch, whose words hold the address.
        rank: of this process.
        count: how many there are.
    """
    which = f"process {1 - rank}" if count == 2 else f"another process than {rank}, of {count},"
    place = _ADDRESS.search(str(error))
    where = f" at {place[1]}" if place else ""
    return (
        f"{which} of this training{where} ended before its time: it says why, or was killed where it does not, "
        f"for want of memory for example; {RESUME}"
    )


def describe_ended(rank: int, process: int, code: int) -> str:
    """Return a sentence on a process that ended with a code other than 0, negative where a signal killed it."""
    named = f"process {rank} of this training (number {process})"
    if code < 0:
        return f"{named} was killed by {_name_signal(-code)}, for want of memory for example; {RESUME}"
    return f"{named} ended with code {code}, and says why; {RESUME}"


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _watch_children(trainer: pl.Trainer) -> Callable[[], str | None]:
    """Return what describes a process that this one started and that failed, None while there is none."""

    def find_lost() -> str | None:
        _silence_observers()
        started: Sequence[Popen] = getattr(trainer.strategy.launcher, "procs", ())
        codes = [(rank, child.pid, child.poll()) for rank, child in enumerate(started, 1)]
        return next((describe_ended(*one) for one in codes if one[2]), None)  # type: ignore[arg-type]  # a code, not 0

    return find_lost


def _silence_observers() -> None:
    """Keep Lightning from killing this process, without a word and a code of its own, where another one ends."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            observer: Any = thread
            observer._child_processes = []


def _watch_parent() -> Callable[[], str | None]:
    """Return what describes the end of the first process, which started this one."""
    parent = os.getppid()

    def find_lost() -> str | None:
        if os.getppid() == parent:
            return None
        return f"the first process of this training (number {parent}) was killed or ended before its time; {RESUME}"

    return find_lost


def _wait_for(find_lost: Callable[[], str | None]) -> str | None:
    """Wait until it is known who is lost: torch knows it before the system does."""
    end = time.monotonic() + GRACE
    while (words := find_lost()) is None and time.monotonic() < end:
        time.sleep(LOOKS / 5)
    return words


def _look(find_lost: Callable[[], str | None], ended: threading.Event) -> None:
    """End this process where another one is lost, and it does not come to know it by itself."""
    while not ended.wait(LOOKS):
        words = find_lost()
        if words is not None and not ended.wait(GRACE):
            print(f"error: {words}", file=sys.stderr, flush=True)
            os._exit(1)
