"""What the tests of training share: trainings, what their runs left, callbacks that disturb them."""

import csv
import os
import signal
from dataclasses import fields
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from ldm.checkpoint import load_checkpoint
from ldm.commands.train import Train
from ldm.settings import Training
from ldm.training.session import train
from ldm.trust import trusting


def make_training(config, tmp_path, *changes, **options):
    """A training from a config: words a.b=c, then fields of `Training` and options of Lightning's Trainer."""
    names = {field.name for field in fields(Training)}
    own = {name: value for name, value in options.items() if name in names}
    trainer = {name: value for name, value in options.items() if name not in names}
    given = {"base": (str(config),), "gpus": "0,", "logdir": str(tmp_path / "logs"), **own}
    return Training(**given, changes=changes, trainer=trainer)


def run_training(config, tmp_path, *changes, **options):
    """The run directory of one training from a config, see `make_training`."""
    return train(make_training(config, tmp_path, *changes, **options))


def resume(run, *changes, **trainer):
    """Continue the training of a run directory, or from one of its checkpoints."""
    with trusting(["tests"]):  # the run may name callbacks of the tests
        return train(Training(resume=str(run), gpus="0,", changes=changes, trainer=trainer))


def run_command_line(config, tmp_path, *changes, **options):
    """The same through the command, whose process a signal ends."""
    return Train(make_training(config, tmp_path, *changes, **options), train=True).run()


def take_steps(model, labels, count=3):
    """Train a member on one batch of noise with eight labels; return its optimiser and the parts of the last loss."""
    model.train()
    optimizer = model.configure_optimizers()
    source = torch.Generator().manual_seed(0)
    batch = {"image": torch.randn(8, 8, 8, 1, generator=source), "class_label": labels}
    for step in range(count):
        loss, parts = model.shared_step(batch, model.draws, step, range(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer, parts


def only_run(tmp_path):
    """The run directory, where one was made."""
    (run,) = (tmp_path / "logs").iterdir()
    return run


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, from every CSV log of a run."""
    found = {}
    for file in sorted(run.glob("csv*/metrics.csv")):
        with open(file) as rows:
            found |= {
                int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")
            }
    return found


def validations(run: Path) -> dict[int, float]:
    """Validation loss by step, from every CSV log of a run."""
    found = {}
    for file in sorted(run.glob("csv*/metrics.csv")):
        with open(file) as rows:
            found |= {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(rows) if row.get("val/loss")}
    return found


def kept_names(run: Path) -> set[str]:
    """Names of the checkpoints of a run, but the last."""
    return {path.name for path in run.glob("checkpoints/*.ckpt")} - {"last.ckpt"}


def end_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint."""
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same_end(run: Path, other: Path) -> None:
    """Bit-identical weights and averages."""
    first, second = end_state(run), end_state(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def disturbance(kind: str, **params) -> list[str]:
    """Words that add a callback of this module."""
    words = [f"lightning.callbacks.disturb.target=tests.training.runs.{kind}"]
    return words + [f"lightning.callbacks.disturb.params.{name}={value}" for name, value in params.items()]


class SendSignal(Callback):
    """Sends this process a signal in the middle of a step, or in a validation."""

    def __init__(self, name: str, step: int, validation: bool = False):
        self.signum, self.step, self.validation, self.sent = getattr(signal, name), step, validation, False

    def _send(self, trainer):
        if trainer.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.signum)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if not self.validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation:
            self._send(trainer)


class SpoilGradient(Callback):
    """Makes the gradient of one step NaN, so that the loss of the next is the first to show it."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            next(pl_module.parameters()).grad.fill_(float("nan"))


class AssertSameWeights(Callback):
    """Compares the weights of all processes at the end of a training."""

    def on_train_end(self, trainer, pl_module):
        for name, value in pl_module.named_parameters():
            all_values = trainer.strategy.all_gather(value.detach())
            assert torch.equal(all_values[0], all_values[-1]), name


class Fail(Callback):
    """Raises in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("the disk burns")
