"""From latent-diffusion's trainer options to a Lightning 2.x Trainer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)

TRAINER_KEYS = frozenset(inspect.signature(pl.Trainer.__init__).parameters) - {
    "self",
    "logger",
    "callbacks",
    "default_root_dir",
}
# Options of Lightning 1.x that released YAMLs use and that changed nothing in the result.
IGNORED_KEYS = frozenset({"progress_bar_refresh_rate", "weights_summary", "flush_logs_every_n_steps", "num_gpus"})


def parse_gpus(gpus: str | int | Sequence[int] | None) -> list[int] | int:
    """Device indices of `--gpus`: "0," and "0,1" list them, "2" counts them; None or 0 is the CPU.

    Raises:
        ValueError: if it is none of these.
    """
    if gpus is None or gpus in (0, "0"):
        return 0
    if isinstance(gpus, int):
        return gpus
    if not isinstance(gpus, str):
        return [int(device) for device in gpus]
    try:
        devices = [int(part) for part in gpus.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--gpus expects '0,' or '0,1' or a count, got '{gpus}'") from error
    return devices if "," in gpus else devices[0]


def device_options(gpus: str | int | Sequence[int] | None, cpus: int = 1) -> dict[str, Any]:
    """`accelerator`, `devices` and `strategy`; without CUDA the run goes to the CPU, with one message."""
    devices = parse_gpus(gpus)
    count = devices if isinstance(devices, int) else len(devices)
    if count and torch.cuda.is_available():
        strategy = "ddp_find_unused_parameters_false" if count > 1 else "auto"
        return {"accelerator": "gpu", "devices": devices, "strategy": strategy}
    if count:
        log.warning("--gpus %s: no CUDA device here, training on the CPU", gpus)
    return {"accelerator": "cpu", "devices": cpus, "strategy": "ddp" if cpus > 1 else "auto"}


def device_count(gpus: str | int | Sequence[int] | None, cpus: int = 1) -> int:
    """How many devices a run uses: a factor of the scaled learning rate."""
    devices = device_options(gpus, cpus)["devices"]
    return devices if isinstance(devices, int) else len(devices)


def split_trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what Lightning 2.x takes; drop what only changed the display of 1.x.

    Raises:
        ValueError: for an option that neither knows.
    """
    unknown = set(options) - TRAINER_KEYS - IGNORED_KEYS - {"gpus", "cpus", "distributed_backend"}
    if unknown:
        raise ValueError(
            f"unknown trainer options {sorted(unknown)}; Lightning {pl.__version__} takes {sorted(TRAINER_KEYS)}"
        )
    return {key: value for key, value in options.items() if key in TRAINER_KEYS}
