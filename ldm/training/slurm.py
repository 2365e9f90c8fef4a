"""The run directory of a SLURM job: found again when the job is requeued, and shared by the processes of one step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files import read_json
from ldm.training.runs import RunDirectory
from ldm.util import atomic_write

FILE = "slurm.json"


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

    def _runs(self, folders: Iterable[Path], same: Callable[[Job], bool]) -> list[RunDirectory]:
        found = []
        for folder in folders:
            file = folder / FILE
            if file.is_file() and same(Job(**read_json(file, "the record of a job", f"delete {file}"))):
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
