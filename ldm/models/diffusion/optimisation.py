"""What a DDPM's training needs beside its loss: the optimiser, numbers averaged over devices, a trunk that exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.util import instantiate_from_config


def optimiser(parameters: Iterable[nn.Parameter], rate: float, decay: float, schedule: Mapping[str, Any] | None) -> Any:
    """AdamW over the parameters that require gradients, its rate times `schedule.schedule(step)` where there is one."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    if schedule is None:
        return adamw
    factor = instantiate_from_config(schedule).schedule
    return [adamw], [{"scheduler": LambdaLR(adamw, factor), "interval": "step", "frequency": 1}]


def mean_over_devices(trainer: pl.Trainer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that a loss consists of, averaged over the processes of a data-parallel training in one reduction."""
    if trainer.world_size == 1:
        return dict(parts)
    means = trainer.strategy.reduce(torch.stack(list(parts.values())), reduce_op="mean")
    return dict(zip(parts, means.unbind(), strict=True))


def require_trunk(path: str | None) -> None:
    """Check that there is a trunk to start a component from.

    Raises:
        ValueError: saying where one comes from, if no path is given.
        FileNotFoundError: the same, if nothing is there.
    """
    if not path:
        raise ValueError("--start_from_pretrained needs model.params.pretrained_path: the trunk's checkpoint")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no trunk at {path} (model.params.pretrained_path): train it with main.py and write it with "
            "scripts/export_trunk.py, or download it with prep_data.sh"
        )
