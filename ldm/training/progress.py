"""What a training shows while it runs: steps of all steps, the time that is left, and the loss."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

# Share of the average that a shown loss keeps from the refreshes before.
OF_BEFORE = 0.8


class TrainingProgress(TQDMProgressBar):
    """One bar over the whole training, where Lightning's begins again with every epoch.

    It counts optimiser steps to `max_steps`, or those of `max_epochs` epochs, and shows the time left of all of them,
    the epoch, and a running average of the loss.
    """

    def __init__(self, refresh_rate: int = 10):
        super().__init__(refresh_rate=refresh_rate)
        self._loss: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.global_step
        self.train_progress_bar = tqdm(
            desc="training",
            total=count_steps(trainer),
            initial=done,
            unit="step",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0.05,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave the bar as it is, whatever epoch begins."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, bar = trainer.global_step, self.train_progress_bar
        due = step % self.refresh_rate == 0 or step == bar.total
        if self.is_enabled and due and step > bar.n:
            bar.set_postfix(self.get_metrics(trainer, pl_module, outputs), refresh=False)
            bar.update(step - bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the bar as it is, whatever epoch ends."""

    def get_metrics(self, trainer: pl.Trainer, model: pl.LightningModule, outputs: Any = None) -> dict[str, Any]:
        """Return the epoch, the average loss, and what the model logs with `prog_bar`."""
        found = dict(super().get_metrics(trainer, model))
        found.pop("v_num", None)
        logged = found.pop("loss", None)
        loss = read_loss(outputs) if logged is None else float(logged)
        if loss is not None:
            self._loss = loss if self._loss is None else OF_BEFORE * self._loss + (1 - OF_BEFORE) * loss
        average = {} if self._loss is None else {"loss": f"{self._loss:.4g}"}
        return {"epoch": trainer.current_epoch, **average, **found}


def count_steps(trainer: pl.Trainer) -> int | None:
    """Return the optimiser steps of a whole training, None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps != float("inf") else None


def read_loss(outputs: Any) -> float | None:
    """Return the loss of what a training step gave, None where it gave none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return None if loss is None else float(loss)
