"""DPM-Solver with as many steps between two times as a tolerance asks, in lambda = log(alpha / sigma).

Source: Lu et al. 2022a (DPM-Solver, arXiv 2206.00927), appendix C; the control of step sizes is k-diffusion's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import PURE_NOISE, level_range
from ldm.diffusion.samplers.singlestep import (
    go_along,
    log_width,
    second_order_eps,
    third_order_eps,
    time_between,
)
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Step, Steps, advance, ddim_transition, following, intervals

# What is left of an interval in lambda that counts as nothing, as in k-diffusion.
NOTHING = 1e-5
# Steps of an interval at most, whether they were accepted or not, and the shortest one.
MOST = 1000
SHORTEST = 1e-8


@dataclass
class StepControl:
    """Proportional, integral and derivative control of a step's width by the errors of the last three steps.

    A step is accepted where the factor on its width is at least `safety`.

    Attributes:
        width: of the next step in lambda.
        order: of the method.
        proportional, integral, derivative: coefficients; 0, 1, 0 looks at the last error alone.
    """

    width: float
    order: int
    proportional: float
    integral: float
    derivative: float
    safety: float
    _inverses: list[float] = field(default_factory=list)

    def accept(self, error: float) -> bool:
        """Change the width after a step whose error is in units of the tolerance; return whether the step counts."""
        inverse = 1 / (error + 1e-8)
        self._inverses = [inverse, *(self._inverses[1:] or [inverse, inverse])]
        powers = (
            self.proportional + self.integral + self.derivative,
            -self.proportional - 2 * self.derivative,
            self.derivative,
        )
        terms = zip(self._inverses, powers, strict=True)
        factor = 1 + math.atan(math.prod(value ** (power / self.order) for value, power in terms) - 1)
        self.width *= factor
        accepted = factor >= self.safety
        if accepted:
            self._inverses = [inverse, inverse, self._inverses[1]]
        return accepted


def dpm_adaptive(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    start: int = 0,
) -> Steps:
    """DPM-Solver of order 2 or 3 with adaptive steps, reported once for each interval between times.

    Two times give the solver its freedom (`logsnr` with one step, as k-diffusion's dpm_adaptive); every further time
    is one to report at. The error is the difference to the method of one order less; step sizes follow the first
    member and the worst image of the batch. The reported x_0 and eps are those of the straight line that leads where
    the interval ended.

    Pure noise and clean data have no width in lambda: the steps from and to them are of first order, as far as the
    levels that `level_range` names.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        order: 2 or 3.
        rtol, atol: tolerance of a step's x / alpha.
        h_init: width of the first step in lambda.
        pcoeff, icoeff, dcoeff, accept_safety: see `StepControl`.

    Raises:
        ValueError: for another order, or where the steps do not arrive.
    """
    if order not in (2, 3):
        raise ValueError(f"order of DPM-Solver-adaptive must be 2 or 3, got {order!r}")
    control = StepControl(h_init, order, pcoeff, icoeff, dcoeff, accept_safety)
    for index, u, s in intervals(times, start):
        after = x
        begin, end = _finite_part(schedule, u, s)
        if begin < u:
            after = _first_order(denoiser, schedule, after, u, begin)
        if end < begin:
            after = _across(denoiser, schedule, after, begin, end, control, rtol, atol)
        if s < end:
            after = _first_order(denoiser, schedule, after, end, s)
        step = _straight(schedule, index, x, after, u, s)
        x = following(step, (yield step))


def _finite_part(schedule: Schedule, u: float, s: float) -> tuple[float, float]:
    """Return the times between which an interval has a width in lambda."""
    levels = torch.tensor(level_range(schedule, None, None), dtype=torch.float64)
    low, high = schedule.time_at(levels).tolist()
    begin = u if schedule.ratio(u) < PURE_NOISE else max(min(u, high), s)
    end = s if schedule.ratio(s) > 0 else min(max(s, low), begin)
    return begin, end


def _first_order(denoiser: Denoiser, schedule: Schedule, x: Tensor, u: float, s: float) -> Tensor:
    prediction = denoiser(x, u)
    return ddim_transition(schedule, u, s).mean(prediction.x0, prediction.eps)


def _across(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    begin: float,
    end: float,
    control: StepControl,
    rtol: float,
    atol: float,
) -> Tensor:
    """Return the state at `end` of a state at `begin`, by adaptive steps."""
    u = begin
    before, first = x / float(schedule.alpha(begin)), None
    for _ in range(MOST):
        left = log_width(schedule, u, end)
        if left <= NOTHING:
            return x
        if control.width < SHORTEST:
            break
        s = end if control.width >= left else time_between(schedule, u, end, control.width / left)
        first = denoiser(x, u).eps if first is None else first
        if control.order == 2:
            lower, higher = first, second_order_eps(denoiser, schedule, x, first, u, s)
        else:
            lower, higher = third_order_eps(denoiser, schedule, x, first, u, s)
        low, high = (go_along(schedule, 0, x, eps, u, s).x_next for eps in (lower, higher))
        alpha = float(schedule.alpha(s))
        error = _size((low - high) / alpha, torch.maximum((low / alpha).abs(), before.abs()), rtol, atol)
        if control.accept(error):
            before, x, u, first = low / alpha, high, s, None
    raise ValueError(
        f"adaptive steps did not lead from {begin:g} to {end:g} (now at {u:g}, of width {control.width:.1g}): is the "
        "state finite? otherwise loosen rtol and atol"
    )


def _size(error: Tensor, size: Tensor, rtol: float, atol: float) -> float:
    """Return the largest over images of the root mean square error, in units of the tolerance; of the first member."""
    error, size = (value[0] if value.ndim == 5 else value for value in (error, size))
    scaled = error / (rtol * size).clamp(min=atol)
    largest = float(scaled.square().flatten(1).mean(1).sqrt().max())
    return largest if math.isfinite(largest) else math.inf


def _straight(schedule: Schedule, index: int, x: Tensor, after: Tensor, u: float, s: float) -> Step:
    """Return the step whose straight line leads from (x, u) to a state at s."""
    transition = ddim_transition(schedule, u, s)
    a, b = schedule.coefficients(u, x)
    c, d = transition.alpha.to(x), transition.sigma.to(x)
    determinant = a * d - b * c
    x0 = (d * x - b * after) / determinant
    eps = (a * after - c * x) / determinant
    return advance(index, x.expand(after.shape), x0, eps, transition)
