"""Euler and Heun in a schedule's own time u, where the samplers before EDM stepped.

    dx/du = alpha'(u) x_0 + sigma'(u) eps

Other solvers here step in the variables in which lines are straight; on EDM's schedule the two are one. Where a rate is
infinite (an end of some flows), a step is a straight line.

Source: Karras et al. 2022 (arXiv 2206.00364), eq. 4 and alg. 3, whose ablations they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.ode.churn import make_churn
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise, Step, Steps, advance, ddim_transition, following, intervals


def velocity_of(schedule: Schedule, prediction: Prediction, u: float) -> Tensor:
    """dx/du at time u, shape of the prediction."""
    alpha_rate, sigma_rate = (rate.to(prediction.x0) for rate in schedule.rates(u))
    return alpha_rate * prediction.x0 + sigma_rate * prediction.eps


def has_velocity(schedule: Schedule, u: float) -> bool:
    """Whether a network can be asked for dx/du at time u: its rates are finite, and it knows the state."""
    if schedule.field == "eps" and schedule.sigma(u) == 0:
        return False
    return all(math.isfinite(rate) for rate in schedule.rates(u))


def line_to(schedule: Schedule, index: int, x: Tensor, after: Tensor, u: float, s: float) -> Step:
    """The step from (x, u) to (after, s); its x_0 and eps are those of the straight line that joins the two."""
    (alpha, sigma), (alpha_s, sigma_s) = schedule.per_image(u), schedule.per_image(s)
    determinant = alpha * sigma_s - sigma * alpha_s
    x0 = (sigma_s / determinant).to(x) * x - (sigma / determinant).to(x) * after
    eps = (alpha / determinant).to(x) * after - (alpha_s / determinant).to(x) * x
    return advance(index, x, x0, eps, ddim_transition(schedule, u, s))


def euler_in_time(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """Euler's method in the schedule's own time; S evaluations. x: state [..., B, C, H, W] at `times[start]`."""
    for index, u, s in intervals(times, start):
        step = _own_step(denoiser, schedule, index, x, u, s, second=False)
        x = following(step, (yield step))


def heun_in_time(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    eta: float = 0.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """Heun's method in the schedule's own time; 2S evaluations. Arguments of `heun`.

    Only a flow's network knows clean data: on other schedules the step there is Euler's, 2S - 1 evaluations.
    """
    churn = make_churn(len(times) - 1, S_churn, S_min, S_max, S_noise, eta)
    for index, u, s in intervals(times, start):
        x, u = churn.add(schedule, index, x, u, noise)
        step = _own_step(denoiser, schedule, index, x, u, s, second=True)
        x = following(step, (yield step))


def _own_step(denoiser: Denoiser, schedule: Schedule, index: int, x: Tensor, u: float, s: float, second: bool) -> Step:
    """Euler's step, or with `second` Heun's where there is a velocity at its end."""
    prediction = denoiser(x, u)
    if not has_velocity(schedule, u):
        return advance(index, x, prediction.x0, prediction.eps, ddim_transition(schedule, u, s))
    first = velocity_of(schedule, prediction, u)
    after = x + (s - u) * first
    if second and has_velocity(schedule, s):
        after = x + (s - u) * torch.lerp(first, velocity_of(schedule, denoiser(after, s), s), 0.5)
    return line_to(schedule, index, x, after, u, s)
