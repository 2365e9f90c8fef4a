"""How a training ends before its time: by a signal, saved at the end of a step, or by a loss that is not finite."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ldm.training.checkpoint_io import PlainCheckpointIO

log = logging.getLogger(__name__)

# Where several processes train, or the loss lies on another device, looking costs a synchronisation.
LOOK_EVERY = 10
NEVER = torch.iinfo(torch.int64).max


class StoppedBySignal(Exception):
    """A signal ended the training; a process then exits with 128 + `signum`.

    Args:
        signum: number of the signal.
        saved: whether last.ckpt was written first.
    """

    def __init__(self, signum: int, saved: bool = True):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.saved = saved


def largest(trainer: pl.Trainer, values: list[int]) -> list[int]:
    """The largest of every value over all processes, the same in each."""
    if trainer.world_size == 1:
        return values
    tensor = torch.tensor(values, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(tensor, reduce_op="max").tolist()


class SaveWhenStopped(Callback):
    """Save between two steps when a signal asks for it, every `minutes`, and when an error ends the run.

    Ctrl-C and SIGTERM save and raise `StoppedBySignal`; a second Ctrl-C stops at once and saves nothing. SIGUSR2 saves
    and training goes on. SIGUSR1, where something answers it (`ldm.jobs.requeue_when_asked`), saves before that is
    called, in the first process only. A step is over when its numbers are logged, which Lightning does after
    `on_train_batch_end`: hence the hooks below.

    Args:
        save: writes last.ckpt and returns its path.
        on_error: save when an error ends the run (one process only: the others may be anywhere).
        minutes: longest time between two saves; None: no limit.
    """

    STOP = ("SIGINT", "SIGTERM")
    SAVE = ("SIGUSR2",)
    REQUEUE = ("SIGUSR1",)

    def __init__(self, save: Callable[[pl.Trainer], Path], on_error: bool = True, minutes: float | None = 10.0):
        self.save, self.on_error, self.minutes = save, on_error, minutes
        self.signals = [getattr(signal, name) for name in self.STOP + self.SAVE + self.REQUEUE if hasattr(signal, name)]
        self.asked: set[int] = set()
        self.steps, self.saved = 0, time.monotonic()
        self.first_step: int | None = None  # of this process; none before a checkpoint's state is taken up
        self.requeue: Callable[..., Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals; Lightning puts the handlers of before back when the run ends.

        Raises:
            ValueError: if the checkpoint that the training goes on from held other states than it needs.
        """
        reader = trainer.strategy.checkpoint_io
        if isinstance(reader, PlainCheckpointIO):
            reader.check_states(trainer)
        self.first_step, self.saved = trainer.global_step, time.monotonic()
        for signum in self.signals:
            if signal.Signals(signum).name in self.REQUEUE:
                handler = signal.getsignal(signum)
                if not callable(handler):
                    continue
                self.requeue = handler
            signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signum in self.asked:
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            log.info("Ctrl-C: saving at the end of this step (again: stop at once, without saving)")
        self.asked.add(signum)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.steps += 1
            if trainer.world_size == 1 or self.steps % LOOK_EVERY == 0:
                self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.world_size == 1:
            self.on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        late = self.minutes is not None and time.monotonic() - self.saved > 60 * self.minutes
        flags = largest(trainer, [int(late), *(int(signum in self.asked) for signum in self.signals)])
        if any(flags):
            asked = {signum for signum, flag in zip(self.signals, flags[1:], strict=True) if flag}
            self.asked -= asked
            self._answer(trainer, asked)

    def _answer(self, trainer: pl.Trainer, asked: set[int]) -> None:
        names = {signal.Signals(signum).name: signum for signum in asked}
        path, self.saved = self.save(trainer), time.monotonic()
        for name in names:
            log.info("%s: saved %s at step %d", name, path, trainer.global_step)
        if names.keys() & set(self.REQUEUE) and self.requeue is not None and trainer.is_global_zero:
            self.requeue(next(names[name] for name in self.REQUEUE if name in names), None)
        for name in self.STOP:
            if name in names:
                log.info("the training goes on with --resume %s -t", path.parent.parent)
                raise StoppedBySignal(names[name])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        known = (StoppedBySignal, FloatingPointError, KeyboardInterrupt, SIGTERMException)
        if isinstance(exception, known) or not self.on_error or trainer.world_size > 1 or trainer.state.fn != "fit":
            return
        if self.first_step is None or trainer.global_step == self.first_step:
            return
        try:
            path = self.save(trainer)
        except Exception as failure:
            log.warning("stopped by %s, and could not save: %s", type(exception).__name__, failure)
        else:
            log.warning("stopped by %s at step %d: saved %s", type(exception).__name__, trainer.global_step, path)


class StopAtNaN(Callback):
    """Stop with the step's number when the loss is not finite; the last checkpoint before it stays as it is.

    The first such step is kept on the device and looked at after every step on one CPU, else after every tenth.
    """

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            logged = [value for name, value in trainer.callback_metrics.items() if name.startswith("train/")]
            loss = torch.stack([value.float() for value in logged]).sum() if logged else torch.zeros(())
        step = torch.where(torch.isfinite(loss.detach()), NEVER, trainer.global_step)
        self.first = step if self.first is None else torch.minimum(self.first, step)
        self.steps += 1
        direct = trainer.world_size == 1 and self.first.device.type == "cpu"
        if direct or self.steps % LOOK_EVERY == 0:
            self.look(trainer, batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: pl.Trainer, batch: Any = None) -> None:
        """Raise if a loss was not finite in any process.

        Args:
            trainer: of the training.
            batch: the last one, which may show the cause.

        Raises:
            FloatingPointError: naming the step.
        """
        own = NEVER if self.first is None else int(self.first)
        first = -largest(trainer, [-own])[0]
        if first != NEVER:
            raise FloatingPointError(
                f"the loss is not finite at step {first}: {describe_constant(batch)}lower the learning rate, clip "
                "gradients (--gradient_clip_val 1), or use bf16 instead of fp16; the checkpoints of earlier steps are "
                "kept"
            )


def describe_constant(batch: Any) -> str:
    """Return words on the entries of a batch whose images are all of one value; "" where there are none."""
    given = batch if isinstance(batch, Mapping) else {}
    images = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.ndim > 2}
    flat = [name for name, value in images.items() if bool((value == value.flatten()[0]).all())]
    return (
        f"all of {' and '.join(flat)} in the batch is of one value, such as black: look at the data, or "
        if flat
        else ""
    )
