"""Singlestep solvers in lambda = log(alpha / sigma): DPM-Solver of order 2 and 3, DPM-Solver++(2S), ancestral ones.

With eps linear in lambda over a step of width h, a solution of higher order is a straight line of the schedule whose
eps mixes evaluations inside the step:

    order 2    eps at the middle of the step in lambda
    order 3    eps_u + g(h) (eps_2 - eps_u) / r_2,   g(z) = 1 / z - 1 / (e^z - 1),   r_1 = 1/3, r_2 = 2/3

A step to clean data, or from pure noise, has no width in lambda and is first order.

Source: Lu et al. 2022a (DPM-Solver, arXiv 2206.00927), alg. 1 and 2; Lu et al. 2022b (arXiv 2211.01095), alg. 1;
k-diffusion's names of the same methods with ancestral noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.ode.churn import make_churn
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import (
    Noise,
    Step,
    Steps,
    Transition,
    advance,
    ddim_transition,
    following,
    intervals,
)


def log_width(schedule: Schedule, u: float, s: float) -> float:
    """Return h = lambda_s - lambda_u, infinite for a step to clean data or from pure noise."""
    return float(torch.log(schedule.ratio(u) / schedule.ratio(s)))


def time_between(schedule: Schedule, u: float, s: float, fraction: float) -> float:
    """Return the time at a fraction of the way from u to s, measured in lambda."""
    levels = schedule.ratio(u).log(), schedule.ratio(s).log()
    return float(schedule.time_at(torch.lerp(*levels, fraction).exp()))


def _first_order(schedule: Schedule, index: int, x: Tensor, prediction: Prediction, u: float, s: float) -> Step:
    return advance(index, x, prediction.x0, prediction.eps, ddim_transition(schedule, u, s))


def go_along(schedule: Schedule, index: int, x: Tensor, eps: Tensor, u: float, s: float) -> Step:
    """Line 2 without noise from (x, u) to s with a given eps, whatever field the schedule's own lines keep."""
    alpha, sigma = schedule.coefficients(u, x)
    return advance(index, x, (x - sigma * eps) / alpha, eps, ddim_transition(schedule, u, s))


def second_order_eps(denoiser: Denoiser, schedule: Schedule, x: Tensor, first: Tensor, u: float, s: float) -> Tensor:
    """Return the eps of a step of order 2, that at the middle of the step in lambda, given that at its beginning."""
    middle = time_between(schedule, u, s, 0.5)
    return denoiser(go_along(schedule, 0, x, first, u, middle).x_next, middle).eps


def second_order_step(denoiser: Denoiser, schedule: Schedule, index: int, x: Tensor, u: float, s: float) -> Step:
    """Take a step of DPM-Solver-2, with eps at the middle of the step in lambda."""
    first = denoiser(x, u)
    if not math.isfinite(log_width(schedule, u, s)):
        return _first_order(schedule, index, x, first, u, s)
    return go_along(schedule, index, x, second_order_eps(denoiser, schedule, x, first.eps, u, s), u, s)


def bend(width: float) -> float:
    """g(z) = 1 / z - 1 / (e^z - 1): how much of a change of eps over a step its end feels, 1/2 for short steps."""
    return 1 / width - 1 / math.expm1(width)


def third_order_eps(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, first: Tensor, u: float, s: float
) -> tuple[Tensor, Tensor]:
    """Return the eps of a step of order 2 that looks at a third of the way, and that of order 3.

    The second looks at a third and at two thirds of the step in lambda; `first` is eps at its beginning.
    """
    width = log_width(schedule, u, s)
    third, later = (time_between(schedule, u, s, fraction) for fraction in (1 / 3, 2 / 3))
    change = denoiser(go_along(schedule, 0, x, first, u, third).x_next, third).eps - first
    lower = first + 1.5 * change
    bent = first + 2 * bend(2 / 3 * width) * change
    change = denoiser(go_along(schedule, 0, x, bent, u, later).x_next, later).eps - first
    return lower, first + 1.5 * bend(width) * change


def third_order_step(denoiser: Denoiser, schedule: Schedule, index: int, x: Tensor, u: float, s: float) -> Step:
    """Take a step of DPM-Solver-3, with eps at 0, 1/3 and 2/3 of the step in lambda."""
    first = denoiser(x, u)
    if not math.isfinite(log_width(schedule, u, s)):
        return _first_order(schedule, index, x, first, u, s)
    return go_along(schedule, index, x, third_order_eps(denoiser, schedule, x, first.eps, u, s)[1], u, s)


def first_order_step(denoiser: Denoiser, schedule: Schedule, index: int, x: Tensor, u: float, s: float) -> Step:
    """Take a step of DPM-Solver-1, which is DDIM."""
    return _first_order(schedule, index, x, denoiser(x, u), u, s)


