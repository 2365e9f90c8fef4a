"""What happens beside the training step: run records, pictures, averages, dropout's seeds, memory and time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from ldm.images import save_image, tile_images
from ldm.training.runs import RunDirectory
from ldm.util import derive_seed


class SetupCallback(Callback):
    """Write the run's configs when training starts."""

    def __init__(self, run: RunDirectory, config: DictConfig, lightning_config: DictConfig):
        self.run, self.config, self.lightning_config = run, config, lightning_config

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run.write_config(self.config, "project")
        self.run.write_config(self.lightning_config, "lightning")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.log_hyperparams(OmegaConf.to_container(self.config, resolve=False))


class EMACallback(Callback):
    """Step a model's `model_ema` after every optimiser step. First stages, which have no `model`, do it themselves."""

    def __init__(self) -> None:
        self.stepped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stepped = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        averages = getattr(pl_module, "use_ema", False) and hasattr(pl_module, "model")
        if averages and trainer.global_step != self.stepped:
            pl_module.model_ema(pl_module.model)
            self.stepped = trainer.global_step


class SeededSteps(Callback):
    """Seed torch's own generator before every batch by (seed, member, batch): dropout repeats when a run resumes."""

    def __init__(self, seed: int, member: int = 0):
        self.seed, self.member = seed, member

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        torch.manual_seed(derive_seed("step", self.seed, self.member, done, trainer.global_rank))


class ImageLogger(Callback):
    """Write grids of `log_images` under `images/{split}` and to loggers of pictures, every `batch_frequency` steps.

    A `batch_frequency` of 0 turns it off. With `increase_log_steps`, also at the powers of two below it.
    """

    def __init__(
        self,
        batch_frequency: int = 1000,
        max_images: int = 8,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
    ):
        if batch_frequency < 0:
            raise ValueError(f"batch_frequency is a number of steps, or 0 for no pictures; got {batch_frequency}")
        self.batch_frequency, self.max_images = batch_frequency, max_images
        self.disabled = disabled or batch_frequency == 0
        self.clamp, self.rescale, self.log_first_step = clamp, rescale, log_first_step
        early = [2**n for n in range(batch_frequency.bit_length())] if increase_log_steps else []
        self.early = frozenset(step for step in early if step < batch_frequency)
        self.options = dict(log_images_kwargs or {})

    def _due(self, step: int) -> bool:
        if self.disabled or (step == 0 and not self.log_first_step):
            return False
        return step % self.batch_frequency == 0 or step in self.early

    @rank_zero_only
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._due(trainer.global_step) and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.write(trainer, pl_module, batch, "train")

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, Any], split: str) -> None:
        """Write one grid a kind of picture, in evaluation mode."""
        training = pl_module.training
        pl_module.eval()
        batch = {name: value[: self.max_images] for name, value in batch.items()}
        images = pl_module.log_images(batch, **self.options)  # type: ignore[operator]
        pl_module.train(training)
        for kind, tensor in images.items():
            tensor = tensor.detach().float().cpu()
            tensor = tensor.clamp(-1, 1) if self.clamp else tensor
            tensor = tensor if self.rescale else 2 * tensor - 1
            grid = tile_images(tensor)
            name = f"{kind}_gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}.png"
            save_image(grid, Path(trainer.default_root_dir) / "images" / split / name, overwrite=True)
            for logger in trainer.loggers:
                if isinstance(logger, pl.loggers.TensorBoardLogger):
                    logger.experiment.add_image(f"{split}/{kind}", grid, trainer.global_step, dataformats="HWC")
                elif isinstance(logger, pl.loggers.WandbLogger):
                    logger.log_image(f"{split}/{kind}", [grid])


class CUDACallback(Callback):
    """Report the time and the peak GPU memory of every epoch, or of the rest of one that a resumed run begins with."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        pl_module.log("time/epoch_s", time.perf_counter() - self.started, sync_dist=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            pl_module.log("memory/peak_mib", torch.cuda.max_memory_allocated(device) / 2**20, sync_dist=True)
