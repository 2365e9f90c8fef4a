"""Loaders whose workers end with the training: what fails in one is raised here in one sentence."""

from __future__ import annotations

import atexit
import itertools
import re
import signal
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

# Processes of loaders that may still run when this process ends.
_WORKERS: WeakSet[Any] = WeakSet()
_FAILED = re.compile(r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\n")


class WorkerTraceback(Exception):
    """The text of an error as it was raised in a loader's worker, which is the cause of the one that is raised here."""


def leave_signals_alone(worker: int) -> None:
    """A loader's process ignores what is sent to the whole group (Ctrl-C, SLURM): the training ends it, when saved."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left: Python would ask them by SIGTERM, which they ignore, and wait without a limit."""
    left = [worker for worker in list(_WORKERS) if worker.is_alive()]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in left:
        worker.kill()


class Loader(DataLoader):
    """A loader whose workers leave signals to the main process; what is raised in a worker ends it with the others."""

    def __init__(self, data: Any, *args: Any, **options: Any):
        super().__init__(data, *args, **{"worker_init_fn": leave_signals_alone, **options})

    def __iter__(self) -> Any:
        batches = super().__iter__()
        _WORKERS.update(getattr(batches, "_workers", ()))
        return _Batches(batches) if self.num_workers else batches


class ResumableLoader(Loader):
    """A loader that Lightning may resume in mid-epoch: its place follows from the trainer's count of batches."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do: see `DataModuleFromConfig.train_batches`."""


class _Batches(Iterator):
    """The batches of workers; their errors come with the sentence alone, and the worker's traceback as their cause."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            raise
        except Exception as error:
            end = getattr(self.batches, "_shutdown_workers", None)
            if end is not None:
                end()
            told = shorten_worker_error(str(error))
            if told is None:
                raise
            text, error.args = str(error), (told,)
            raise error.with_traceback(None) from WorkerTraceback(text)


def shorten_worker_error(text: str) -> str | None:
    """Return what an error says that a loader's worker raised, of the text that torch makes of it; None for others."""
    found = _FAILED.match(text)
    if found is None:
        return None
    frames = text.rpartition("Traceback (most recent call last):\n")[2].split("\n")
    said = "\n".join(itertools.dropwhile(lambda line: line.startswith(" "), frames)).strip()
    return re.sub(rf"^[\w.]*\b{found['kind']}(?:: |$)", "", said) or found["kind"]
