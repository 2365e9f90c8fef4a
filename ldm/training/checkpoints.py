"""Checkpoints of a training: written whole or not at all, never with weights that are not finite, kept by name."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from ldm.arguments import check_arguments, suggest_key
from ldm.util import atomic_write

log = logging.getLogger(__name__)

# Options of Lightning's ModelCheckpoint in released YAMLs that change nothing here: last.ckpt is always written.
OWN_OPTIONS = frozenset({"every_n_epochs", "every_n_steps", "monitor", "mode", "save_top_k"})
IGNORED_OPTIONS = frozenset({"verbose", "save_last", "filename", "auto_insert_metric_name", "save_on_train_epoch_end"})


def link(source: Path, name: Path) -> None:
    """A second name for a file that is never written into, replacing what had it; a copy where links are impossible."""
    with atomic_write(name, overwrite=True) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


@dataclass(frozen=True)
class Due:
    """What is still to be done after the step of a checkpoint when it is written.

    Args:
        validation: the validation that this step ends with.
        names: further names that the file is to get.
    """

    validation: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Due:
        """Read it from a checkpoint, whose containers are lists."""
        return cls(**{**state, "names": tuple(state.get("names", ()))})


def validate_now(trainer: pl.Trainer) -> None:
    """Run the validation that Lightning passes over when it resumes at the step that it belongs to."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    loop.restarting = False
    loop.run()
    loop._has_run = False  # else Lightning's training loop takes this epoch for done before it has begun
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first


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
        if save_top_k < -1:
            raise ValueError(f"modelcheckpoint.params.save_top_k must be -1 at least, got {save_top_k}")
        self.folder, self.mode, self.best_count = folder, mode, max(0, save_top_k)
        self.monitor = monitor if self.best_count else None
        self.said = False
        self.every_n_epochs, self.every_n_steps = every_n_epochs or 0, every_n_steps or 0
        self.best: dict[str, float] = {}
        self.saved_step, self.previous_step = -1, 0
        self.due = Due()
        self.resumed = self.recount = False
        self.validated_step = -1
        self.complete_epoch: int | None = None

    @classmethod
    def check_values(cls, given: Mapping[str, Any], place: str) -> None:
        """Make sure that the values of `lightning.modelcheckpoint.params` are of their types and in their ranges.

        Raises:
            ValueError: naming the key, below `place`.
        """
        own = {key.replace("_train_", "_"): value for key, value in given.items() if key not in IGNORED_OPTIONS}
        check_arguments(cls, own, place, complete=False)

    @classmethod
    def from_options(
        cls, folder: Path, given: Mapping[str, Any], monitor: str | None, every_n_epochs=None, every_n_steps=None
    ) -> KeepCheckpoints:
        """From `lightning.modelcheckpoint.params`; `every_n_*` of the command line go before it."""
        given = {key: value for key, value in given.items() if key not in IGNORED_OPTIONS}
        given.setdefault("every_n_steps", given.pop("every_n_train_steps", None))
        if every_n_epochs is not None or every_n_steps is not None:
            given |= {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps}
        if unknown := set(given) - OWN_OPTIONS:
            raise ValueError(
                f"unknown keys in lightning.modelcheckpoint.params: {sorted(unknown)}; known are "
                f"{sorted(OWN_OPTIONS)} and every_n_train_steps. Other checkpoint callbacks go under "
                "lightning.callbacks, with a target"
            )
        return cls(folder, **{"monitor": monitor, **given})

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best), "due": asdict(self.due)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = dict(state["best"])
        self.due = Due.from_state(state.get("due", {}))
        self.resumed = self.recount = True

    def save(self, trainer: pl.Trainer, *names: str) -> Path:
        """Write `last.ckpt`, unless this step has it already, and give it further names. Called by every process.

        The file says what is still due after its step, for a training that is resumed from it.

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
            validation = trainer.validating and self.validated_step != trainer.global_step
            self.due = Due(validation, (*names, *self._further_names(trainer)))
            trainer.save_checkpoint(last, weights_only=False)
            self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            for name in names:
                link(last, self.folder / name)
        return last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.previous_step = trainer.global_step
        if self.resumed:
            self._catch_up(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed:  # no step was left to train
            self.on_train_start(trainer, pl_module)

    def _catch_up(self, trainer: pl.Trainer) -> None:
        """Do what the training that this one continues was stopped before: names, the validation, what is kept."""
        self.resumed, due = False, self.due
        if trainer.is_global_zero:
            for name in due.names:
                if not (self.folder / name).exists():
                    link(Path(str(trainer.ckpt_path)), self.folder / name)
        trainer.strategy.barrier("kept checkpoints")
        self.best = {name: value for name, value in self.best.items() if (self.folder / name).exists()}
        if due.validation:
            validate_now(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.recount:
            # Lightning's count, at which validations are logged, is one too high where it resumes between two steps.
            trainer.fit_loop.epoch_loop._batches_that_stepped = getattr(
                pl_module, "generator_step", trainer.global_step
            )
            self.recount = False
        # Not after the batch before: a module may step its averages in its own hook, which comes after a callback's.
        self._keep(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.complete_epoch = trainer.current_epoch if last else None

    def _further_names(self, trainer: pl.Trainer) -> list[str]:
        """Names by which this step is to be kept for its number, or for the end of its epoch, and is not yet."""
        names = []
        every, epoch = self.every_n_steps, self.complete_epoch
        if every and trainer.global_step // every > self.previous_step // every:
            names.append(f"epoch={trainer.current_epoch:06}-step={trainer.global_step:08}.ckpt")
        if epoch is not None and self.every_n_epochs and (epoch + 1) % self.every_n_epochs == 0:
            names.append(f"epoch={epoch:06}.ckpt")
        return names

    def _keep(self, trainer: pl.Trainer) -> None:
        names = self._further_names(trainer)
        self.previous_step = trainer.global_step
        if names:
            self.save(trainer, *names)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated_step = trainer.global_step
        self._say_unlogged(trainer)
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

    def _say_unlogged(self, trainer: pl.Trainer) -> None:
        """Say once that the metric of the best is none of those that a validation logs."""
        logged = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if self.said or trainer.sanity_checking or self.monitor is None or not logged or self.monitor in logged:
            return
        self.said = True
        nearest = suggest_key(self.monitor, logged)
        log.warning(
            "monitor %s: this validation did not log it, and keeps no best checkpoint: %s", self.monitor, nearest
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer)
        self.complete_epoch = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
