"""Solvers that remember earlier predictions: PLMS and DPM-Solver++(2M). Both end in line 2 without noise."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.ode.runge_kutta import field_at, straight_step
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Steps, advance, ddim_transition, following, intervals

# Adams-Bashforth coefficients of the latest fields, newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """Pseudo linear multi-step (Liu et al. 2022, eq. 12): Adams-Bashforth on eps, then line 2.

    The first step is the published pseudo improved Euler: the mean of eps here and at the next time, hence S + 1
    evaluations (S where a single step goes to clean data). On a flow the field is the velocity.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    history: list[Tensor] = []
    for index, u, s in intervals(times, start):
        field = field_at(denoiser, schedule, x, u)
        latest = [field, *history][:4]
        if not history and schedule.sigma(s) > 0:
            ahead = straight_step(schedule, index, x, field, u, s).x_next
            combined = (field + field_at(denoiser, schedule, ahead, s)) / 2
        else:
            weights = ADAMS_BASHFORTH[len(latest) - 1]
            combined = cast(Tensor, sum(weight * past for weight, past in zip(weights, latest, strict=True)))
        history = latest
        step = straight_step(schedule, index, x, combined, u, s)
        x = following(step, (yield step))


def dpm_solver_2m(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, first_order_end: bool = False, start: int = 0
) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): x_0 linear in lambda = log(alpha / sigma), then line 2.

        D = (1 + h / (2 h')) x_0 - h / (2 h') x_0',   h = lambda_s - lambda_u,   primes of the step before

    The first step is first order, and so is a step to clean data, where h is infinite; S evaluations.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        first_order_end: make the last step first order on every times (steadier with fewer than about 15 steps).
    """
    previous, steps = None, intervals(times, start)
    for index, u, s in steps:
        prediction = denoiser(x, u)
        x0, eps = prediction.x0, prediction.eps
        width = torch.log(schedule.ratio(u) / schedule.ratio(s))
        if previous is not None and torch.isfinite(width) and not (first_order_end and index == steps[-1][0]):
            share = float(width / (2 * previous[1]))
            alpha, sigma = schedule.coefficients(u, x)
            x0 = (1 + share) * x0 - share * previous[0]
            eps = (x - alpha * x0) / sigma
        previous = prediction.x0, width
        step = advance(index, x, x0, eps, ddim_transition(schedule, u, s))
        x = following(step, (yield step))
