"""Weights drawn anew at every step: BayesDiff's recursion, its fast form, and the integral of predictive variance.

A first-order step is affine in the state and the network's output f: x' = A x + B f (+ sqrt(w) z). With V the variance
of x and gamma^2 that of f over weights,

    bayesdiff    V' = Var_x(A x + B f(x)) + B^2 E gamma^2(x)                 total variance, never negative
    published    V' = A^2 V + 2 A B Cov(x, f) + B^2 gamma^2 + w              omits Var_x f(x); can be negative

Both redraw the weights at each step, so their scale falls like 1 / steps where `sampled` and `tangents` do not.

Source: Kou et al. 2024 (BayesDiff), sections 3.2 and 3.3, with eps in place of f.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Prediction, Target
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler import Step
from ldm.models.diffusion.sampler.transition import Transition
from ldm.uncertainty.laplace import LastLayerLaplace

FORMS = ("total", "published")


@dataclass(frozen=True)
class PredictiveDenoiser:
    """A denoiser that knows the variance of its network's output; under guidance that of the guided output, exactly.

    `null` and `scale` are guidance's. Every call adds (u, gamma^2 [B, C, H, W]) to `visited`, so a sampler that walks
    with it leaves the variance along its trajectory without further evaluations.
    """

    laplace: LastLayerLaplace
    path: Path
    target: Target
    cond: Tensor | None = None
    null: Tensor | None = None
    scale: float = 1.0
    visited: list[tuple[float, Tensor]] = field(default_factory=list)

    def law(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the network's output at x [N B, C, H, W], N states of each of B images."""
        repeats = 1 if self.cond is None else len(x) // len(self.cond)
        cond, null = (None if labels is None else labels.repeat(repeats) for labels in (self.cond, self.null))
        scale = self.target.coefficients(*self.path.per_image(u))[2].to(x)
        time = self.path.time_to_net(u).to(device=x.device, dtype=torch.float32).expand(len(x))
        return self.laplace(scale * x, time, cond, null=null, scale=self.scale)

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        mean, variance = self.law(x, float(u))
        self.visited.append((float(u), variance))
        return Prediction(*self.target.solve(mean, x, *self.path.per_image(u)))

    def slopes(self, transition: Transition, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of x' = A x + B f: what line 2 gives for (x, f) = (1, 0) and (0, 1)."""
        one, zero, levels = torch.ones_like(like[:1]), torch.zeros_like(like[:1]), self.path.per_image(transition.u)
        return tuple(transition.mean(*self.target.solve(f, x, *levels)) for x, f in ((one, zero), (zero, one)))


@dataclass(frozen=True)
class VarianceStep:
    """A step of the plain sampler and the variance [B, C, H, W] of `step.x_next`."""

    step: Step
    var: Tensor


@torch.no_grad()
def bayesdiff(
    steps: Iterator[Step],
    denoiser: PredictiveDenoiser,
    *,
    particles: int = 10,
    source: torch.Generator,
    form: str = "total",
    every: int = 1,
    sampling_noise: bool = False,
) -> Iterator[VarianceStep]:
    """Variance along a plain sampler, which decides the images: `steps` of DDIM, DDPM or Euler.

    States around the sampler's are drawn as pairs x + sqrt(V) z, x - sqrt(V) z, so their mean is x itself. With `every`
    above 1 (BayesDiff-Skip) they are drawn at every so many steps; between them gamma^2 is evaluated at x, and the last
    slope Cov(x, f) / V of each element is held:

        V' = (A + B slope)^2 V + B^2 gamma^2

    Args:
        particles: states at a step, an even number; each is an evaluation.
        source: generator of their draws.
        form: total, or published: uncentred covariance, no Var_x f, noise w included, and for `every` above 1
            V' = A^2 V + w between; its images here are the plain sampler's.
        sampling_noise: add w, the variance of the sampler's own noise.

    Raises:
        ValueError: for an odd number of particles or an unknown form.
    """
    if form not in FORMS or particles < 2 or particles % 2 or every < 1:
        raise ValueError(
            f"expected form in {FORMS}, an even number of particles and every >= 1, got {form}, {particles}"
        )
    var: Tensor | None = None
    slope: Tensor | None = None
    for number, step in enumerate(steps):
        var = torch.zeros_like(step.x) if var is None else var
        a, b = denoiser.slopes(step.transition, step.x)
        known = bool((var > 0).any())
        first = form == "total" and known and slope is None
        if first or number % every == 0:
            x, f, gamma = _around(denoiser, step, var, particles, source)
            if form == "published":
                covariance = (x * f).mean(0) - step.x * f.mean(0)
                var = a**2 * var + 2 * a * b * covariance + b**2 * denoiser.law(step.x, step.u)[1]
            else:
                slope = _slope(x, f, var) if known else None
                var = (a * x + b * f).var(0, correction=0) + b**2 * gamma.mean(0)
        elif form == "published":
            var = a**2 * var
        else:
            held = 0 if slope is None else slope
            var = (a + b * held) ** 2 * var + b**2 * denoiser.law(step.x, step.u)[1]
        if sampling_noise or form == "published":
            var = var + step.transition.w.to(var)
        yield VarianceStep(step, var)


@torch.no_grad()
def path_integral(steps: Iterator[Step], denoiser: PredictiveDenoiser) -> Tensor:
    """Integral of the field's variance along the trajectory [B, C, H, W], of `steps` that walk with `denoiser`.

        sum_k gamma^2(x_k, u_k) (tau_k - tau_{k+1})

    The field is the path's, eps or velocity; tau is the variable in which its lines are straight, sigma / alpha or u.
    """
    path, total = denoiser.path, None
    ahead = len(denoiser.visited)
    for step in steps:
        u, gamma = denoiser.visited[ahead]
        ahead = len(denoiser.visited)
        alpha, sigma = path.coefficients(u, gamma)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        unit = Target(path.field).of(*denoiser.target.solve(one, zero, alpha, sigma), alpha, sigma)
        s = step.transition.s
        width = path.ratio(u) - path.ratio(s) if path.field == "eps" else torch.as_tensor(u - s)
        term = width.to(gamma) * unit**2 * gamma
        total = term if total is None else total + term
    if total is None:
        raise ValueError("no step to integrate over: the sampler was already walked")
    return total


def _around(
    denoiser: PredictiveDenoiser, step: Step, var: Tensor, particles: int, source: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """States [N, B, C, H, W] around a step's, and the mean and variance of the network's output there."""
    shape = (particles // 2, *step.x.shape)
    z = torch.randn(shape, generator=source, dtype=torch.float64).to(step.x)
    shift = var.clamp(min=0).sqrt() * torch.cat([z, -z])
    x = step.x + shift
    mean, gamma = denoiser.law(x.flatten(0, 1), step.u)
    return x, mean.unflatten(0, x.shape[:2]), gamma.unflatten(0, x.shape[:2])


def _slope(x: Tensor, f: Tensor, var: Tensor) -> Tensor:
    """Cov(x, f) / Var(x) of each element over states, 0 where the state is certain."""
    away = x - x.mean(0)
    spread = away.square().mean(0)
    return torch.where(var > 0, (away * f).mean(0) / spread, torch.zeros_like(var))
