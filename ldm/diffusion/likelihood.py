"""Likelihoods of a deterministic flow: the change of density along it is the divergence of its field.

In the variables y = x / scale, tau in which a schedule's lines are straight, d y / d tau = f(y, tau) and

    log p(x_0) = log p(x_T) + D ln(scale_T / scale_0) + integral over tau, from data to noise, of div f

Sources: Chen et al. 2018 (neural ODEs, theorem 1); Song et al. 2021b, appendix D.2; Grathwohl et al. 2019 (estimate).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.derivative import diagonal, rademacher
from ldm.diffusion.ode.adaptive import field_slope
from ldm.diffusion.ode.runge_kutta import coordinates
from ldm.diffusion.ode.tableau import Integrator, Slope, tableau
from ldm.diffusion.schedule import Schedule

# Levels of an 8-bit image for each unit of [-1, 1]: 255 steps over a length of 2.
LEVELS_PER_UNIT = 127.5


@dataclass(frozen=True)
class Likelihood:
    """`log_density` [B] in nats of the states at the times' last time; `noise` [B, C, H, W] that they come from."""

    log_density: Tensor
    noise: Tensor

    @property
    def bits_per_dimension(self) -> Tensor:
        """-log2 p / D [B], of a density of 8-bit images in [-1, 1]: log2 127.5 = 6.994 bits are added a dimension.

        Their 256 levels lie 2 / 255 apart, so that a level's share of the density is p (1 / 127.5)^D. The number is an
        upper bound of a code's length where the images were made continuous by uniform noise of one level's width
        (`dequantise`; Theis et al. 2016, section 3.1). Of images as they are it bounds nothing: a density may be as
        high as it likes on 256 points.
        """
        return math.log2(LEVELS_PER_UNIT) - self.log_density / (math.log(2) * self.noise[0].numel())


def dequantise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add uniform noise of one level's width, 2 / 255, to 8-bit images [B, C, H, W] in [-1, 1] (Theis et al. 2016)."""
    draws = torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images)
    return images + (2 * draws - 1) / (2 * LEVELS_PER_UNIT)


def standard_normal(x: Tensor, scale: float = 1.0) -> Tensor:
    """ln N(x; 0, scale^2 I) of each image [B]."""
    flat = x.double().flatten(1) / scale
    return -0.5 * flat.square().sum(1) - flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(scale))


@torch.no_grad()
def log_likelihood(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    method: str = "rk4",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> Likelihood:
    """Log density in nats of states x [B, C, H, W] at the times' last time, integrated back to their first.

    Args:
        times: descending times as samplers take them. A network that does not know clean data (an eps model) needs one
            that ends before u = 0; the density is then that of the slightly noisy x.
        method: a tableau's name; dopri5 takes as many steps as rtol and atol ask (in the schedule's straight
        variables).
        probes: None for the exact divergence (C H W derivatives an evaluation), else Hutchinson's number of probes,
            drawn once for the whole trajectory: unbiased in the log density where steps are fixed.
        generator: of the probes' signs.
        log_prior: log density [B] of states at the noisy end; N(0, schedule.prior_std^2) where None.
        chunk: directions carried at once.

    Raises:
        ValueError: for an unknown method, or probes without a generator.
    """
    if (probes is None) != (generator is None):
        raise ValueError("probes and generator go together: Hutchinson's estimate draws signs, the exact one none")
    signs = None if probes is None or generator is None else rademacher(probes, x, generator)
    integrator = Integrator(
        _with_divergence(field_slope(denoiser, schedule), signs, chunk), tableau(method), rtol, atol
    )
    ascending = times.flip(0).tolist()
    taus = [float(coordinates(schedule, u)[1]) for u in ascending]
    first, last = (coordinates(schedule, u)[0] for u in (ascending[0], ascending[-1]))
    y, total = x / first.to(x), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for start, stop in itertools.pairwise(taus):
        y, gained = integrator.across(y, start, stop)
        total = total + gained
    noise = last.to(y) * y
    prior = standard_normal(noise, schedule.prior_std) if log_prior is None else log_prior(noise).double()
    return Likelihood(prior + x[0].numel() * math.log(float(last / first)) + total, noise)


def _with_divergence(slope: Slope, probes: Tensor | None, chunk: int | None) -> Slope:
    def both(y: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        field, _ = slope(y, tau)
        elements = diagonal(lambda state: slope(state, tau)[0], y, probes, chunk)
        return field, elements.double().flatten(1).sum(1)

    return both
