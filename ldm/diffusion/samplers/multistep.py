"""Solvers that remember earlier predictions: PLMS, LMS, DPM-Solver++(2M). All end in line 2 without noise."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.ode.runge_kutta import coordinates, field_at, straight_step
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Steps, advance, ddim_transition, following, intervals

# Adams-Bashforth coefficients of the latest fields, newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """Pseudo linear multi-step (Liu et al. 2022, eq. 12): Adams-Bashforth on eps, then line 2.

    The first step is the published pseudo improved Euler: the mean of eps here and at the next time, hence S + 1
    evaluations (S where a single step goes to clean data). On a flow the field is the velocity, also at clean data.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
    """
    history: list[Tensor] = []
    for index, u, s in intervals(times, start):
        field = field_at(denoiser, schedule, x, u)
        latest = [field, *history][:4]
        if not history and (schedule.field == "velocity" or schedule.sigma(s) > 0):
            ahead = straight_step(schedule, index, x, field, u, s).x_next
            combined = (field + field_at(denoiser, schedule, ahead, s)) / 2
        else:
            weights = ADAMS_BASHFORTH[len(latest) - 1]
            combined = cast(Tensor, sum(weight * past for weight, past in zip(weights, latest, strict=True)))
        history = latest
        step = straight_step(schedule, index, x, combined, u, s)
        x = following(step, (yield step))


def lms(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, order: int = 4, start: int = 0) -> Steps:
    """Linear multi-step (k-diffusion's lms): Adams-Bashforth for the steps as wide as they are; S evaluations.

    The field is the polynomial through its last `order` values in the variable in which lines are straight (sigma /
    alpha, or a flow's u), and its mean over a step leads to the end. The order grows from 1 over the first steps.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        order: 1 to 6; beyond 4 it is rarely stable.

    Raises:
        ValueError: for another order.
    """
    if order not in range(1, 7):
        raise ValueError(f"order must be a whole number from 1 to 6, got {order!r}")
    history: list[tuple[Tensor, float]] = []
    for index, u, s in intervals(times, start):
        bounded = [past for past in history if math.isfinite(past[1])]  # pure noise lies at infinity
        history = [(field_at(denoiser, schedule, x, u), float(coordinates(schedule, u)[1])), *bounded][:order]
        weights = _mean_weights([tau for _, tau in history], float(coordinates(schedule, s)[1]))
        combined = sum(weight * field for weight, (field, _) in zip(weights, history, strict=True))
        step = straight_step(schedule, index, x, cast(Tensor, combined), u, s)
        x = following(step, (yield step))


def _mean_weights(nodes: list[float], end: float) -> list[float]:
    """Weights [n] of values at n nodes in the mean, from nodes[0] to end, of the polynomial through them.

    They give the means of 1, z, .. z^(n-1) exactly, with z from 0 to 1 over the step: 1 / (k + 1).
    """
    z = (torch.tensor(nodes, dtype=torch.float64) - nodes[0]) / (end - nodes[0])
    powers = torch.arange(len(nodes), dtype=torch.float64)
    return torch.linalg.solve(z[None] ** powers[:, None], 1 / (powers + 1)).tolist()


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
