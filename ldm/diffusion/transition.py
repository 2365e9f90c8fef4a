"""Line 2, how one steps, what a step reports, and the samplers with one evaluation a step.

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - v) eps_hat + sqrt(w) z

A sampler is a generator of `Step`, a function of (denoiser, schedule, x, times). It neither parses, prints, plots nor
measures: whoever wants intermediates, branches or norms iterates over its steps. `start` begins at step k with empty
history: branching is a new generator. A caller may `send` a state in place of `step.x_next` (inpainting); iterating as
usual changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.modules.distributions.gaussian import Gaussian

Noise = Callable[[int, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Transition:
    """Coefficients of line 2 from time `u` to time `s`; `w` may be a tensor where a network learns it."""

    u: float
    s: float
    alpha: Tensor
    sigma: Tensor
    v: Tensor
    w: Tensor

    def mean(self, x0: Tensor, eps: Tensor) -> Tensor:
        """alpha_s x0_hat + sqrt(sigma_s^2 - v) eps_hat, of the shape of the parts."""
        direction = (self.sigma**2 - self.v).clamp(min=0).sqrt()
        return _like(self.alpha, x0) * x0 + _like(direction, eps) * eps


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    return value.to(tensor) if value.ndim else value.to(dtype=tensor.dtype, device=tensor.device)


def posterior_variance(schedule: Schedule, u: Tensor | float, s: Tensor | float) -> Tensor:
    """Variance of q(x_s | x_u, x_0): sigma_s^2 (1 - (alpha_u sigma_s / (alpha_s sigma_u))^2), float64."""
    alpha_s, sigma_s, alpha_u, sigma_u = schedule.alpha(s), schedule.sigma(s), schedule.alpha(u), schedule.sigma(u)
    return (sigma_s**2 * (1 - (alpha_u * sigma_s / (alpha_s * sigma_u)) ** 2)).clamp(min=0)


def forward_variance(schedule: Schedule, u: Tensor | float, s: Tensor | float) -> Tensor:
    """Variance of q(x_u | x_s): sigma_u^2 - (alpha_u sigma_s / alpha_s)^2, float64 (beta of a VP step)."""
    return (schedule.sigma(u) ** 2 - (schedule.alpha(u) * schedule.sigma(s) / schedule.alpha(s)) ** 2).clamp(min=0)


def ddim_transition(schedule: Schedule, u: float, s: float, eta: float = 0.0, temperature: float = 1.0) -> Transition:
    """v = eta^2 times the posterior variance (Song et al. 2021, eq. 16), at most sigma_s^2; w = temperature^2 v."""
    alpha = schedule.alpha(s)
    sigma = schedule.sigma(s)
    v = torch.minimum(eta**2 * posterior_variance(schedule, u, s), sigma**2) if eta else torch.zeros_like(alpha)
    return Transition(u, s, alpha, sigma, v, temperature**2 * v)


@dataclass(frozen=True)
class Step:
    """One step of a sampler: where it was, what was predicted there, how it moved, where it is.

    `index` counts steps from the noisiest (0); `x` is the state at time `u` (after churn, where there is any);
    `x0` and `eps` the parts that line 2 used; `x_next` the state at `transition.s`; `shift` what guidance adds to the
    mean, if anything. Shapes [..., B, C, H, W].
    """

    index: int
    u: float
    x: Tensor
    x0: Tensor
    eps: Tensor
    transition: Transition
    x_next: Tensor
    shift: Tensor | None = None

    @property
    def distribution(self) -> Gaussian:
        """N(mean, w): the state at `transition.s` given `x`."""
        mean = self.transition.mean(self.x0, self.eps)
        return Gaussian(mean if self.shift is None else mean + self.shift, self.transition.w)


def advance(
    index: int,
    x: Tensor,
    x0: Tensor,
    eps: Tensor,
    transition: Transition,
    noise: Noise | None = None,
    shift: Tensor | None = None,
) -> Step:
    """Apply line 2; the draw has the shape of the state before the step, so a first branched draw is shared.

    Raises:
        ValueError: if the step is stochastic and no noise was given.
    """
    x_next = transition.mean(x0, eps)
    if shift is not None:
        x_next = x_next + shift
    if bool((transition.w > 0).any()):
        if noise is None:
            raise ValueError("this step draws noise: pass noise=ImageNoise(seed, images), or choose no noise (eta = 0)")
        x_next = x_next + _like(transition.w.sqrt(), x) * noise(index, x.shape).to(x)
    return Step(index, transition.u, x, x0, eps, transition, x_next, shift)


Steps = Generator[Step, Tensor | None, None]


@dataclass(frozen=True)
class BoundSampler:
    """A sampler with its options bound: `(denoiser, schedule, x, times, *, noise=None, start=0) -> Steps`.

    `noise` may always be passed; a sampler that draws none (`draws` False) leaves it out.
    """

    solver: Callable[..., Steps]
    options: Mapping[str, Any]
    draws: bool

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        x: Tensor,
        times: Tensor,
        *,
        noise: Noise | None = None,
        start: int = 0,
    ) -> Steps:
        drawn = {"noise": noise} if self.draws else {}
        return self.solver(denoiser, schedule, x, times, start=start, **self.options, **drawn)


def intervals(times: Tensor, start: int) -> list[tuple[int, float, float]]:
    """(index, from, to) of every step from `start` on.

    Raises:
        ValueError: if the each_time do not descend, or `start` is not a step of the times.
    """
    each_time = times.tolist()
    if not 0 <= start < len(each_time) - 1:
        raise ValueError(f"step {start} is not among the {len(each_time) - 1} steps (0 is the noisiest)")
    if bool((times.diff() >= 0).any()):
        raise ValueError(f"times must descend from noise to data, got {each_time[:4]} ..")
    return [(k, each_time[k], each_time[k + 1]) for k in range(start, len(each_time) - 1)]


def following(step: Step, sent: Tensor | None) -> Tensor:
    """The state to go on from: what the caller sent, else where the step led."""
    return step.x_next if sent is None else sent


def ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DDIM at any eta (Song et al. 2021); eta = 0 is also the Euler step of EDM and of a flow.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        times: descending times, see `grids`.
        eta: 0 deterministic .. 1 the variance of ancestral sampling.
        temperature: multiplies the noise, not the mean.
    """
    for index, u, s in intervals(times, start):
        prediction = denoiser(x, u)
        transition = ddim_transition(schedule, u, s, eta, temperature)
        step = advance(index, x, prediction.x0, prediction.eps, transition, noise)
        x = following(step, (yield step))


@torch.no_grad()
def run(steps: Iterator[Step]) -> Tensor:
    """Walk a sampler to its end, without gradients; return the final state."""
    last = None
    for step in steps:
        last = step
    assert last is not None
    return last.x_next
