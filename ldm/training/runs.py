"""Run directories: where a training keeps its configs, checkpoints and logs, and how it is found again."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.files import read_mapping
from ldm.records import write_record
from ldm.settings import Training
from ldm.training.config import load_config
from ldm.trust import accept_config
from ldm.util import atomic_write, check_plain_name

KEPT = re.compile(r"^(?P<best>best-)?epoch=(?P<epoch>\d+)(-step=(?P<step>\d+))?\.ckpt$")
STAMP = re.compile(r"^\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(-\d+)?")


@dataclass(frozen=True)
class RunDirectory:
    """`{logdir}/{timestamp}_{name}` with `checkpoints/` and `configs/` (latent-diffusion's layout)."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> Path:
        """The record of its end: there once the training came to it."""
        return self.path / "finished.json"

    @property
    def configs(self) -> Path:
        return self.path / "configs"

    def checkpoint(self, epoch: int | None = None) -> Path:
        """The last checkpoint, or the latest that was kept of an epoch (its number in the file's name, from 0).

        Raises:
            ValueError: if the run saved nothing; listing the epochs that were kept, if this one was not.
        """
        last = self.checkpoints / "last.ckpt"
        if epoch is None and not last.exists():
            raise ValueError(f"{self.path} has no checkpoints/last.ckpt: the run saved nothing, or is no run directory")
        if epoch is None:
            return last
        kept = [(match, path) for path in self.checkpoints.glob("*.ckpt") if (match := KEPT.match(path.name))]
        own = [(match, path) for match, path in kept if int(match["epoch"]) == epoch]
        if not own:
            epochs = sorted({int(match["epoch"]) for match, _ in kept})
            raise ValueError(
                f"{self.path} kept no checkpoint of epoch {epoch}; it has epochs {epochs}. "
                "Train with --every_n_epochs N or --every_n_steps N to keep more"
            )
        return max(own, key=lambda item: (item[0]["step"] is None, int(item[0]["step"] or 0), not item[0]["best"]))[1]

    def kept(self) -> dict[str, Path]:
        """{name: checkpoint} of those kept by epoch or step, the best left out, in the order of training."""
        matches = [(match, path) for path in self.checkpoints.glob("*.ckpt") if (match := KEPT.match(path.name))]
        order = sorted(
            (int(match["epoch"]), match["step"] is None, int(match["step"] or 0), path)
            for match, path in matches
            if not match["best"]
        )
        return {path.stem: path for *_, path in order}

    def discard(self) -> None:
        """Remove the directory of a training that failed before its first step; one that holds checkpoints stays."""
        if not any(self.checkpoints.glob("*")):
            shutil.rmtree(self.path)

    @property
    def stamp(self) -> str:
        match = STAMP.match(self.path.name)
        return match.group(0) if match else self.path.name

    @property
    def has_config(self) -> bool:
        """Whether the run wrote its config: a training does when it begins to fit."""
        return any(self.configs.glob("*-project.yaml"))

    def config(self, kind: str = "project") -> DictConfig:
        """The model and data config the run was started with (`project`), or its trainer's (`lightning`).

        Raises:
            ValueError: if the run holds none, or one that names a class that is not known (`ldm.trust`).
        """
        for file in sorted(self.configs.glob("*.yaml")):  # of the others nothing is taken, but nothing runs either
            accept_config(load_config([str(file)], needs=()), file)
        files = self.config_files(kind)
        needs = ("model",) if kind == "project" else ()
        return accept_config(load_config([str(file) for file in files], needs=needs), files[-1])

    def config_files(self, kind: str = "project") -> list[Path]:
        """The files of a config, in the order in which they are merged.

        Raises:
            ValueError: if there are none.
        """
        files = sorted(self.configs.glob(f"*-{kind}.yaml"))
        if not files:
            raise ValueError(f"{self.path} has no configs/*-{kind}.yaml: is it a run directory?")
        return files

    def write_config(self, config: DictConfig, kind: str) -> Path:
        """Write `configs/{timestamp}-{kind}.yaml`; a resumed run that changed something adds a file of its own."""
        text = OmegaConf.to_yaml(config)
        path = self.configs / f"{self.stamp}-{kind}.yaml"
        if path.exists() and path.read_bytes() == text.encode():
            return path
        if path.exists():
            path = self.configs / f"{self.stamp}-{datetime.now():%Y%m%d%H%M%S}-{kind}.yaml"
        with atomic_write(path) as partial:
            partial.write_text(text)
        return path


def new_run(logdir: str | Path, name: str) -> RunDirectory:
    """Create a run directory that did not exist.

    Raises:
        ValueError: for a name that would lead out of `logdir`.
    """
    logdir = Path(logdir)
    check_plain_name("the name of a run", name)
    logdir.mkdir(parents=True, exist_ok=True)
    stamp = f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
    for suffix in ("", *(f"-{count}" for count in range(1, 1000))):
        path = logdir / f"{stamp}{suffix}_{name}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        run = RunDirectory(path)
        run.checkpoints.mkdir()
        run.configs.mkdir()
        return run
    raise RuntimeError(f"no free run directory in {logdir} for {stamp}_{name}")


def find_run(resume: str | Path, epoch: int | None = None) -> tuple[RunDirectory, Path]:
    """The run and checkpoint that `--resume` names: a run directory (its last, or that of an epoch) or a checkpoint.

    Raises:
        ValueError: if there is neither, or a checkpoint and an epoch.
    """
    path = Path(resume)
    if path.is_file() and epoch is not None:
        raise ValueError(f"--epoch {epoch} chooses a checkpoint of a run directory, but {resume} is a checkpoint")
    if path.is_file():
        run = RunDirectory(path.parent.parent)
        if not run.has_config:
            raise ValueError(
                f"{resume} is a file that lies in no run directory (RUN/checkpoints/NAME.ckpt): name a run, or give a "
                "checkpoint with its config (--base CONFIG --ckpt FILE)"
            )
        return run, path
    if path.is_dir():
        run = RunDirectory(path)
        return run, run.checkpoint(epoch)
    raise ValueError(f"{resume}: expected a run directory or a checkpoint file of one, found neither")


def runs_named(logdir: str | Path, pattern: str) -> list[RunDirectory]:
    """Runs below `logdir` whose name after the timestamp ends in `pattern` (a regular expression), oldest first."""
    logdir = Path(logdir)
    if not logdir.is_dir():
        raise ValueError(f"no directory {logdir}; --path is the --logdir that the components were trained with")
    found = [path for path in logdir.iterdir() if path.is_dir() and STAMP.match(path.name)]
    return [RunDirectory(path) for path in sorted(found) if re.search(pattern + "$", path.name)]


def write_run_record(run: RunDirectory, training: Training) -> None:
    """Write record.json: how the run was started, and under `earlier` how it was before, each time that it was."""
    file = run.path / "record.json"
    earlier = []
    if file.exists():
        before = read_mapping(file, "a command's record", f"delete {file}")
        earlier = [*before.pop("earlier", []), before]
    write_record(file, training.flat_options(), overwrite=True, earlier=earlier)
