"""Runge-Kutta solvers of any schedule in fixed steps: Euler and Heun (EDM, with churn), midpoint, RK4.

Line 2 moves along straight lines of the schedule on which one linear field stays constant: eps in the variables
(x / alpha, sigma / alpha), or for a flow the velocity eps - x_0 in (x, u). A method with several evaluations combines
that field, solves x = alpha x_0 + sigma eps for both parts, and takes line 2 once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import NEAR_END, Denoiser, Target
from ldm.diffusion.ode.churn import make_churn
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise, Step, Steps, advance, ddim_transition, following, intervals


def field_at(denoiser: Denoiser, schedule: Schedule, x: Tensor, u: float) -> Tensor:
    """The field that is constant along straight lines of the schedule, predicted at (x, u); shape of the prediction.

    At clean data only a flow's network is asked; elsewhere the field is eps, whose conditional mean there is 0.
    """
    if schedule.field == "eps" and schedule.ratio(u) <= NEAR_END:
        return torch.zeros_like(x)
    prediction = denoiser(x, u)
    return Target(schedule.field).of(prediction.x0, prediction.eps, *schedule.coefficients(u, x))


def straight_step(schedule: Schedule, index: int, x: Tensor, field: Tensor, u: float, s: float) -> Step:
    """Line 2 without noise from (x, u) to s along a given field."""
    if field.ndim > x.ndim:
        x = x.expand(field.shape)
    x0, eps = Target(schedule.field).solve(field, x, *schedule.per_image(u))
    return advance(index, x, x0, eps, ddim_transition(schedule, u, s))


def coordinates(schedule: Schedule, u: Tensor | float) -> tuple[Tensor, Tensor]:
    """(scale, tau) in which lines are straight: y = x / scale moves along them by `field` for each unit of tau.

    (alpha, sigma / alpha), or for a flow (alpha + sigma, sigma / (alpha + sigma)); float64, shapes of u.
    """
    if schedule.field == "eps":
        return schedule.alpha(u), schedule.ratio(u)
    alpha, sigma = schedule.alpha(u), schedule.sigma(u)
    return alpha + sigma, sigma / (alpha + sigma)


def find_time(schedule: Schedule, tau: Tensor | float) -> float:
    """The time at a value of the variable `tau` of `coordinates`."""
    tau = torch.as_tensor(tau, dtype=torch.float64).clamp(min=0)
    if schedule.field == "velocity":
        tau = tau.clamp(max=1)
    return float(schedule.time_at(tau if schedule.field == "eps" else tau / (1 - tau)))


def _between(schedule: Schedule, u: float, s: float, fraction: float) -> float:
    """The time a fraction of the way from u to s, measured in the variable in which lines are straight."""
    if fraction == 1:
        return s
    return find_time(schedule, torch.lerp(coordinates(schedule, u)[1], coordinates(schedule, s)[1], fraction))


def two_stage(
    denoiser: Denoiser, schedule: Schedule, index: int, x: Tensor, u: float, s: float, fraction: float
) -> Step:
    """Second order: the field at u and at a fraction of the way, weighted 1 - 1/(2f) and 1/(2f).

    Only a flow's network knows clean data: on other schedules f = 1 (Heun) becomes Euler there.
    """
    first = field_at(denoiser, schedule, x, u)
    middle = _between(schedule, u, s, fraction)
    if schedule.field == "eps" and schedule.sigma(middle) == 0:
        return straight_step(schedule, index, x, first, u, s)
    second = field_at(denoiser, schedule, straight_step(schedule, index, x, first, u, middle).x_next, middle)
    weight = 1 / (2 * fraction)
    return straight_step(schedule, index, x, (1 - weight) * first + weight * second, u, s)


def euler(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """Euler's method along straight lines of the schedule: line 2 without noise, which is DDIM at eta = 0.

    S evaluations; churn is that of `heun`.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    churn = make_churn(len(times) - 1, S_churn, S_min, S_max, S_noise)
    for index, u, s in intervals(times, start):
        x, u = churn.add(schedule, index, x, u, noise)
        prediction = denoiser(x, u)
        step = advance(index, x, prediction.x0, prediction.eps, ddim_transition(schedule, u, s))
        x = following(step, (yield step))


def heun(
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
    """Heun's method (Karras et al. 2022, alg. 1 and 2): the mean of two fields; 2S - 1 evaluations to clean data.

    A flow's network knows clean data and is asked there, too: 2S evaluations.

    Churn noises the state before the step: with sigma-bar = sigma / alpha, from sigma-bar to (1 + gamma) sigma-bar,
    gamma = min(S_churn / S, sqrt(2) - 1) where S_min <= sigma-bar <= S_max.

    Args:
        x: state [..., B, C, H, W] at `times[start]`; EDM's reference keeps it in float64.
        S_noise: standard deviation of churn's draws.
        eta: in place of S_churn, gamma as a share of sqrt(2) - 1, 0 to 1 (DDAE).
    """
    churn = make_churn(len(times) - 1, S_churn, S_min, S_max, S_noise, eta)
    for index, u, s in intervals(times, start):
        x, u = churn.add(schedule, index, x, u, noise)
        step = two_stage(denoiser, schedule, index, x, u, s, 1.0)
        x = following(step, (yield step))


def midpoint(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, euler_end: bool = False, start: int = 0
) -> Steps:
    """Midpoint method: the field half-way, measured where lines are straight; 2S evaluations.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        euler_end: take a step to clean data with one evaluation (Karras et al. 2022, alg. 3 with alpha = 1/2).
    """
    for index, u, s in intervals(times, start):
        if euler_end and schedule.sigma(s) == 0:
            step = straight_step(schedule, index, x, field_at(denoiser, schedule, x, u), u, s)
        else:
            step = two_stage(denoiser, schedule, index, x, u, s, 0.5)
        x = following(step, (yield step))


def rk4(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """The classical fourth-order method; 4S evaluations.

    Only a flow's network knows clean data: on other schedules a step to sigma = 0 is the midpoint method's.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    for index, u, s in intervals(times, start):
        if schedule.field == "eps" and schedule.sigma(s) == 0:
            step = two_stage(denoiser, schedule, index, x, u, s, 0.5)
        else:
            middle = _between(schedule, u, s, 0.5)
            fields = [field_at(denoiser, schedule, x, u)]
            for time in (middle, middle, s):
                fields.append(
                    field_at(denoiser, schedule, straight_step(schedule, index, x, fields[-1], u, time).x_next, time)
                )
            combined = (fields[0] + 2 * fields[1] + 2 * fields[2] + fields[3]) / 6
            step = straight_step(schedule, index, x, combined, u, s)
        x = following(step, (yield step))
