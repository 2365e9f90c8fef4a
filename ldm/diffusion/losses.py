"""What is minimised in training: unreduced errors of the regression target, and their weights per time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.schedule import VPSchedule

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def elementwise_error(output: Tensor, target: Tensor, loss_type: str = "l2") -> Tensor:
    """|output - target| (l1) or its square (l2), unreduced.

    Raises:
        ValueError: for another name.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got '{loss_type}'")
    return LOSSES[loss_type](output, target, reduction="none")


def elbo_weights(schedule: VPSchedule, parameterization: str, posterior_variance: Tensor) -> Tensor:
    """Weight of the error at each table entry in the variational bound, float64 [T] (Ho et al. 2020, eq. 12).

    Entry 0, where the posterior variance vanishes, takes the value of entry 1. For x_0 latent-diffusion's published
    weight is sqrt(alpha-bar) / (2 (2 - alpha-bar)) (a bracket is missing before 1 - alpha-bar); kept for parity.

    Raises:
        ValueError: for a parameterization without a published weight.
    """
    abar = schedule.log_abar[1:].exp()
    if parameterization == "eps":
        weights = schedule.betas**2 / (2 * posterior_variance * (1 - schedule.betas) * (1 - abar))
    elif parameterization == "x0":
        weights = 0.5 * abar.sqrt() / (2 - abar)
    elif parameterization == "v":
        weights = torch.ones_like(abar)
    else:
        raise ValueError(f"no published bound weights for parameterization '{parameterization}'")
    return torch.cat([weights[1:2], weights[1:]]) if len(weights) > 1 else weights
