"""Averages of a training whose width is chosen afterwards: snapshots beside the checkpoints, and what they combine to.

`lightning.callbacks.posthoc_ema` writes snapshots; `decu export --ema WIDTH` and `decu gather --ema WIDTH` combine
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.files import read_metadata
from ldm.modules.power_averages import PowerAverages, Profile, combine_profiles, exponent_of
from ldm.training.joint import JointMembers
from ldm.training.runs import RunDirectory

SNAPSHOTS = "averages"
_NAME = re.compile(r"step=(\d{8})-width=([0-9.]+)\.safetensors")


def name_trained(module: pl.LightningModule) -> dict[str, Tensor]:
    """Return what trains of a module by its name in checkpoints; of members together `{member}.{name}`."""
    if isinstance(module, JointMembers):
        heads = enumerate(module.heads)
        return {f"{number}.{name}": value for number, own in heads for name, value in own.items()}
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


class PosthocEMA(Callback):
    """Average what trains under a few widths, and write a snapshot of each every so many steps and at the end.

    Files: `averages/step=00001000-width=0.05.safetensors` in the run directory. The averages are saved with the
    checkpoints, so that a resumed training writes the snapshots that it would have written.

    Args:
        widths: of the averages, relative to the length of the training so far; the published ones are 0.05 and 0.1.
        every_n_steps: optimiser steps between two snapshots; ten to a hundred of a training are plenty.

    Raises:
        ValueError: for a width that no profile has, or no steps between snapshots.
    """

    def __init__(self, widths: Sequence[float] = (0.05, 0.1), every_n_steps: int = 500):
        if every_n_steps < 1 or not widths:
            raise ValueError(f"posthoc_ema needs widths, and at least one step between snapshots; got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.averages = PowerAverages(widths)
        self.stepped = 0
        self.written = -1

    def state_dict(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages.load_state_dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stepped = trainer.global_step
        self.averages.to(pl_module.device)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.stepped:
            return
        self.averages.update(name_trained(pl_module))
        self.stepped = trainer.global_step
        if self.stepped % self.every_n_steps == 0:
            self.write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.averages.time and self.written != self.stepped:
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """Write a snapshot of each average."""
        self.written = self.stepped
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / SNAPSHOTS
        folder.mkdir(exist_ok=True)
        for width, own in self.averages.averages.items():
            path = folder / f"step={self.stepped:08}-width={width:g}.safetensors"
            save_tensors(own, path, {"time": str(self.averages.time)}, overwrite=True)


@dataclass(frozen=True)
class Snapshot:
    """A file of averages, and how they weigh the past."""

    path: Path
    step: int
    profile: Profile


def find_snapshots(run: RunDirectory, step: int | None = None) -> list[Snapshot]:
    """Return the snapshots of a run up to a step (None: all), oldest first.

    Raises:
        ValueError: if there are none.
    """
    found = []
    for path in sorted((run.path / SNAPSHOTS).glob("*.safetensors")):
        named = _NAME.fullmatch(path.name)
        if named is None or (step is not None and int(named[1]) > step):
            continue
        time = float(read_metadata(path, "time")["time"])
        found.append(Snapshot(path, int(named[1]), Profile(time, exponent_of(float(named[2])))))
    if not found:
        until = "" if step is None else f" up to step {step}"
        raise ValueError(
            f"{run.path} has no snapshots of averages{until}: train with lightning.callbacks.posthoc_ema "
            "(docs/training.md), which writes them"
        )
    return found


def read_averages(run: RunDirectory, width: float, step: int | None = None) -> dict[str, Tensor]:
    """Return the average of a width at a run's last snapshot up to a step, combined of all snapshots until then.

    Args:
        run: that was trained with `PosthocEMA`.
        width: of the average.
        step: None: the end of the run.

    Raises:
        ValueError: for a width that no profile has, or if the run has no snapshots.
    """
    exponent = exponent_of(width)
    snapshots = find_snapshots(run, step)
    end = max(snapshot.profile.time for snapshot in snapshots)
    weights = combine_profiles([snapshot.profile for snapshot in snapshots], Profile(end, exponent))
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        for name, value in load_state_dict(snapshot.path).items():
            dtypes[name] = value.dtype
            total[name] = total.get(name, 0) + weight * value.double()
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def put_averages(state: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with averages in place of the tensors of their names, and without other averages.

    Raises:
        ValueError: if there are averages of what the state dict does not hold.
    """
    unknown = sorted(set(averages) - set(state))
    if unknown:
        raise ValueError(f"the snapshots average {unknown[:3]}, which the checkpoint does not hold: of one run?")
    kept = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    return {**kept, **averages}


def split_snapshots(joint: RunDirectory, member: RunDirectory, number: int) -> None:
    """Give the run of one of the members that were trained together its part of the snapshots, where there are any."""
    for path in sorted((joint.path / SNAPSHOTS).glob("*.safetensors")):
        metadata = read_metadata(path)
        begins = f"{number}."
        own = {name.removeprefix(begins): value for name, value in load_state_dict(path).items()
               if name.startswith(begins)}  # fmt: skip
        (member.path / SNAPSHOTS).mkdir(exist_ok=True)
        save_tensors(own, member.path / SNAPSHOTS / path.name, metadata, overwrite=True)
