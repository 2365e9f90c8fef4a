"""What training needs beside a loss: the optimiser, the data in numbers, averages over devices, a base checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.models.diffusion.row_adam import RowAdam, RowRule
from ldm.util import instantiate_from_config


@dataclass(frozen=True)
class TrainingSet:
    """What rules of optimisation ask of the training data.

    Args:
        images: number of images N.
        batch: images of one optimiser step, over all devices and accumulated parts.
        labels: class of each image [N]; None where the data have none.
    """

    images: int
    batch: int
    labels: Tensor | Sequence[int] | None = None

    @classmethod
    def from_trainer(cls, trainer: pl.Trainer | None) -> TrainingSet:
        """Read the data module of a trainer: `datasets["train"]`, that data set's `labels`, `batch_size`.

        Raises:
            ValueError: if there is no such data module.
        """
        module = getattr(trainer, "datamodule", None)
        data = getattr(module, "datasets", {}).get("train")
        if trainer is None or module is None or data is None:
            raise ValueError(
                "heads.init: anchored and heads.row_rates: equal need the training data: fit with a data module that "
                "has datasets['train'] (DataModuleFromConfig), or set model.member.training_set"
            )
        batch = module.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return cls(len(data), batch, getattr(data, "labels", None))

    def counts(self, classes: int) -> Tensor:
        """Count the images of each class [classes].

        Raises:
            ValueError: if the data have no labels.
        """
        if self.labels is None:
            raise ValueError(
                "heads.row_rates: equal needs the training images' labels: a data set with `labels` [N] (wrap: true "
                "hides them), or model.member.training_set"
            )
        return torch.bincount(torch.as_tensor(self.labels, dtype=torch.int64, device="cpu"), minlength=classes)


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the trainer that a module belongs to, None before there is one."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def shares_state(trainer: pl.Trainer | None) -> bool:
    """Whether a trainer's processes keep a part of the optimiser's state each."""
    return trainer is not None and getattr(trainer.strategy, "shares_state", False)


def find_training_data(trainer: pl.Trainer | None) -> Any:
    """Return the training images of a trainer's data module.

    Raises:
        ValueError: if there is no such data module.
    """
    data = getattr(getattr(trainer, "datamodule", None), "datasets", {}).get("train")
    if data is None:
        raise ValueError("fit with a data module that has datasets['train'] (DataModuleFromConfig)")
    return data


def make_factor(schedule: Mapping[str, Any]) -> Callable[[int], float]:
    """Return the factor on the learning rate by the step, of the config of a warm-up rule.

    Raises:
        ValueError: if what it names has no `schedule(step)`.
    """
    rule = instantiate_from_config(schedule)
    if not callable(getattr(rule, "schedule", None)):
        raise ValueError(
            f"model.params.scheduler_config: {schedule.get('target')} gave a {type(rule).__name__} without "
            "schedule(step), see ldm.lr_scheduler"
        )
    return rule.schedule


def make_optimiser(
    parameters: Iterable[nn.Parameter],
    rate: float | None,
    decay: float,
    schedule: Mapping[str, Any] | None,
    rules: Mapping[nn.Parameter, RowRule] | None = None,
    shared: bool = False,
) -> Any:
    """Make an AdamW over the parameters that require gradients, in the form that Lightning takes.

    Args:
        parameters: of the model.
        rate: learning rate.
        decay: weight decay.
        schedule: config of an object whose `schedule(step)` multiplies the rate; None leaves the rate as it is.
        rules: of tables that are trained by row (`RowAdam`).
        shared: keep in each process the moments of a part of the parameters, and step these (ZeRO, stage 1).

    Raises:
        ValueError: if there is no rate, or moments are to be shared out of tables that are trained by row.
    """
    if rate is None:
        raise ValueError("no learning rate: set model.base_learning_rate in the config, or model.learning_rate")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    adamw: torch.optim.Optimizer
    if rules and shared:
        raise ValueError(
            "--strategy ddp_zero1 shares out the state of AdamW, and these heads train by row (heads.init: anchored, "
            "heads.row_rates: equal): use --strategy ddp"
        )
    if shared:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        adamw = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=rate, weight_decay=decay)
    elif rules:
        adamw = RowAdam(trained, rules, rate, decay)
    else:
        adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    if schedule is None:
        return adamw
    factor = make_factor(schedule)
    return [adamw], [{"scheduler": LambdaLR(adamw, factor), "interval": "step", "frequency": 1}]


def positions(trainer: pl.Trainer, size: int, part: int = 0) -> range:
    """Return the positions in the global batch of a process's `size` images, in accumulated part `part` of a step."""
    first = (part * trainer.world_size + trainer.global_rank) * size
    return range(first, first + size)


def evaluation_positions(trainer: pl.Trainer, size: int) -> range:
    """Return the positions in the global batch of a process's `size` images of an evaluation: every world_size-th."""
    return range(trainer.global_rank, trainer.global_rank + trainer.world_size * size, trainer.world_size)


def log_step(module: pl.LightningModule, parts: Mapping[str, Tensor]) -> None:
    """Log the numbers of a training step, averaged over devices, `train/loss` in the progress bar."""
    parts = mean_over_devices(module.trainer, parts)
    # Loggers take "step" as their axis; Lightning's own count of batches shifts when a run resumes.
    module.log_dict({**parts, "step": float(module.global_step)}, logger=True, on_step=True, on_epoch=False)
    module.log("loss", parts["train/loss"], prog_bar=True, logger=False, on_step=True, on_epoch=False)


def mean_over_devices(trainer: pl.Trainer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average the numbers that a loss consists of over the processes of a data-parallel training, in one reduction."""
    if trainer.world_size == 1:
        return dict(parts)
    means = trainer.strategy.reduce(torch.stack(list(parts.values())), reduce_op="mean")
    return dict(zip(parts, means.unbind(), strict=True))


def gather_from_devices(*values: Tensor) -> list[Tensor]:
    """Join each vector [B] over the processes of a data-parallel training: [devices B]."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(values)
    joined = []
    for value in values:
        parts = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, value.contiguous())
        joined.append(torch.cat(parts))
    return joined


def check_base(path: str | None) -> str:
    """Return the path of the base checkpoint to start a member from.

    Raises:
        ValueError: saying where one comes from, if no path is given.
        FileNotFoundError: the same, if nothing is there.
    """
    if not path:
        raise ValueError("--start_from_pretrained needs model.params.pretrained_path: the base checkpoint")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no base checkpoint at {path} (model.params.pretrained_path): train it with main.py and write it with "
            "`decu export`, or download it with prep_data.sh"
        )
    return path


def measure_deviation(z: Tensor, trainer: pl.Trainer) -> Tensor:
    """Return the standard deviation [] of the values of z over all processes of a training.

    Raises:
        ValueError: if all values are the same.
    """
    moments = trainer.strategy.reduce(torch.stack([z.mean(), z.square().mean()]), reduce_op="mean")
    variance = moments[1] - moments[0] ** 2
    if not variance > 1e-6 * moments[1]:  # what rounding leaves of a constant
        raise ValueError(
            f"scale_by_std cannot measure a scale: every value of the first {len(z)} images is {float(moments[0]):g} "
            "(all black, or of one colour); look at the training images, or set model.params.scale_factor and "
            "scale_by_std: false"
        )
    return variance.sqrt()


def read_states(model: Any, batch: Mapping[str, Any], draws: Any, step: int, samples: Sequence[int]) -> Tensor:
    """Return the clean states [M B, C, H, W] of M members' images; nothing is drawn, see `draw_latents` for more."""
    return model.get_input(batch, model.first_stage_key)
