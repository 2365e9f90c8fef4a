"""The noising that a LightningModule holds: a table of betas with its 12 buffers, or a continuous schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.buffers import schedule_buffers
from ldm.diffusion.process import BetaSchedule, ContinuousProcess, NoiseProcess, TableProcess
from ldm.diffusion.schedule import Schedule, VPSchedule
from ldm.diffusion.training_times import TrainingTimes, UniformTimes
from ldm.util import instantiate_from_config

# The tables from which all others follow, and how far those of files in half precision may lie from the config's.
COMPARED_TABLES = ("alphas_cumprod", "betas")
TABLE_TOLERANCES = {torch.float16: (5e-3, 1e-4), torch.bfloat16: (2e-2, 1e-3)}


def choose_config(
    schedule_config: Mapping[str, Any] | Schedule | None, path_config: Mapping[str, Any] | None
) -> Mapping[str, Any] | Schedule | None:
    """Return the config of a continuous schedule under its name or its former one, `path_config`.

    Raises:
        ValueError: if both are given.
    """
    if schedule_config is not None and path_config is not None:
        raise ValueError("schedule_config and path_config are two names of one key: leave path_config out")
    return path_config if schedule_config is None else schedule_config


def build_schedule(
    config: Mapping[str, Any] | Schedule | None, times_config: Mapping[str, Any] | None, betas: BetaSchedule
) -> tuple[Schedule, TrainingTimes | None]:
    """Build a continuous schedule and the law of its training times where a config names one, else a table of betas.

    Args:
        config: of a continuous schedule, or that schedule; None for a table.
        times_config: of the law (`ldm.diffusion.training_times`); uniform where it is None.
        betas: the table; with a continuous schedule its `given`, `unit_time` and `first_time` must not be set.

    Returns:
        (schedule, law of the times), the law being None for a table.

    Raises:
        ValueError: if what belongs to one of the two comes with the other, or the target is no continuous schedule.
    """
    if config is None:
        if times_config is not None:
            raise ValueError("times_config belongs to a continuous schedule: set schedule_config, or leave it out")
        return betas.build(), None
    refuse_table_options(given_betas=betas.given, unit_time=betas.unit_time, first_time=betas.first_time)
    schedule = config if isinstance(config, Schedule) else instantiate_from_config(config)
    if not isinstance(schedule, Schedule) or isinstance(schedule, VPSchedule):
        raise ValueError(
            f"schedule_config.target must be a continuous schedule, FlowSchedule for example; got {config}"
        )
    return schedule, UniformTimes() if times_config is None else instantiate_from_config(times_config)


def refuse_table_options(**options: Any) -> None:
    """Check the options of a continuous schedule: none that acts on a table of betas alone may be set.

    Raises:
        ValueError: for each option by name that is.
    """
    foreign = [name for name, value in options.items() if value]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} belong to a table of betas: leave them out (a continuous schedule has "
            "times_config), or leave out schedule_config"
        )


def register_tables(module: nn.Module, schedule: VPSchedule, v_posterior: float = 0.0) -> None:
    """Give a module the 12 buffers of a table of betas, under the names that checkpoints have them."""
    tables: Mapping[str, Tensor] = schedule_buffers(schedule, v_posterior)
    for name, table in tables.items():
        module.register_buffer(name, table)


def check_tables(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Compare the tables of a file with those of the config that a module was built from.

    Args:
        module: has the buffers of `register_tables`, or none of them.
        state: of the file.
        source: the file, for messages.

    Raises:
        ValueError: if they are not of one noise schedule.
    """
    own = dict(module.named_buffers(recurse=False))
    for name in COMPARED_TABLES:
        table, expected = state.get(name), own.get(name)
        if table is None or expected is None:
            continue
        remedy = "set timesteps, beta_schedule, linear_start and linear_end in model.params to those of its training"
        if table.shape != expected.shape:
            raise ValueError(
                f"{source} was trained with {table.numel()} noise levels, the config has {expected.numel()}: {remedy}"
            )
        rtol, atol = TABLE_TOLERANCES.get(table.dtype, (1e-3, 1e-7))
        wrong = ~torch.isclose(table.double(), expected.double().to(table.device), rtol=rtol, atol=atol)
        if wrong.any():
            worst = int((table.double() - expected.double().to(table.device)).abs().argmax())
            raise ValueError(
                f"{source} was trained with another noise schedule than the config's: {name}[{worst}] is "
                f"{float(table[worst]):.4g} in the file and {float(expected[worst]):.4g} by the config; {remedy}"
            )


def view_process(module: nn.Module, schedule: Schedule, times: TrainingTimes | None) -> NoiseProcess:
    """Return the noising of a module: a table's levels are its buffers, on the device and in the precision of now.

    Args:
        module: has the buffers of `register_tables`, unless there is a law of times.
        schedule: of the module.
        times: law of the training times of a continuous schedule; None for a table.
    """
    if times is not None:
        return ContinuousProcess(schedule, times)
    if not isinstance(schedule, VPSchedule):
        raise TypeError(f"a table of betas is a VPSchedule, got {type(schedule).__name__}")
    alphas = module.get_buffer("sqrt_alphas_cumprod")
    sigmas = module.get_buffer("sqrt_one_minus_alphas_cumprod")
    return TableProcess(schedule, alphas, sigmas)
