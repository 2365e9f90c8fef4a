"""`decu cluster train` and `decu cluster share`: the lines that spread an ensemble over the jobs of a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from ldm.options import option

# Commands that keep a file for each item, and so share their work; DECU's script stands for its command.
SHARED_COMMANDS = (
    "uncertainty classes",
    "sample model",
    "data latents",
    "laplace fit",
    "laplace sample",
    "exposure measure",
    "evaluate reference",
    "evaluate metrics",
    "features probe",
    "features contrastive",
)
SHARED_SCRIPTS = ("get_unc_synsets.py", "scripts/sample_diffusion.py")
ARRAY = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1 --ntasks=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --time={time}
#SBATCH --signal=USR1@90 --requeue --open-mode=append
#SBATCH --output={name}_%a.log
# {after}
set -euo pipefail
export SRUN_CPUS_PER_TASK={cpus}  # srun does not take the job's
{body}
"""


@dataclass(frozen=True)
class ClusterJobs:
    """What each job gets, and whether the lines become a SLURM job array."""

    acts_with: ClassVar[Mapping[str, str]] = {
        "time": "slurm",
        "cpus": "slurm",
        "overwrite": "slurm",
    }

    slurm: Annotated[str | None, option(metavar="FILE", default="the lines are printed")] = None
    """Write a job array there."""
    time: str = "24:00:00"
    """The time of a job of the array."""
    gpus: int = 1
    """GPUs of a job."""
    cpus: int = 8
    """CPUs of a job."""
    overwrite: bool = False
    """Replace the file of --slurm."""

    @property
    def python(self) -> list[str]:
        """How a line starts Python: in an array by srun, since SLURM signals steps, not what a batch script runs."""
        return ["srun", "python"] if self.slurm else ["python"]

    def write(self, lines: Sequence[str], after: str) -> None:
        """Write the array whose task k runs line k, or print the lines; `after` says what comes when they are done."""
        from ldm.util import atomic_write

        if self.slurm is None:
            print("\n".join([*lines, f"# {after}"]))
            return
        cases = "\n".join(f"    {number}) {line} ;;" for number, line in enumerate(lines))
        text = ARRAY.format(
            name=Path(self.slurm).stem,
            last=len(lines) - 1,
            after=f"Afterwards: {after}",
            body=f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac',
            gpus=f"#SBATCH --gpus={self.gpus}\n" if self.gpus else "",
            cpus=self.cpus,
            time=self.time,
        )
        with atomic_write(self.slurm, self.overwrite) as partial:
            partial.write_text(text)
        print(f"sbatch {self.slurm}\n# {after}")


@dataclass(frozen=True)
class ClusterTrain:
    """Print a training command for each member of an ensemble, and the command that gathers them.

    Examples:
      decu cluster train --members 5 --base configs/latent-diffusion/cin256-v2.yaml --logdir logs \\
          --ensemble_name bootstrapped
      decu cluster train --members 5 --slurm members.sh --base ... --ensemble_name bootstrapped
      sbatch members.sh

    Options that are not listed here are main.py's. With --slurm FILE the lines go into a job array whose tasks save
    before their time is over, are requeued and continue. Submit it from this folder with the environment active; what
    a cluster wants goes before the file: sbatch --partition=P FILE.
    """

    ensemble_name: str
    """The name of the ensemble."""
    members: int = 5
    """The number of members."""
    seed: int = 0
    """The seed of member 0; the next ones count on."""
    logdir: str = "logs"
    """Where run directories are made."""
    training_words: Annotated[tuple[str, ...], option(metavar="WORD ...", default="none")] = ()
    """Options of main.py; the words do without this option's name."""
    jobs: ClusterJobs = ClusterJobs()

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"expected at least one job, got --members {self.members}")

    def add_words(self, words: Sequence[str]) -> ClusterTrain:
        """Return the command with the words of the training."""
        return replace(self, training_words=(*self.training_words, *words))

    def run(self) -> list[str]:
        """Print or write the lines, and return them.

        Raises:
            ValueError: if the training has no config, or the ensemble's name is none for a folder.
            SystemExit: for words that `decu train` does not take, before each job ends with them.
        """
        from ldm.util import check_plain_name

        if not check_plain_name("--ensemble_name", self.ensemble_name).strip():
            raise ValueError("--ensemble_name is empty, and `decu gather` finds the members by it: give a name")
        if not {"--base", "-b"} & set(self.training_words):
            raise ValueError("name the training's config: --base FILE.yaml, and any other option of main.py")
        if any(word.partition("=")[0] == "--component" for word in self.training_words):
            raise ValueError("--component is that of each line, 0 to --members - 1: leave it out")
        lines = []
        for member in range(self.members):
            words = [*self.jobs.python, "main.py", "-t", "--gpus", f"{self.jobs.gpus}", "--start_from_pretrained"]
            words += [*self.training_words, "--logdir", self.logdir, "--ensemble_name", self.ensemble_name]
            words += ["--component", str(member), "--seed", str(self.seed + member)]
            _check_words("train", words[words.index("-t") :])
            lines.append(shlex.join(words))
        gather = ["python", "save_ensemble.py", "--path", self.logdir, "--ensemble_name", self.ensemble_name]
        self.jobs.write(lines, shlex.join([*gather, "--ensemble_comps", str(self.members)]))
        return lines


