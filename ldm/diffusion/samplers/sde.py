"""Samplers of the reverse stochastic equation, by k-diffusion's names: Euler ancestral, DPM-Solver++ SDE, 2M, 3M SDE.

Each is line 2 with a mixture of predicted x_0; r = sigma / alpha is the noise level. Noise between two levels is a
Brownian path in r, whose increment over a step, divided by the root of its length, is the step's draw.

Source: Lu et al. 2022b (arXiv 2211.01095), section 4 and appendix; Karras et al. 2022 for churn's S_noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import index_between
from ldm.diffusion.samplers.singlestep import log_width, time_between
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import (
    Noise,
    Steps,
    Transition,
    advance,
    ddim,
    ddim_transition,
    following,
    intervals,
)

SOLVER_TYPES = ("midpoint", "heun")


def euler_ancestral(
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
    """Euler's step to a lower noise level, and noise back up: DDIM at eta = 1 if not told otherwise; S evaluations.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        eta: the noise has eta^2 times the posterior variance.
        S_noise: multiplies the noise.
    """
    yield from ddim(denoiser, schedule, x, times, eta=eta, temperature=S_noise, noise=noise, start=start)


def brownian_share(schedule: Schedule, u: float, middle: float, s: float) -> float:
    """Return the correlation of a Brownian path's increments from u to the middle and from u to s, in sigma / alpha."""
    begin, inside, end = (float(schedule.ratio(time)) for time in (u, middle, s))
    return math.sqrt((begin - inside) / (begin - end))


def dpmpp_sde(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    S_noise: float = 1.0,
    r: float = 0.5,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DPM-Solver++ SDE, singlestep of order 2; 2S - 1 evaluations to clean data.

    Both evaluations of a step draw noise, and the two draws are increments of one Brownian path from the same point:
    given z over the whole step, the draw up to the middle is rho z + sqrt(1 - rho^2) z' with rho = `brownian_share`
    and z' independent (`index_between`), which is the law of the Brownian bridge.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        eta: the noise of both parts has eta^2 times the posterior variance.
        S_noise: multiplies the noise.
        r: where the second evaluation lies, as a fraction of the step in lambda.

    Raises:
        ValueError: for r outside (0, 1].
    """
    if not 0 < r <= 1:
        raise ValueError(f"r is a fraction of the step, above 0 and at most 1; got {r}")
    for index, u, s in intervals(times, start):
        transition = ddim_transition(schedule, u, s, eta, S_noise)
        found = denoiser(x, u)
        x0, eps = found.x0, found.eps
        if math.isfinite(log_width(schedule, u, s)):
            middle = time_between(schedule, u, s, r)
            bridge = None if noise is None else _bridge(noise, brownian_share(schedule, u, middle, s))
            inner = ddim_transition(schedule, u, middle, eta, S_noise)
            inside = denoiser(advance(index, x, x0, eps, inner, bridge).x_next, middle)
            x0 = torch.lerp(x0, inside.x0, 1 / (2 * r))
            alpha, sigma = schedule.coefficients(u, x)
            eps = (x - alpha * x0) / sigma
        step = advance(index, x, x0, eps, transition, noise)
        x = following(step, (yield step))


def _bridge(noise: Noise, share: float) -> Noise:
    """Return the draws from a step's begin to its middle, given those of the whole step."""
    own = math.sqrt(max(0.0, 1 - share**2))
    return lambda index, shape: share * noise(index, shape) + own * noise(index_between(index), shape)


def sde_transition(schedule: Schedule, u: float, s: float, eta: float, S_noise: float) -> Transition:
    """v = sigma_s^2 (1 - (r_s / r_u)^(2 eta)), the noise of the reverse equation at rate eta; w = S_noise^2 v.

    At eta = 1 it is the posterior variance.
    """
    sigma = schedule.sigma(s)
    v = sigma**2 * (1 - (schedule.ratio(s) / schedule.ratio(u)) ** (2 * eta))
    return Transition(u, s, schedule.alpha(s), sigma, v, S_noise**2 * v)


def dpmpp_2m_sde(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    S_noise: float = 1.0,
    solver_type: str = "midpoint",
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DPM-Solver++(2M) SDE: x_0 extrapolated from the step before; S evaluations. At eta = 0 it is DPM-Solver++(2M).

        x_0 + c (h / h') (x_0 - x_0'),   primes of the step before
        midpoint  c = 1/2        heun  c = 1 / (1 - e^-k) - 1 / k,   k = (1 + eta) h

    The first step is first order, and so is one to clean data.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        eta: the rate of noise, see `sde_transition`.
        S_noise: multiplies the noise.
        solver_type: midpoint or heun.

    Raises:
        ValueError: for another solver type.
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type must be one of {SOLVER_TYPES}, got '{solver_type}'")
    previous: tuple[Tensor, float] | None = None
    for index, u, s in intervals(times, start):
        found = denoiser(x, u)
        x0, eps = found.x0, found.eps
        width = log_width(schedule, u, s)
        if previous is not None and math.isfinite(width):
            total = (1 + eta) * width
            share = 0.5 if solver_type == "midpoint" else -1 / math.expm1(-total) - 1 / total
            x0 = x0 + share * width / previous[1] * (x0 - previous[0])
            alpha, sigma = schedule.coefficients(u, x)
            eps = (x - alpha * x0) / sigma
        previous = found.x0, width
        step = advance(index, x, x0, eps, sde_transition(schedule, u, s, eta, S_noise), noise)
        x = following(step, (yield step))


def dpmpp_3m_sde(
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
    """DPM-Solver++(3M) SDE: x_0 from the two steps before; S evaluations. At eta = 0 DPM-Solver++(3M).

    The first step is first order, the second one second order, and one to clean data first order.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        eta: the rate of noise, see `sde_transition`.
        S_noise: multiplies the noise.
    """
    history: list[tuple[Tensor, float]] = []  # x_0 and width of the last two steps, the newest first
    for index, u, s in intervals(times, start):
        found = denoiser(x, u)
        x0, eps = found.x0, found.eps
        width = log_width(schedule, u, s)
        if history and math.isfinite(width):
            x0 = x0 + _extrapolated(x0, history, width, (1 + eta) * width)
            alpha, sigma = schedule.coefficients(u, x)
            eps = (x - alpha * x0) / sigma
        history = [(found.x0, width), *history][:2]
        step = advance(index, x, x0, eps, sde_transition(schedule, u, s, eta, S_noise), noise)
        x = following(step, (yield step))


def _extrapolated(x0: Tensor, history: list[tuple[Tensor, float]], width: float, total: float) -> Tensor:
    """What slope and curvature of x_0 in lambda add to x_0 over a step of `width`, noise included `total`.

    (phi_2 slope - phi_3 curvature) / (1 - e^-k),   phi_2 = (e^-k - 1) / k + 1,   phi_3 = phi_2 / k - 1/2
    """
    weight = -math.expm1(-total)
    second = 1 - weight / total
    ratio = history[0][1] / width
    slope = (x0 - history[0][0]) / ratio
    if len(history) == 1:
        return second / weight * slope
    before = history[1][1] / width
    earlier = (history[0][0] - history[1][0]) / before
    curvature = (slope - earlier) / (ratio + before)
    third = second / total - 0.5
    bent = slope + ratio * curvature
    return (second * bent - third * curvature) / weight
