"""The integral of predictive variance along the plain trajectory, from the sampler's own evaluations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Target
from ldm.diffusion.ode.runge_kutta import coordinates
from ldm.diffusion.samplers import Step
from ldm.uncertainty.propagation.fresh import PredictiveDenoiser
from ldm.uncertainty.propagation.persistent import VarianceStep


@torch.no_grad()
def trajectory_steps(steps: Iterator[Step], denoiser: PredictiveDenoiser) -> Iterator[VarianceStep]:
    """Integral of the field's variance along the trajectory so far, of `steps` that were made with `denoiser`.

        sum_k gamma^2(x_k, u_k) (tau_k - tau_{k+1})

    The field is the schedule's, eps or velocity; tau is the variable in which its lines are straight (`coordinates`):
    sigma / alpha, or sigma / (alpha + sigma) on a flow. So the integral does not depend on how a schedule counts time.
    """
    total = None
    ahead = len(denoiser.visited)
    for step in steps:
        u, gamma = denoiser.visited[ahead]
        ahead = len(denoiser.visited)
        term = path_weight(denoiser, u, step.transition.s, gamma) * gamma
        total = term if total is None else total + term
        yield VarianceStep(step, total)


def path_weight(denoiser: PredictiveDenoiser, u: Tensor | float, s: Tensor | float, like: Tensor) -> Tensor:
    """Return what gamma^2 of the network's output at time u counts in the integral, on the step from u to s.

    It is (tau_u - tau_s) (d field / d output)^2, of the type of `like`.
    """
    schedule = denoiser.schedule
    alpha, sigma = schedule.coefficients(u, like)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    unit = Target(schedule.field).of(*denoiser.target.solve(one, zero, alpha, sigma), alpha, sigma)
    width = coordinates(schedule, u)[1] - coordinates(schedule, s)[1]
    return width.to(like) * unit**2


def trajectory_integral(steps: Iterator[Step], denoiser: PredictiveDenoiser) -> Tensor:
    """The last of `trajectory_steps`: the integral over the whole trajectory [B, C, H, W], without further evaluations.

    Raises:
        ValueError: if the sampler has already been run.
    """
    last = deque(trajectory_steps(steps, denoiser), maxlen=1)
    if not last:
        raise ValueError("no step to integrate over: the sampler has already been run")
    return last[0].var
