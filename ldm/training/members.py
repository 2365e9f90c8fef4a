"""`main.py --component all`: what the joint training of an ensemble is built from, and the runs it leaves.

The training has a run directory `{time}_{name}_{ensemble_name}all` of its own, which can be resumed. When it is
finished every member gets a run directory as its own training would have left, for save_ensemble.py and all else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from ldm.checkpoint import save_checkpoint
from ldm.data.joint import JointBatches, JointDataset
from ldm.data.module import DataModuleFromConfig
from ldm.files import read_mapping
from ldm.records import write_record
from ldm.settings import Training
from ldm.training.config import point_data
from ldm.training.joint import JointMembers, start_members
from ldm.training.posthoc import split_snapshots
from ldm.training.processes import ALL_MEMBERS
from ldm.training.runs import RunDirectory, new_run
from ldm.util import atomic_write, instantiate_from_config

MADE = "members.json"


class JointDataModule(pl.LightningDataModule):
    """The training data of M members, and the first member's validation data.

    Args:
        modules: the data module of each member's own run, with its `seed` and `member`.
    """

    def __init__(self, modules: Sequence[DataModuleFromConfig]):
        super().__init__()
        self.modules = list(modules)
        self.dataset_configs = {
            name: config for name, config in modules[0].dataset_configs.items() if name in ("train", "validation")
        }

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once: the last member's first, whose error says how many lists to draw."""
        for module in reversed(self.modules):
            module.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Batches [M B, ...], member after member."""
        for module in self.modules:
            module.trainer = self.trainer
        members = [module.train_batches() for module in self.modules]
        return self.modules[0].loader(JointDataset([one.data for one in members]), batch_sampler=JointBatches(members))

    def val_dataloader(self) -> DataLoader | list:
        """The same for every member."""
        self.modules[0].trainer = self.trainer
        return self.modules[0].val_dataloader()


def build_members(config: DictConfig, training: Training) -> JointMembers:
    """Start the members' heads on one base checkpoint, member m with the draws of seed `training.seed` + m."""
    model = instantiate_from_config(config.model)
    return JointMembers(start_members(model, training.member_count, training.seed))


def build_joint_data(config: DictConfig, training: Training) -> JointDataModule:
    """Build the data of every member, in the order of its own run."""
    modules = []
    for member in range(training.member_count):
        module = instantiate_from_config(point_data(config, member).data)
        module.seed = training.seed + member
        module.member = member
        modules.append(module)
    return JointDataModule(modules)


def write_member_runs(
    run: RunDirectory, model: JointMembers, config: DictConfig, training: Training, step: int
) -> list[Path]:
    """Give every member of a finished training a run directory beside the training's own; once.

    Where the training was resumed and went further, the members' checkpoints are replaced.

    Args:
        run: of the joint training; its `members.json` lists what was made.
        config: the training's, with its section `run`.
        step: optimiser steps that were made.
    """
    name = run.path.name.removeprefix(f"{run.stamp}_").removesuffix(ALL_MEMBERS)
    kept = run.path / MADE
    made: dict[str, str] = read_mapping(kept, "the list of members' runs", f"delete {kept}") if kept.exists() else {}
    for number in range(len(model.members)):
        seed = training.seed + number
        own = RunDirectory(run.path.parent / made[str(number)]) if str(number) in made else None
        if own is None or not own.path.is_dir():
            own = new_run(run.path.parent, f"{name}{seed}")
        elif finished_step(own) == step:
            continue
        pointed = point_data(config, number)
        pointed.run = {**config.run, "seed": seed, "component": number}
        pointed.run.pop("members", None)
        own.write_config(pointed, "project")
        split_snapshots(run, own, number)
        content: dict[str, Any] = {
            "state_dict": {head: value.detach().cpu().clone() for head, value in model.heads[number].items()},
            "component": model.records[number].as_dict(),
            "global_step": step,
        }
        save_checkpoint(content, own.checkpoints / "last.ckpt", overwrite=True)
        write_record(own.finished, training.flat_options(), overwrite=True, step=step, trained_in=run.path.name)
        made[str(number)] = own.path.name
        _write(run.path / MADE, made)
    return [run.path.parent / directory for directory in made.values()]


def finished_step(run: RunDirectory) -> int | None:
    """The optimiser steps of a finished run; None where it is not finished."""
    if not run.finished.exists():
        return None
    return read_mapping(run.finished, "the record of a training's end", f"delete {run.finished}").get("step")


def _write(path: Path, content: Mapping[str, str]) -> None:
    with atomic_write(path, overwrite=True) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
