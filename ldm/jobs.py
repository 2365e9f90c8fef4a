"""Resumable work lists: one result file an item, written whole or not at all, under settings that must not change.

An item that has its file is done. Any number of processes may share a folder: each takes every `world`-th item. Which
share is a process's own, and how its job is started again, follow from what torchrun and SLURM tell it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ldm.files import read_mapping, reading
from ldm.util import atomic_write

Made = TypeVar("Made")

log = logging.getLogger(__name__)


def step_from_environment() -> tuple[int, int]:
    """(rank, world) of this process among those that one srun started, else (0, 1).

    SLURM_NTASKS is what a job may start: batch scripts and shells have it too, and each is one process.
    """
    world = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    return (int(os.environ["SLURM_PROCID"]), world) if world > 1 else (0, 1)


def shard_from_environment() -> tuple[int, int]:
    """(rank, world) of this process under torchrun, srun or a SLURM array, or srun in an array, else (0, 1)."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank, world = step_from_environment()
    if "SLURM_ARRAY_TASK_ID" in os.environ and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        task = int(os.environ["SLURM_ARRAY_TASK_ID"]) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        return task * world + rank, int(os.environ["SLURM_ARRAY_TASK_COUNT"]) * world
    return rank, world


def refuse_several_processes(work: str) -> None:
    """Before anything is computed, refuse what one process does alone in each of those that were started together.

    The tasks of a job array are not started together: each is a job of its own, with its own words as a rule.

    Args:
        work: what the command does, as the subject of the message.

    Raises:
        ValueError: under torchrun or an srun of several tasks, in every one of them.
    """
    started = (
        int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK"} <= os.environ.keys() else step_from_environment()[1]
    )
    if started > 1:
        raise ValueError(
            f"{work} is not shared between processes, and {started} were started with these words: start one, without "
            "torchrun or with srun --ntasks=1"
        )


@contextmanager
def sole_writer(folder: str | os.PathLike) -> Iterator[bool]:
    """Whether this process writes what comes of a folder's parts: at most one process at a time does.

    It holds `finishing.lock` there, which the system frees when the process ends, however it ends. Where there are no
    such locks (Windows), every process does.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    file = Path(folder) / "finishing.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def requeue_when_asked() -> None:
    """In a SLURM job let SIGUSR1 (`sbatch --signal=USR1@90`) stop the job and put it back into the queue."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    owner = os.getpid()
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # The last task of an array has the number of the whole array for its own: by that all would start again.
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]

    def requeue(_signum: int, _frame: Any) -> None:
        if os.getpid() != owner:  # a worker of this process
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            failure = done.stderr.strip() if done.returncode else ""
        except OSError as error:
            failure = str(error)
        if failure:
            log.warning("SIGUSR1: SLURM did not requeue job %s: %s", job, failure)
        else:
            log.info("SIGUSR1: requeued job %s", job)

    signal.signal(signal.SIGUSR1, requeue)


def local_rank() -> int:
    """Number of this process on its machine (torchrun, Lightning, srun), else 0: which device is its own."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def split_range(count: int, size: int) -> dict[str, range]:
    """{key: images} of parts of `size` images; the key tells its first image and their number."""
    parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return {f"{part.start:07d}_{len(part)}": part for part in parts}


class WorkList:
    """Results `{folder}/{key}.json` of items that were worked on under the same `settings`.

    Raises:
        ValueError: if the folder holds results of other settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], shard: tuple[int, int] = (0, 1)):
        self.folder, self.shard = Path(folder), shard
        settings = json.loads(json.dumps(dict(settings), default=str))
        file = self.folder / "settings.json"
        if file.exists():
            before = read_mapping(file, "the settings of a work list", "delete its folder")
            changed = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
            if changed:
                differences = ", ".join(f"{key}: {before.get(key)} -> {settings.get(key)}" for key in sorted(changed))
                raise ValueError(
                    f"{self.folder} holds results of other settings ({differences}); choose another output folder, or "
                    "delete it"
                )
        else:
            with atomic_write(file, overwrite=True) as partial:
                partial.write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def apart(cls, stem: str | os.PathLike, settings: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> WorkList:
        """The list in `{stem}_{digest of the settings}`: results of other settings lie beside it."""
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        return cls(f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:10]}", settings, shard)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def pending(self, keys: Iterable[str]) -> list[str]:
        """Items of this process's share that have no result yet, in order."""
        rank, world = self.shard
        return [key for key in list(keys)[rank::world] if not self._file(key).exists()]

    def save(self, key: str, result: Mapping[str, Any]) -> None:
        """Write an item's result."""
        with atomic_write(self._file(key), overwrite=True) as partial:
            partial.write_text(json.dumps(dict(result)) + "\n")

    def load(self, key: str) -> dict[str, Any]:
        """An item's result."""
        return read_mapping(self._file(key), "the result of a part", self.again(key))

    def load_as(self, key: str, make: Callable[[dict[str, Any]], Made]) -> Made:
        """What a function makes of an item's result; the file is named where it can make nothing of it."""
        with reading(self._file(key), "the result of a part", self.again(key)):
            return make(self.load(key))

    def again(self, key: str) -> str:
        """What makes an item's result again where it cannot be read, as an order."""
        return f"delete {self._file(key).with_suffix('')}.*, and start the command again"

    def complete(self, keys: Iterable[str]) -> bool:
        """True if every item has its result, whoever worked on it."""
        return all(self._file(key).exists() for key in keys)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one (of several processes on a machine each takes its own), else the CPU.

    Any other kind of device that torch knows by name, with or without a number, is taken where it is there.

    Raises:
        ValueError: if torch knows no such device, or it is absent.
    """
    if name == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", local_rank() % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device takes auto, cpu, cuda or cuda:N, got '{name}'") from None
    try:
        devices = torch.get_device_module(device)
        count = devices.device_count() if devices.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if not count:
        raise ValueError(f"--device {name}: no {device.type.upper()} device here; use --device cpu")
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: the {device.type.upper()} devices here are 0 to {count - 1}")
    return device


@contextmanager
def step_bar(name: str, runs: int = 1) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over the steps of `runs` trainings of one length; call it with (steps done, steps in all, loss)."""
    with tqdm(desc=name, unit="step") as bar:

        def progress(_done: int, steps: int, loss: float) -> None:
            bar.total = steps * runs
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield progress
