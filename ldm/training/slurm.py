"""The run directory of a SLURM job: found again when the job is requeued, and shared by the processes of one step."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files import reading
from ldm.jobs import step_from_environment
from ldm.training.runs import RunDirectory
from ldm.util import atomic_write

FILE = "slurm.json"


# Seconds that the processes of a step have to end by themselves, each with its sentence, once one has failed.
ENDING = 5.0


def end_step_at_exit() -> None:
    """Let the failure of this process end the others of its SLURM step, which would wait for it until a time-out.

    That is done when it has said why it failed.
    """
    if step_from_environment()[1] > 1:
        atexit.register(_end_step)


def _end_step() -> None:
    time.sleep(ENDING)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its code stays the one of its failure
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID', '0')}"
    with suppress(OSError):
        subprocess.run(["scancel", step], capture_output=True)


@dataclass(frozen=True)
class Job:
    """One start of one command in a SLURM job. A requeued job keeps its number and counts its restarts."""

    job: str
    step: str
    restarts: int
    command: list[str]

    @classmethod
    def from_environment(cls, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Job | None:
        """Read what SLURM says of a command's job; None outside SLURM."""
        if "SLURM_JOB_ID" not in environment:
            return None
        restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        return cls(environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", ""), restarts, list(command))

    def record(self, run: RunDirectory) -> None:
        """Write `slurm.json` into a run directory."""
        with atomic_write(run.path / FILE, overwrite=True) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def _read(cls, file: Path) -> Job:
        with reading(file, "the record of a job", f"delete {file}"):
            return cls(**json.loads(file.read_text()))

    def _runs(self, folders: Iterable[Path], same: Callable[[Job], bool]) -> list[RunDirectory]:
        found = []
        for folder in folders:
            file = folder / FILE
            if file.is_file() and same(self._read(file)):
                found.append(RunDirectory(folder))
        return found

    def requeued_run(self, folders: Sequence[Path]) -> RunDirectory | None:
        """The run that an earlier start of this job and command left in one of `folders`.

        Of several, for a job may give a command twice, the first that is not finished, else the last.
        """
        if not self.restarts:
            return None
        runs = self._runs(folders, lambda other: (other.job, other.command) == (self.job, self.command))
        unfinished = [run for run in runs if not run.finished.exists()]
        return next(iter(unfinished[:1] or runs[-1:]), None)

    def joined_run(self, folders: Callable[[], Sequence[Path]], seconds: float = 300) -> RunDirectory:
        """The run that process 0 of this step makes; waits for it.

        Raises:
            ValueError: if there is none in time.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if runs := self._runs(folders(), lambda other: other == self):
                return runs[-1]
            time.sleep(0.5)
        raise ValueError(f"process 0 of SLURM job {self.job} made no run directory within {seconds:.0f} s")
