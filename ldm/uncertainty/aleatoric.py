"""What the data leave open: the covariance of clean data given a state, from the denoiser's derivative.

For x = alpha x_0 + sigma eps with Gaussian eps the posterior mean D(x) = E[x_0 | x] has the posterior covariance as its
derivative:

    Cov(x_0 | x) = (sigma^2 / alpha) dD/dx      on a straight schedule, t = 1 - u:  ((1 - t)^2 / t) (I + (1 - t) dv/dx)

It belongs to the data, not to the weights: it is aleatoric, the companion of the variances in `propagation`. It needs
no training, no members and no posterior, and holds for any schedule and any target. A learned field is only nearly a
posterior mean, so elements may come out below 0: they are clamped.

Sources: Efron 2011 (Tweedie's formula, second order); Manor and Michaeli 2024, eq. 5; Xing et al. 2026 (flows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.derivative import along, diagonal, rademacher, units
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class DataPosterior:
    """`mean` [B, C, H, W] is E[x_0 | x], `var` [B, C, H, W] the variance of its elements (at least 0), in the units of
    x_0 (squared); `negative` the share of elements that were clamped."""

    mean: Tensor
    var: Tensor
    negative: float

    @property
    def total(self) -> Tensor:
        """Trace of the covariance [B]: the expected squared error of the mean, E |x_0 - mean|^2."""
        return self.var.flatten(1).sum(1)


def _factor(schedule: Schedule, u: Tensor | float, like: Tensor) -> Tensor:
    alpha, sigma = schedule.per_image(u)
    if bool((alpha == 0).any()):
        raise ValueError("at pure noise (alpha = 0) the covariance given x is that of all data: choose an earlier time")
    return (sigma**2 / alpha).to(like)


@torch.no_grad()
def data_posterior(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    u: Tensor | float,
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> DataPosterior:
    """Mean and variances of clean data given states x [B, C, H, W] at time u (one, or [B]).

    Args:
        denoiser: unguided; a guided one gives the derivative of the guided prediction, which is no covariance.
        probes: None for the exact diagonal (C H W derivatives), else the number of Hutchinson's probes.
        generator: of the probes' signs.
        chunk: derivatives carried at once.

    Raises:
        ValueError: at pure noise, or for probes without a generator.
    """
    if (probes is None) != (generator is None):
        raise ValueError("probes and generator go together: Hutchinson's estimate draws signs, the exact one none")
    factor = _factor(schedule, u, x)
    signs = None if probes is None or generator is None else rademacher(probes, x, generator)
    var = factor * diagonal(lambda state: denoiser(state, u).x0, x, signs, chunk)
    return DataPosterior(denoiser(x, u).x0, var.clamp(min=0), float((var < 0).double().mean()))


@torch.no_grad()
def data_covariance(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, u: Tensor | float, *, chunk: int | None = None
) -> Tensor:
    """The whole covariance [B, D, D] of clean data given x, D = C H W, made symmetric: for small images."""
    columns = along(lambda state: denoiser(state, u).x0, x, units(x), chunk)  # [D, B, C, H, W]
    matrix = _factor(schedule, u, x).reshape(-1, 1, 1) * columns.flatten(2).permute(1, 2, 0)
    return (matrix + matrix.transpose(1, 2)) / 2
