"""What a training prints: our own messages, and of Lightning's those that tell a user something."""

from __future__ import annotations

import logging
import math
import warnings

import pytorch_lightning as pl
from tqdm import tqdm

from ldm.training.processes import is_first
from ldm.training.runs import RunDirectory

log = logging.getLogger(__name__)

# What is dropped, by its wording.
MESSAGES = (
    "litlogger",
    "GPU available:",
    "TPU available:",
    "`weights_only` was not set",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "`Trainer.fit` stopped: `max_",
    "was configured so",
    "Initializing distributed:",
    "distributed_backend=",
    "LOCAL_RANK: ",
    "Using bfloat16 Automatic Mixed Precision",
    "Using 16bit Automatic Mixed Precision",
)
WARNINGS = (
    r".*LeafSpec",
    r"Found \d+ module\(s\) in eval mode",
    r"GPU available but not used",
    r".*does not have many workers",
    r"Total length of `list` across ranks is zero",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"The `srun` command is available",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
)
LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
    "pytorch_lightning.accelerators.cuda",
    "lightning_fabric.utilities.rank_zero",
    "lightning_fabric.utilities.distributed",
)


def start_logging(debug: bool = False) -> None:
    """Show what `ldm` logs in the first process, and what Lightning logs but for the messages listed here.

    Args:
        debug: show everything, of Lightning too.
    """
    logging.basicConfig(format="%(message)s", handlers=[LineHandler()])
    level = logging.INFO if is_first() else logging.ERROR
    logging.getLogger("ldm").setLevel(logging.DEBUG if debug else level)
    if not debug:
        drop_messages()


class LineHandler(logging.StreamHandler):
    """Write each message on a line of its own, also while a progress bar stands on the last one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message: above the bar on a terminal, below it in a file."""
        bars = [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable]
        if not bars:
            super().emit(record)
        elif self.stream.isatty():
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)
        else:
            bars[-1].fp.flush()
            self.stream.write("\n")
            super().emit(record)


def is_needed(record: logging.LogRecord) -> bool:
    """Return False for a message of the list."""
    text = record.getMessage()
    return not any(words in text for words in MESSAGES)


def drop_messages() -> None:
    """Drop the messages and warnings listed here, for the rest of the process."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if is_needed not in logger.filters:
            logger.addFilter(is_needed)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def announce(run: RunDirectory, model: pl.LightningModule, devices: str, base_rate: float | None, images: int) -> None:
    """Say what a user wants to know before it starts; a rate that was multiplied is said with its factor.

    Args:
        images: in an optimiser step, on all devices.
    """
    rate = f"{model.learning_rate:.3g}"
    factor = 1.0 if not base_rate else float(model.learning_rate) / base_rate  # type: ignore[arg-type]
    if not math.isclose(factor, 1.0):
        rate += (
            f", which is model.base_learning_rate {base_rate:g} times {factor:g} (--scale_lr False takes it as it is)"
        )
    parameters = [(value.numel(), value.requires_grad) for value in model.parameters()]
    trained = sum(size for size, trains in parameters if trains)
    log.info("run directory: %s", run.path)
    log.info(
        "device: %s  parameters: %s, %s of them trained  images a step: %d  learning rate: %s",
        devices, f"{sum(size for size, _ in parameters):,}", f"{trained:,}", images, rate,
    )  # fmt: skip
