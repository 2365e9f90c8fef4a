"""Messages of Lightning that tell a user of `main.py` nothing: dropped by their wording, everything else is shown."""

from __future__ import annotations

import logging
import warnings

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


def needed(record: logging.LogRecord) -> bool:
    """False for a message of the list."""
    text = record.getMessage()
    return not any(words in text for words in MESSAGES)


def quieten() -> None:
    """Drop the messages and warnings listed here, for the rest of the process."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if needed not in logger.filters:
            logger.addFilter(needed)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
