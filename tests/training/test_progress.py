"""The bar of a training: steps of the whole training, and an average of the loss, over epochs and when it goes on."""

import io
import logging

import pytest
import pytorch_lightning as pl
import torch
import yaml
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ldm.training.callbacks import SetupCallback
from ldm.training.logs import LineHandler
from ldm.training.progress import OF_BEFORE, TrainingProgress

LOSSES = (8.0, 4.0, 2.0)


class Steady(pl.LightningModule):
    """A module whose loss is the batch, so that what is shown can be reckoned by hand."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return batch.mean() + 0 * self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def show_training(folder, capsys, checkpoint=None, more=(), **ends):
    """Train, and return the last state of the bar and the trainer."""
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    bar = TrainingProgress(refresh_rate=1)
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[bar, *more], **settings, **ends)
    trainer.fit(Steady(), DataLoader(torch.tensor(LOSSES), batch_size=1), ckpt_path=checkpoint)
    return capsys.readouterr().out.replace("\r", "\n").strip().splitlines()[-1], trainer


def test_the_bar_counts_all_steps_and_averages_the_loss(tmp_path, capsys):
    said, _ = show_training(tmp_path, capsys, max_steps=5)
    average = LOSSES[0]
    for loss in (*LOSSES[1:], *LOSSES[:2]):
        average = OF_BEFORE * average + (1 - OF_BEFORE) * loss
    assert "5/5" in said and f"loss={average:.4g}" in said and "epoch=1" in said


def test_epochs_are_counted_in_steps(tmp_path, capsys):
    said, _ = show_training(tmp_path, capsys, max_epochs=2)
    assert "6/6" in said


def test_a_training_that_goes_on_begins_where_it_was(tmp_path, capsys):
    _, trainer = show_training(tmp_path, capsys, max_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    said, _ = show_training(tmp_path, capsys, tmp_path / "last.ckpt", max_steps=4)
    assert "4/4" in said and "loss=8" in said, "one step more, of the first batch"


class Speaker(pl.Callback):
    """Logs a word after every step."""

    def on_train_batch_end(self, *_):
        logging.getLogger("ldm.tests.progress").warning("a word")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_message_beside_the_bar_has_a_line_of_its_own(tmp_path, capsys, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    handler, logger = LineHandler(stream), logging.getLogger("ldm.tests.progress")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    try:
        show_training(tmp_path, capsys, more=[Speaker()], max_steps=2)
        logger.warning("the end")
    finally:
        logger.removeHandler(handler)
    apart = "" if terminal else "\n"
    assert stream.getvalue() == f"{apart}a word\n" * 2 + "the end\n"


def test_tensorboard_has_the_config_of_a_run(tmp_path):
    class Run:
        def write_config(self, *_):
            """Write nothing: the run's own files are not asked for here."""

    config = OmegaConf.create({"model": {"params": {"size": 8, "again": "${model.params.size}"}}})
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="tensorboard", version="")
    settings = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = pl.Trainer(logger=logger, callbacks=[SetupCallback(Run(), config, config)], max_steps=1, **settings)
    trainer.fit(Steady(), DataLoader(torch.tensor(LOSSES), batch_size=1))
    assert yaml.safe_load((tmp_path / "tensorboard" / "hparams.yaml").read_text()) == OmegaConf.to_container(config)
