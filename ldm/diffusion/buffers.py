"""The tables of a discrete schedule that checkpoints of latent-diffusion hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.schedule import VPSchedule


def schedule_buffers(schedule: VPSchedule, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The 12 float32 tables [T] that checkpoints hold, from the float64 schedule (Ho et al. 2020, eq. 4 and 7)."""
    betas, abar = schedule.betas, torch.cumprod(1 - schedule.betas, 0)
    previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    variance = (1 - v_posterior) * betas * (1 - previous) / (1 - abar) + v_posterior * betas
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - abar),
    }
    return {name: table.float() for name, table in tables.items()}
