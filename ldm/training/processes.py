"""The run directory that the processes of a training share: made by the first, found by the others and when resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero

from ldm.jobs import step_from_environment
from ldm.settings import Training
from ldm.training.peers import watching
from ldm.training.runs import RunDirectory, find_run, new_run
from ldm.training.slurm import Job

RUN_VARIABLE = "LDM_RUN_DIRECTORY"
ALL_MEMBERS = "all"


def is_first() -> bool:
    """Return True in the process that writes files and logs."""
    return (getattr(rank_zero.rank_zero_only, "rank", None) or 0) == 0


@contextmanager
def share_run(run: RunDirectory, trainer: pl.Trainer) -> Iterator[None]:
    """Name the run directory to the processes that the first one starts, and to no later training of this process.

    Raises:
        LostProcess: where one of them ends before its time.
        OSError: with the run directory where the system does not say which file it is about.
    """
    launched = not is_first() and RUN_VARIABLE in os.environ
    if is_first():
        os.environ[RUN_VARIABLE] = str(run.path)
    try:
        with watching(trainer, is_first(), launched):
            yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a logger, which does not say where
            error.filename = str(run.path)
        raise
    finally:
        if is_first():
            os.environ.pop(RUN_VARIABLE, None)


def list_folders(training: Training) -> list[Path]:
    """Return where the run of a SLURM job may be: in the folder of --resume, or in one below --logdir."""
    resumed = Path(training.resume)
    logdir = Path(training.logdir)
    own = [resumed.parent.parent if resumed.is_file() else resumed] if training.resume else []
    return own + (sorted(path for path in logdir.iterdir() if path.is_dir()) if logdir.is_dir() else [])


def find_known_run(training: Training, job: Job | None) -> tuple[RunDirectory | None, Path | None]:
    """Return the run and the checkpoint to continue from, where a run is resumed, requeued, or shared by the first.

    Raises:
        ValueError: if a process that is not the first cannot come to know its run directory.
    """
    run = job.requeued_run(list_folders(training)) if job else None
    if RUN_VARIABLE in os.environ and not is_first():
        run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
    elif not is_first() and step_from_environment()[1] == 1:
        raise ValueError("start main.py once, without torchrun: it starts its processes itself (--gpus 0,1)")
    requeued = run is not None and (job is not None and job.restarts > 0)
    if training.resume and not requeued:
        return find_run(training.resume, training.epoch)
    last = run.checkpoints / "last.ckpt" if run is not None and requeued else None
    return run, last if last is not None and last.exists() else None


def make_run(training: Training, job: Job | None) -> RunDirectory:
    """Make a new run directory; a later process of a SLURM step waits for the one that its first process makes."""
    if job and not is_first():
        return job.joined_run(lambda: list_folders(training))
    name = (training.name or Path((training.base or ("run",))[0]).stem) + training.postfix
    if training.ensemble_name:
        name += f"_{training.ensemble_name}{ALL_MEMBERS if training.joint else training.seed}"
    return new_run(training.logdir, name)
