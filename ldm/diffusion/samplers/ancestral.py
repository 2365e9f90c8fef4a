"""Ancestral sampling (DDPM) with fixed or learned variance and guidance by a shift of the mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import (
    Noise,
    Steps,
    Transition,
    advance,
    following,
    forward_variance,
    intervals,
    posterior_variance,
)

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
MeanShift = Callable[[Tensor, float, Tensor], Tensor]


def ancestral(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    variance: str = "fixed_small",
    temperature: float = 1.0,
    mean_shift: MeanShift | None = None,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DDPM (Ho et al. 2020, alg. 2): the mean of q(x_s | x_u, x_0_hat) plus noise; none in a step to clean data.

    Line 2 with v the posterior variance, and for w one of

        fixed_small    the posterior variance
        fixed_large    the forward variance (beta of the step), to clean data the posterior variance
        learned_range  exp(f log(forward) + (1 - f) log(posterior)), f the network's (Nichol and Dhariwal 2021, eq. 15)

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        temperature: multiplies the noise, not the mean.
        mean_shift: (x, u, w) -> what to add to the mean; a classifier adds variance times scale times
            grad log p(y | x_u) (Dhariwal and Nichol 2021, alg. 1).

    Raises:
        ValueError: for an unknown variance, or `learned_range` with a network that does not learn it.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {VARIANCES}, got '{variance}'")
    for index, u, s in intervals(times, start):
        prediction = denoiser(x, u)
        small, large = _bounds(schedule, times, index)
        clean = bool(schedule.sigma(s) == 0)
        # As published: what a shift of the mean sees of the step to clean data, where no noise is drawn.
        w = _variance("fixed_small" if clean and variance == "fixed_large" else variance, small, large, prediction)
        shift = None if mean_shift is None else mean_shift(x, u, w)
        v = torch.zeros_like(small) if clean else small
        drawn = torch.zeros_like(small) if clean else temperature**2 * w
        transition = Transition(u, s, schedule.alpha(s), schedule.sigma(s), v, drawn)
        step = advance(index, x, prediction.x0, prediction.eps, transition, noise, shift)
        x = following(step, (yield step))


def _bounds(schedule: Schedule, times: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Posterior and forward variance of a step; the vanishing posterior variance of the step to clean data is replaced
    by that of the step before it (guided-diffusion's clipping), which only a shift of the mean can notice."""
    u, s = float(times[index]), float(times[index + 1])
    small, large = posterior_variance(schedule, u, s), forward_variance(schedule, u, s)
    if small == 0:
        small = posterior_variance(schedule, float(times[index - 1]), u) if index else large
    return small, large


def _variance(name: str, small: Tensor, large: Tensor, prediction: Prediction) -> Tensor:
    if name != "learned_range":
        return small if name == "fixed_small" else large
    fraction = prediction.var_fraction
    if fraction is None:
        raise ValueError("variance 'learned_range' needs a network that learns its variance (learned_range=True)")
    return torch.exp(fraction * float(large.log()) + (1 - fraction) * float(small.log()))
