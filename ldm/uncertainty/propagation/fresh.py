"""Weights drawn again at every step: BayesDiff's recursion of variances, and its fast form.

A first-order step is affine in the state and the network's output f: x' = A x + B f (+ sqrt(w) z). With V the variance
of x and gamma^2 that of f over weights,

    bayesdiff    V' = Var_x(A x + B f(x)) + B^2 E gamma^2(x)                 total variance, never negative
    published    V' = A^2 V + 2 A B Cov(x, f) + B^2 gamma^2 + w              omits Var_x f(x); can be negative

Both stand for weights that are drawn again at each step (`redrawn` is that process itself), so their scale falls like
1 / steps where `sampled` and `tangents` do not. The recursion keeps variances of elements only: it leaves out what
covariances between pixels, and of an evaluation with later ones, would add.

Source: Kou et al. 2024 (BayesDiff), sections 3.2 and 3.3, with eps in place of f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction, Target
from ldm.diffusion.derivative import balanced_signs, largest_power
from ldm.diffusion.samplers import Step
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise, Transition
from ldm.laplace import LastLayerLaplace
from ldm.uncertainty.propagation.persistent import VarianceStep

FORMS = ("total", "published")
Begin = Callable[[Denoiser, Tensor, int], Iterator[Step]]


@dataclass(frozen=True)
class PredictiveDenoiser:
    """A denoiser that knows the variance of its network's output; under guidance that of the guided output, exactly.

    `null` and `scale` are guidance's; `chunk` bounds the states that one pass holds; `factor` is the lambda of epsilon
    scaling at a time u (`ScaledDenoiser.factor`), which divides eps, and so gamma^2 by its square. Every call adds
    (u, gamma^2 [B, C, H, W]) to `visited`, so a sampler that uses it leaves the variance along its trajectory
    without further evaluations.
    """

    laplace: LastLayerLaplace
    schedule: Schedule
    target: Target
    cond: Tensor | None = None
    null: Tensor | None = None
    scale: float = 1.0
    chunk: int | None = None
    factor: Callable[[float], Tensor] | None = None
    visited: list[tuple[float, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def law(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the network's output at x [N B, C, H, W], N states of each of B images.

        Under a scaling that output is a eps / lambda + b x_0' = f / lambda + (1 - 1 / lambda) (b / alpha) x.
        """
        laws = [self.laplace.predict(features) for features in self._features(x, u)]
        mean, variance = (torch.cat(parts) for parts in zip(*laws, strict=True))
        factor = 1.0 if self.factor is None else float(self.factor(u))
        if factor == 1:
            return mean, variance
        alpha, sigma = self.schedule.per_image(u)
        kept = (1 - 1 / factor) * float(self.target.coefficients(alpha, sigma)[1] / alpha)
        return mean / factor + kept * x, variance / factor**2

    def features(self, x: Tensor, u: float) -> Tensor:
        """The last layer's input at x, guided."""
        return torch.cat(list(self._features(x, u)))

    @torch.no_grad()
    def _features(self, x: Tensor, u: float) -> Iterator[Tensor]:
        """`features` in pieces of at most `chunk` states."""
        repeats = 1 if self.cond is None else len(x) // len(self.cond)
        labels = [None if one is None else one.repeat(repeats, *[1] * (one.ndim - 1)) for one in (self.cond, self.null)]
        scale = self.target.coefficients(*self.schedule.per_image(u))[2].to(x)
        time = self.schedule.time_to_net(u).to(device=x.device, dtype=torch.float32)
        for rows in torch.arange(len(x), device=x.device).split(self.chunk or len(x)):
            cond, null = (None if each is None else each[rows] for each in labels)
            yield self.laplace.guided_features(scale * x[rows], time.expand(len(rows)), cond, null, self.scale)

    def states(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """`law` of states [N, B, C, H, W]."""
        mean, variance = self.law(x.flatten(0, 1), u)
        return mean.unflatten(0, x.shape[:2]), variance.unflatten(0, x.shape[:2])

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        mean, variance = self.law(x, float(u))
        self.visited.append((float(u), variance))
        return Prediction(*self.target.solve(mean, x, *self.schedule.per_image(u)))

    def slopes(self, transition: Transition, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of x' = A x + B f: what line 2 gives for (x, f) = (1, 0) and (0, 1)."""
        one, zero, levels = torch.ones_like(like[:1]), torch.zeros_like(like[:1]), self.schedule.per_image(transition.u)

        def end(x: Tensor, f: Tensor) -> Tensor:
            return transition.mean(*self.target.solve(f, x, *levels))

        return end(one, zero), end(zero, one)


@torch.no_grad()
def bayesdiff(
    steps: Iterator[Step],
    denoiser: PredictiveDenoiser,
    *,
    particles: int = 32,
    source: torch.Generator | Noise,
    form: str = "total",
    every: int = 1,
    sampling_noise: bool = False,
    begin: Begin | None = None,
) -> Iterator[VarianceStep]:
    """Variance along a plain sampler, which decides the images: `steps` of any sampler.

    States around the sampler's are pairs x + sqrt(V) z, x - sqrt(V) z with signs z (`balanced_signs`), so their mean
    is x, their variance V itself, and of a step's slopes only those between far elements are estimated. Where a step
    evaluates the network several times or remembers earlier steps, `begin` lets every state take the sampler's own step
    F, begun again, and with B_i what output i of that step adds to its end

        V' = Var_x F(x) + sum_i B_i^2 E gamma_i^2

    With `every` above 1 (BayesDiff-Skip) states are drawn at every so many steps; between them gamma^2 is evaluated at
    x, and the last slope Cov(x, f) / V of each element is held:

        V' = (A + B slope)^2 V + B^2 gamma^2

    Args:
        particles: states at a step, an even number; each is an evaluation (or as many as the sampler's step takes).
        source: generator of their draws, or a sampler's noise, which makes them each image's own.
        form: total, or published: states on their own, uncentred covariance, no Var_x f, noise w included, and for
            `every` above 1 V' = A^2 V + w between; its images here are the plain sampler's. For first-order steps only.
        sampling_noise: add w, the variance of the sampler's own noise.
        begin: (denoiser, x, k) -> the sampler's steps from state x at step k, see `beginning`; needed for samplers
            that are not first order.

    Raises:
        ValueError: for an odd number of particles, an unknown form, or a step that is not first order without `begin`.
    """
    if form not in FORMS:
        raise ValueError(f"expected a form of the recursion among {', '.join(FORMS)}, got '{form}'")
    if particles < 2 or particles % 2:
        raise ValueError(f"expected an even number of particles from 2 up, since they lie in pairs, got {particles}")
    if every < 1:
        raise ValueError(f"expected states to be drawn every step or more rarely, from 1 up, got every {every}")
    if begin is not None and form == "published":
        raise ValueError("the published recursion knows first-order steps only: leave out `begin`")
    recursion = _Recursion(denoiser, particles, source, form, every, begin)
    for number, step in enumerate(steps):
        var = recursion.advance(step, number)
        if sampling_noise or form == "published":
            var = recursion.var = var + step.transition.w.to(var)
        yield VarianceStep(step, var)


@dataclass
class _Recursion:
    """What `bayesdiff` carries from step to step: the variance of the state and the last slope of the output."""

    denoiser: PredictiveDenoiser
    particles: int
    source: torch.Generator | Noise
    form: str
    every: int
    begin: Begin | None
    var: Tensor | None = None
    slope: Tensor | None = None

    def advance(self, step: Step, number: int) -> Tensor:
        """The variance of `step.x_next`, without the sampler's noise."""
        self.var = torch.zeros_like(step.x) if self.var is None else self.var
        known, published = bool((self.var > 0).any()), self.form == "published"
        a, b = self.denoiser.slopes(step.transition, step.x)
        draw = number % self.every == 0 or (not published and known and self.slope is None)
        if not draw:
            variance = self._variance_at_state(step, a, b)
            slope = 0 if self.slope is None else self.slope
            self.var = a**2 * self.var if published else (a + b * slope) ** 2 * self.var + b**2 * variance
        elif published:
            variance = self._variance_at_state(step, a, b)
            x = _scattered(step, self.var, self.particles, self.source)
            f, _ = self.denoiser.states(x, step.u)
            covariance = (x * f).mean(0) - step.x * f.mean(0)
            self.var = a**2 * self.var + 2 * a * b * covariance + b**2 * variance
        else:
            if self.begin is None and number < 2:
                self._variance_at_state(step, a, b)  # for its check
            x = _around(step, self.var, self.particles, self.source) if known else step.x[None]
            f, gamma = self.denoiser.states(x, step.u)
            self.slope = _slope(x, f, self.var) if known else None
            if self.begin is None:
                self.var = (a * x + b * f).var(0, correction=0) + b**2 * gamma.mean(0)
            else:
                self.var = _by_steps(self.begin, self.denoiser, x, step.index)
        return self.var

    def _variance_at_state(self, step: Step, a: Tensor, b: Tensor) -> Tensor:
        """Evaluate gamma^2 at the sampler's own state; without `begin` raise a ValueError unless F = A x + B f."""
        output, variance = self.denoiser.law(step.x, step.u)
        if self.begin is None:
            _check_first_order(step, a * step.x + b * output)
        return variance


def beginning(sampler: Callable[..., Iterator[Step]], schedule: Schedule, times: Tensor, **options: Any) -> Begin:
    """`begin` of `bayesdiff` for a sampler on given times; its own noise is left out, since all states share it."""

    def begin(denoiser: Denoiser, x: Tensor, index: int) -> Iterator[Step]:
        return sampler(denoiser, schedule, x, times, start=index, noise=lambda _, shape: torch.zeros(shape), **options)

    return begin


def _by_steps(begin: Begin, denoiser: PredictiveDenoiser, x: Tensor, index: int) -> Tensor:
    """Var_x F(x) + sum_i B_i^2 E gamma_i^2 over states x [N, B, C, H, W]."""
    ahead = len(denoiser.visited)
    moved = next(begin(denoiser, x.flatten(0, 1), index)).x_next.unflatten(0, x.shape[:2])
    gammas = [gamma.unflatten(0, x.shape[:2]).mean(0) for _, gamma in denoiser.visited[ahead:]]
    del denoiser.visited[ahead:]
    shares = _shares(begin, denoiser, len(gammas), x, index)
    own = sum(share**2 * gamma for share, gamma in zip(shares, gammas, strict=True))
    return moved.var(0, correction=0) + own


def _shares(begin: Begin, denoiser: PredictiveDenoiser, count: int, like: Tensor, index: int) -> Tensor:
    """B_i [count] of a sampler's step from 0, from outputs that are 1 at evaluation i and 0 at the others."""
    outputs = iter(torch.eye(count, dtype=torch.float64, device=like.device)[:, :, None, None, None].unbind())

    def unit(x: Tensor, u: Tensor | float) -> Prediction:
        return Prediction(*denoiser.target.solve(next(outputs), x, *denoiser.schedule.per_image(u)))

    zero = torch.zeros(count, 1, 1, 1, dtype=torch.float64, device=like.device)
    return next(begin(unit, zero, index)).x_next.flatten().to(like)


def _check_first_order(step: Step, expected: Tensor) -> None:
    """Raise a ValueError unless a step went where its first evaluation alone leads."""
    went = step.distribution.mean
    if float((went - expected).norm()) > 1e-3 * float(went.norm()) + 1e-6:
        raise ValueError(
            f"step {step.index} is not first order in the network's output: a sampler evaluates several times or "
            "remembers earlier steps (pass begin=beginning(sampler, schedule, times); the published form takes DDIM, "
            "DDPM and Euler only), or what acts on predictions changes x0 alone (clipping, x0_only scaling): take "
            "redrawn_steps or tangents"
        )


def _around(step: Step, var: Tensor, particles: int, source: torch.Generator | Noise) -> Tensor:
    """States [N, B, C, H, W] around a step's as pairs, a deviation away in every element, with balanced signs."""
    pairs = particles // 2
    signs = balanced_signs(_drawn(step, (-(-pairs // largest_power(pairs)), *step.x.shape), source), pairs)
    z = var.clamp(min=0).sqrt() * signs
    return step.x + torch.cat([z, -z])


def _scattered(step: Step, var: Tensor, particles: int, source: torch.Generator | Noise) -> Tensor:
    """Normal states [N, B, C, H, W] around a step's, each on its own, as published."""
    return step.x + var.clamp(min=0).sqrt() * _drawn(step, (particles, *step.x.shape), source)


def _drawn(step: Step, shape: tuple[int, ...], source: torch.Generator | Noise) -> Tensor:
    if isinstance(source, torch.Generator):
        return torch.randn(shape, generator=source, dtype=torch.float64).to(step.x)
    return source(step.index, shape).to(step.x)


def _slope(x: Tensor, f: Tensor, var: Tensor) -> Tensor:
    """Cov(x, f) / Var(x) of each element over states, 0 where the state is certain."""
    away = x - x.mean(0)
    spread = away.square().mean(0)
    return torch.where(var > 0, (away * f).mean(0) / spread, torch.zeros_like(var))
