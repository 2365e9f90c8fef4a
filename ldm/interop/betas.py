"""Tables of betas as diffusers' schedulers name them, here and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.process import BetaSchedule
from ldm.diffusion.schedule import VPSchedule, make_betas

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}


def read_betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LatentDiffusion` that make a scheduler's table.

    Raises:
        ValueError: for a name of a table that is not here.
    """
    found = _read_table(config)
    if not config.get("rescale_betas_zero_snr"):
        return found
    names = {"given_betas": "given", "beta_schedule": "name"}
    schedule = BetaSchedule(**{names.get(name, name): value for name, value in found.items()})
    betas = end_in_noise(schedule.build().betas)
    return {"timesteps": len(betas), "given_betas": betas.tolist()}


def end_in_noise(betas: Tensor) -> Tensor:
    """Return betas whose last state is pure noise: sqrt(alpha-bar) shifted to end at 0 and scaled to begin as it did.

    Args:
        betas: [T] in float64 (Lin et al. 2024, algorithm 1).
    """
    alphas = torch.cumprod(1 - betas, 0).sqrt()
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    squares = torch.cat([alphas.new_ones(1), alphas]) ** 2
    return 1 - squares[1:] / squares[:-1]


def _read_table(config: Mapping[str, Any]) -> dict[str, Any]:
    steps = int(config.get("num_train_timesteps", 1000))
    given = config.get("trained_betas")
    if given is not None:
        return {"timesteps": len(given), "given_betas": [float(beta) for beta in given]}
    name = config["beta_schedule"]
    start, end = (float(config.get(f"beta_{place}", default)) for place, default in (("start", 1e-4), ("end", 0.02)))
    if name == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return {"timesteps": steps, "given_betas": (ramp * (end - start) + start).tolist()}
    if name not in BETAS:
        raise ValueError(f"beta_schedule must be one of {[*BETAS, 'sigmoid']}, got '{name}'")
    return {"timesteps": steps, "beta_schedule": BETAS[name], "linear_start": start, "linear_end": end}


def write_betas(schedule: VPSchedule) -> dict[str, Any]:
    """The formula of a table where one of theirs gives it, else the table."""
    betas, steps = schedule.betas, schedule.end
    ends = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    for theirs, ours in BETAS.items():
        made = make_betas(ours, steps, ends["beta_start"], ends["beta_end"])
        if torch.allclose(made, betas, rtol=1e-9, atol=0.0):
            return {"beta_schedule": theirs, **ends}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}