ORDERS = {1: first_order_step, 2: second_order_step, 3: third_order_step}


def dpm_solver_2(
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
    """DPM-Solver-2, singlestep (Lu et al. 2022a, alg. 1): eps at the middle of a step in lambda; 2S evaluations.

    2S - 1 where the times end at clean data. The same as Karras et al.'s alg. 2 with the middle in log sigma, which
    k-diffusion calls dpm_2; churn is that of `heun`.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    churn = make_churn(len(times) - 1, S_churn, S_min, S_max, S_noise)
    for index, u, s in intervals(times, start):
        x, u = churn.add(schedule, index, x, u, noise)
        step = second_order_step(denoiser, schedule, index, x, u, s)
        x = following(step, (yield step))


def dpm_solver_3(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """DPM-Solver-3, singlestep (Lu et al. 2022a, alg. 2); 3S evaluations, 3S - 2 where the times end at clean data.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    yield from _in_orders([3] * (len(times) - 1), denoiser, schedule, x, times, start)


def dpm_fast(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, remainder: int = 0, start: int = 0
) -> Steps:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4): steps of order 3, and lower orders at the end.

    A budget of N evaluations is N // 3 + 1 steps with the remainder of N / 3: the last step is of that order, or
    where it is 0 the last two are of orders 2 and 1. Meant for times that are even in lambda (`logsnr`).

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        remainder: 0, 1 or 2; evaluations beyond 3 (S - 1).

    Raises:
        ValueError: for another remainder.
    """
    if remainder not in (0, 1, 2):
        raise ValueError(f"remainder is that of a number of evaluations divided by 3: 0, 1 or 2, got {remainder!r}")
    last = [remainder] if remainder else [2, 1]
    steps = len(times) - 1
    yield from _in_orders([*[3] * (steps - len(last)), *last][-steps:], denoiser, schedule, x, times, start)


def _in_orders(
    orders: Sequence[int], denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, start: int
) -> Steps:
    for index, u, s in intervals(times, start):
        step = ORDERS[orders[index]](denoiser, schedule, index, x, u, s)
        x = following(step, (yield step))


def _middle_prediction(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, u: float, transition: Transition
) -> tuple[Prediction, bool]:
    """Return the prediction half-way, in lambda, to where an ancestral step leads before its noise; and whether so.

    The step's deterministic part ends at sigma / alpha = sqrt(sigma_s^2 - v) / alpha_s. Where that has no width in
    lambda, the prediction is that at x itself.
    """
    first = denoiser(x, u)
    down = (transition.sigma**2 - transition.v).clamp(min=0).sqrt() / transition.alpha
    if not (down > 0 and math.isfinite(schedule.ratio(u))):
        return first, False
    middle = time_between(schedule, u, float(schedule.time_at(down)), 0.5)
    return denoiser(ddim_transition(schedule, u, middle).mean(first.x0, first.eps), middle), True


def dpm_2_ancestral(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DPM-Solver-2 to a lower noise level, and noise back up, as k-diffusion's dpm_2_ancestral; 2S - 1 evaluations.

    The noise has eta^2 times the posterior variance; at eta = 0 it is `dpm_solver_2`.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        S_noise: multiplies the noise.
    """
    for index, u, s in intervals(times, start):
        transition = ddim_transition(schedule, u, s, eta, S_noise)
        found, inside = _middle_prediction(denoiser, schedule, x, u, transition)
        x0 = found.x0
        if inside:
            alpha, sigma = schedule.coefficients(u, x)
            x0 = (x - sigma * found.eps) / alpha
        step = advance(index, x, x0, found.eps, transition, noise)
        x = following(step, (yield step))


def dpmpp_2s_ancestral(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DPM-Solver++(2S) to a lower noise level, and noise back up; 2S - 1 evaluations to clean data.

    x_0 is taken half-way in lambda. At eta = 0 it is DPM-Solver++(2S) (Lu et al. 2022b, alg. 1); with noise it is
    k-diffusion's dpmpp_2s_ancestral.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        eta: the noise has eta^2 times the posterior variance.
        S_noise: multiplies the noise.
    """
    for index, u, s in intervals(times, start):
        transition = ddim_transition(schedule, u, s, eta, S_noise)
        found, inside = _middle_prediction(denoiser, schedule, x, u, transition)
        eps = found.eps
        if inside:
            alpha, sigma = schedule.coefficients(u, x)
            eps = (x - alpha * found.x0) / sigma
        step = advance(index, x, found.x0, eps, transition, noise)
        x = following(step, (yield step))
