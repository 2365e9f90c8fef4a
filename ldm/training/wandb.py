"""Weights & Biases beside TensorBoard: off without a key, on with one, offline where that is asked for.

The settings are Weights & Biases' own, from the environment or from the file `.env` of the working directory (lines
NAME=value; the environment goes first): WANDB_API_KEY turns it on, WANDB_MODE=offline too and needs no key (send the
runs later with `wandb sync`), WANDB_MODE=disabled turns it off. Needs the extra: pip install "decu-uncertainty[wandb]".
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from ldm.settings import Training
from ldm.training.config import to_plain
from ldm.training.processes import is_first
from ldm.training.runs import RunDirectory

log = logging.getLogger(__name__)

_PREFIX, KEY, MODE = "WANDB_", "WANDB_API_KEY", "WANDB_MODE"


def read_env(path: str | Path = ".env") -> dict[str, str]:
    """The WANDB_* settings of a file of lines NAME=value (`export`, quotes, comments allowed); empty without a file."""
    if not Path(path).is_file():
        return {}
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, given, value = line.strip().removeprefix("export ").partition("=")
        if given and name.strip().startswith(_PREFIX):
            found[name.strip()] = value.strip().strip("\"'")
    return found


def settings(environment: Mapping[str, str], path: str | Path = ".env") -> dict[str, str]:
    """The WANDB_* settings in force."""
    return {**read_env(path), **{name: value for name, value in environment.items() if name.startswith(_PREFIX)}}


def wanted(chosen: Mapping[str, str]) -> bool:
    """Whether these settings ask for Weights & Biases: a key that is not empty, or offline mode."""
    mode = chosen.get(MODE, "online")
    return mode != "disabled" and (mode == "offline" or bool(chosen.get(KEY)))


def check_project(project: str) -> None:
    """Make sure that a project of Weights & Biases is named only where something is sent there.

    Raises:
        ValueError: if it is named, and neither a key is set nor WANDB_MODE.
    """
    chosen = settings(os.environ)
    if project and not wanted(chosen) and MODE not in chosen:
        raise ValueError(
            f"--project {project} acts with Weights & Biases, which is off: set {KEY}, or {MODE}=offline, or leave "
            "--project out"
        )


def wandb_logger(folder: Path, project: str, config: Mapping[str, Any], name: str) -> pl.loggers.Logger | None:
    """A logger of this run, None where it is not asked for. A resumed run, which has the same name, goes on as one.

    Args:
        folder: where its files go.
        config: shown with the run.

    Where a key is set and the package is absent, one line says so and training goes on without it.
    """
    chosen = settings(os.environ)
    if not wanted(chosen):
        return None
    if importlib.util.find_spec("wandb") is None:
        by = KEY if KEY in chosen else MODE
        log.warning('Weights & Biases is asked for (%s) and not installed: pip install "decu-uncertainty[wandb]"', by)
        return None
    os.environ.update(chosen)
    from pytorch_lightning.loggers import WandbLogger

    offline = chosen.get(MODE) == "offline"
    return WandbLogger(name=name, id=name, project=project, save_dir=folder, offline=offline, config=dict(config))


def online_loggers(run: RunDirectory, record: DictConfig, training: Training) -> list[pl.loggers.Logger]:
    """Weights & Biases' logger where its settings ask for it, in the project that --project names."""
    if not is_first():
        return []
    logger = wandb_logger(run.path, training.project or "decu", to_plain(record), run.path.name)
    return [] if logger is None else [logger]
