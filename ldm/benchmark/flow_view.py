"""BayesFlow on a network of another schedule: the same network as a flow's.

With x = alpha x_0 + sigma eps, a flow's state is x / (alpha + sigma), at the time sigma / (alpha + sigma), and its
velocity

    eps - x_0 = (sigma - alpha) x + (alpha + sigma) v        for v = alpha eps - sigma x_0,  alpha^2 + sigma^2 = 1

so that the velocity's variance over weights is (alpha + sigma)^2 times that of v. Along Euler's method the corrected
recursion of the flow is BayesDiff's total variance of the network itself, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.benchmark.method import MethodKind, Scored
from ldm.benchmark.problem import Problem
from ldm.diffusion.denoiser import Target
from ldm.diffusion.schedule import FlowSchedule, Schedule
from ldm.uncertainty.propagation import PredictiveDenoiser
from ldm.uncertainty.propagation.bayesflow import bayesflow
from ldm.util import generator


@dataclass(frozen=True)
class FlowDenoiser(PredictiveDenoiser):
    """A denoiser of a network that regresses v on `own`, on a flow's states and times, with its variance.

    Attributes:
        own: the network's schedule.
    """

    own: Schedule | None = None

    @torch.no_grad()
    def law(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the velocity at a flow's state x [N B, C, H, W]."""
        assert self.own is not None
        time = float(self.own.time_at(self.schedule.ratio(torch.as_tensor(u, dtype=torch.float64))))
        alpha, sigma = (float(part) for part in self.own.per_image(time))
        state = (alpha + sigma) * x
        plain = PredictiveDenoiser(self.laplace, self.own, Target("v"), self.cond, chunk=self.chunk)
        mean, variance = plain.law(state, time)
        return (sigma - alpha) * state + (alpha + sigma) * mean, (alpha + sigma) ** 2 * variance


def make_flow_denoiser(problem: Problem, curvature: str) -> tuple[FlowDenoiser, Tensor, Tensor]:
    """Return the problem's network as a flow's, the states that its pictures begin at, and the flow's times."""
    flow, own = FlowSchedule(), problem.schedule
    levels = torch.stack([torch.stack([part.reshape(()) for part in own.per_image(float(u))]) for u in problem.times])
    times = levels[:, 1] / levels.sum(1)
    denoiser = FlowDenoiser(problem.trained.laplace(curvature), flow, Target("velocity"), problem.labels, own=own)
    return denoiser, problem.x / float(levels[0].sum()), times


@dataclass(frozen=True)
class BayesFlow:
    """BayesFlow's recursion as published, its times mended: it leaves out Var v(X), and its variances may be negative.

    The corrected form is `BayesDiff` of the form total, see the module's first lines.
    """

    name: str = "BayesFlow, as published"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the variance at the end."""
        denoiser, x, times = make_flow_denoiser(problem, "published")
        source = generator("BayesFlow", problem.world.seed)
        particles = problem.settings.particles
        *_, last = bayesflow(denoiser, x, times, particles=particles, source=source)
        return Scored(last.var, unit="variance")