@dataclass(frozen=True)
class ClusterShare:
    """Print a line for each job of a command that shares its work; started again it continues.

    Examples:
      decu cluster share --jobs 8 --slurm classes.sh -- uncertainty classes --path ENSEMBLE
      decu cluster share --jobs 8 -- data latents --base ... data.params.latent_cache=DIR
      sbatch classes.sh

    After -- comes the command with its options, or DECU's script. With --slurm FILE the lines go into a job array whose
    tasks are requeued when their time is over, and continue. Submit it from this folder with the environment active;
    what a cluster wants goes before the file: sbatch --partition=P FILE.
    """

    count: Annotated[int, option(name="jobs")] = 4
    """The number of jobs."""
    command: Annotated[tuple[str, ...], option(metavar="WORD ...", default="none")] = ()
    """The command and its options; the words go after -- and do without this option's name."""
    jobs: ClusterJobs = ClusterJobs()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"expected at least one job, got --jobs {self.count}")
        if self.jobs.slurm is None and self.jobs.gpus != ClusterJobs.gpus:
            raise ValueError(
                f"--gpus {self.jobs.gpus} is of the jobs that --slurm FILE asks for: add it, or leave it out"
            )

    def add_words(self, words: Sequence[str]) -> ClusterShare:
        """Return the command with the words after --.

        Raises:
            ValueError: for words before it, which are no options of this command.
        """
        place = list(words).index("--") if "--" in words else len(words)
        if place:
            raise ValueError(f"unknown options {list(words[:place])}; the command's own go after --")
        return replace(self, command=(*self.command, *words[1:])) if words else self

    def run(self) -> list[str]:
        """Print or write the lines, and return them.

        Raises:
            ValueError: if the command does not share its work.
            SystemExit: for words that it does not take, before each job ends with them.
        """
        shared = " ".join(self.command[:2]) in SHARED_COMMANDS
        if not shared and self.command[:1] not in [(script,) for script in SHARED_SCRIPTS]:
            known = ", ".join([*SHARED_COMMANDS, *SHARED_SCRIPTS])
            raise ValueError(
                f"give a command that shares its work after --, one of {known}; got {list(self.command[:2])}"
            )
        if shared:
            _check_words(" ".join(self.command[:2]), self.command[2:])
        start = ["-m", "ldm"] if shared else []
        line = shlex.join([*self.jobs.python, *start, *self.command])
        lines = [f"RANK={rank} WORLD_SIZE={self.count} {line}" for rank in range(self.count)]
        self.jobs.write(lines, "the job that finishes last writes the results, or one more call of the command")
        return lines


def _check_words(name: str, words: Sequence[str]) -> None:
    """End the process with code 2 and a message, where a command does not take words."""
    from ldm.commands.line import load_command, parse

    parse(load_command(name), words, f"decu {name}")
