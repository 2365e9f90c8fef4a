"""Checkpoints of a training: written whole or not at all, never with weights that are not finite, kept by name."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.util import atomic_write

log = logging.getLogger(__name__)

# Options of Lightning's ModelCheckpoint in released YAMLs that change nothing here: last.ckpt is always written.
IGNORED_OPTIONS = frozenset({"verbose", "save_last", "filename", "auto_insert_metric_name", "save_on_train_epoch_end"})


class PlainCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing through `ldm.checkpoint`: atomic, and no code in a file is ever run."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path, overwrite=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return load_checkpoint(path)


def link(source: Path, name: Path) -> None:
    """A second name for a file that is never written into, replacing what had it; a copy where links are impossible."""
    with atomic_write(name, overwrite=True) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


class KeepCheckpoints(Checkpoint):
    """Write `last.ckpt`, keep one every so many epochs or steps by name, and the best by a validation metric.

    Names: `epoch=000049.ckpt`, `epoch=000003-step=00012000.ckpt`, `best-epoch=000049-step=00001100.ckpt`; an epoch is
    counted from 0 and named when it is complete.

    Args:
        folder: where they go.
        every_n_epochs, every_n_steps: what is kept by name. `last.ckpt` is written then, after a validation that
            improved the metric, and at the end (and by `SaveWhenStopped` every few minutes).
        monitor: metric of the best; a validation that does not log it is passed over. mode: min or max.
        save_top_k: how many of the best are kept; 0: none, -1: no best, everything every_n_* by name.

    Raises:
        ValueError: for options that do not exist or do not go together.
    """

    def __init__(
        self,
        folder: Path,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
    ):
        if mode not in ("min", "max"):
            raise ValueError(f"modelcheckpoint.params.mode must be min or max, got '{mode}'")
        for name, value in (("epochs", every_n_epochs), ("steps", every_n_steps)):
            if value is not None and value < 0:
                raise ValueError(f"--every_n_{name} must be positive, got {value}")
        self.folder, self.mode, self.best_count = folder, mode, max(0, save_top_k)
        self.monitor = monitor if self.best_count else None
        self.every_n_epochs, self.every_n_steps = every_n_epochs or 0, every_n_steps or 0
        self.best: dict[str, float] = {}
        self.saved_step, self.previous_step = -1, 0

    @classmethod
    def from_options(
        cls, folder: Path, given: Mapping[str, Any], monitor: str | None, every_n_epochs=None, every_n_steps=None
    ) -> KeepCheckpoints:
        """From `lightning.modelcheckpoint.params`; `every_n_*` of the command line go before it."""
        given = {key: value for key, value in given.items() if key not in IGNORED_OPTIONS}
        given.setdefault("every_n_steps", given.pop("every_n_train_steps", None))
        if every_n_epochs is not None or every_n_steps is not None:
            given |= {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps}
        known = {"every_n_epochs", "every_n_steps", "monitor", "mode", "save_top_k"}
        if unknown := set(given) - known:
            raise ValueError(
                f"unknown keys in lightning.modelcheckpoint.params: {sorted(unknown)}; known are {sorted(known)} and "
                "every_n_train_steps. Other checkpoint callbacks go under lightning.callbacks, with a target"
            )
        return cls(folder, **{"monitor": monitor, **given})

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = {name: value for name, value in state["best"].items() if (self.folder / name).exists()}

    def save(self, trainer: pl.Trainer, *names: str) -> Path:
        """Write `last.ckpt`, unless this step has it already, and give it further names. Called by every process.

        Raises:
            FloatingPointError: if a trained weight is not finite; nothing is written then.
        """
        last = self.folder / "last.ckpt"
        if trainer.global_step != self.saved_step:
            model = trainer.lightning_module
            trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
            bad = [name for name, value in trained.items() if not bool(torch.isfinite(value).all())]
            if bad:
                raise FloatingPointError(
                    f"{len(bad)} of {len(trained)} weights are not finite at step {trainer.global_step} "
                    f"(e.g. {bad[0]}): nothing was saved, {self.folder} keeps the checkpoints of earlier steps"
                )
            trainer.save_checkpoint(last, weights_only=False)
            self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            for name in names:
                link(last, self.folder / name)
        return last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.previous_step = trainer.global_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # Not after the batch before: a module may step its averages in its own hook, which comes after a callback's.
        self._keep_step(trainer)

    def _keep_step(self, trainer: pl.Trainer) -> None:
        before, self.previous_step = self.previous_step, trainer.global_step
        if self.every_n_steps and trainer.global_step // self.every_n_steps > before // self.every_n_steps:
            self.save(trainer, f"epoch={trainer.current_epoch:06}-step={trainer.global_step:08}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor not in trainer.callback_metrics:
            return
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        sign = 1 if self.mode == "min" else -1
        better = [name for name, other in self.best.items() if not sign * value < sign * other]
        if value != value or len(better) >= self.best_count:
            return
        name = f"best-epoch={trainer.current_epoch:06}-step={trainer.global_step:08}.ckpt"
        ranked = sorted({**self.best, name: value}.items(), key=lambda item: sign * item[1])
        dropped = [other for other in self.best if other not in dict(ranked[: self.best_count])]
        self.best = dict(ranked[: self.best_count])
        self.save(trainer, name)
        if trainer.is_global_zero:
            for other in dropped:
                (self.folder / other).unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_step(trainer)
        complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if complete and self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer, f"epoch={trainer.current_epoch:06}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
