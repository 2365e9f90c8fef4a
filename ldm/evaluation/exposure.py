"""Exposure bias: how far sampling strays from what the network saw in training (Ning et al. 2024, arXiv 2308.15321).

Everything here observes the steps of a sampler, in one pass, with memory that does not grow with the number of images:

    watch = EpsilonWatch(denoiser)
    norms = Norms(watch, steps)
    observe(ddim(scaled(watch, ..), schedule, x, times), norms)                      # consecutive sampling
    observe(each_step(ddim, watch, schedule, x0, times, noise), norms_in_training)   # every step from a true x_u

Observers hold `StepMoments`, which add up over batches and merge over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.samplers import Step
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise

Observer = Callable[[Step], None]


class StepMoments:
    """Count, mean and scatter of values [*shape] at each of S steps, in float64, streamed (Chan et al. 1983).

    `steps` is S; `shape` that of one image's value: () for a norm, (C, H, W) for a state.
    """

    def __init__(self, steps: int, shape: Sequence[int] = (), device: torch.device | str = "cpu"):
        self.count = torch.zeros(steps, dtype=torch.float64, device=device)
        self.mean = torch.zeros(steps, *shape, dtype=torch.float64, device=device)
        self.scatter = torch.zeros_like(self.mean)

    def add(self, step: int, values: Tensor) -> None:
        """Add values [..., *shape] of one step; all leading axes count as images."""
        shape = self.mean.shape[1:]
        if tuple(values.shape[values.ndim - len(shape) :]) != tuple(shape):
            raise ValueError(f"expected values [..., {', '.join(map(str, shape))}], got {tuple(values.shape)}")
        rows = values.detach().to(self.mean).reshape(-1, *shape)
        mean = rows.mean(0)
        self._join(step, float(len(rows)), mean, (rows - mean).square().sum(0))

    def _join(self, step: int, count: float, mean: Tensor, scatter: Tensor) -> None:
        before = float(self.count[step])
        total = before + count
        if total == 0:
            return
        shift = mean - self.mean[step]
        self.scatter[step] += scatter + shift.square() * (before * count / total)
        self.mean[step] += shift * (count / total)
        self.count[step] = total

    def merge(self, other: StepMoments) -> StepMoments:
        """The moments of both together, as a new object; `other` has as many steps and the same shape."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge moments of {tuple(self.mean.shape)} and {tuple(other.mean.shape)}")
        merged = StepMoments.from_tensors(self.tensors())
        for step in range(len(self.count)):
            given = other.mean[step].to(self.mean), other.scatter[step].to(self.mean)
            merged._join(step, float(other.count[step]), *given)
        return merged

    def pooled(self) -> StepMoments:
        """The moments of all steps together, as one step: classes counted as steps give the whole data."""
        whole = StepMoments(1, self.mean.shape[1:], self.mean.device)
        for count, mean, scatter in zip(self.count, self.mean, self.scatter, strict=True):
            whole._join(0, float(count), mean, scatter)
        return whole

    @property
    def within(self) -> Tensor:
        """Variance [*shape] around each step's own mean, pooled over steps (unbiased)."""
        return self.scatter.sum(0) / (self.count.sum() - (self.count > 0).sum()).clamp(min=1)

    @property
    def var(self) -> Tensor:
        """Variance [S, *shape] with denominator N, as published; NaN where nothing was added."""
        return self.scatter / self.count.reshape(-1, *[1] * (self.mean.ndim - 1))

    @property
    def root_mean_square(self) -> Tensor:
        """sqrt(E[value^2]) [S, *shape]."""
        return (self.mean.square() + self.var).sqrt()

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean [S, *shape]."""
        return (self.var / (self.count - 1).clamp(min=0).reshape(-1, *[1] * (self.mean.ndim - 1))).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the three parts, to be saved or sent."""
        return {name: getattr(self, name).clone() for name in ("count", "mean", "scatter")}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> StepMoments:
        """The moments that `tensors` came from."""
        mean = tensors["mean"]
        moments = cls(len(mean), mean.shape[1:], mean.device)
        moments.count, moments.mean, moments.scatter = (tensors[key].clone() for key in ("count", "mean", "scatter"))
        return moments


@dataclass
class EpsilonWatch:
    """A denoiser that remembers, until `drain`, the length of every eps it predicted: [..., B] for each evaluation.

    Below a scaling it sees the network's own eps, above it the corrected one.
    """

    denoiser: Denoiser
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        prediction = self.denoiser(x, u)
        self.seen.append(prediction.eps.detach().double().flatten(-3).norm(dim=-1))
        return prediction

    def drain(self) -> list[Tensor]:
        """The lengths since the last call, in order of evaluation."""
        seen, self.seen = self.seen, []
        return seen


@dataclass
class Norms:
    """Epsilon L2 norms of each step: `moments` of its first evaluation, `corrections` of all later ones (Heun's).

    `latest` are the norms [..., B] of the first evaluations of the latest trajectory, by step.
    """

    watch: EpsilonWatch
    steps: int

    def __post_init__(self):
        self.moments, self.corrections = StepMoments(self.steps), StepMoments(self.steps)
        self.latest: dict[int, Tensor] = {}

    def __call__(self, step: Step) -> None:
        first, *later = self.watch.drain()
        self.latest[step.index] = first
        self.moments.add(step.index, first)
        for norms in later:
            self.corrections.add(step.index, norms)


@dataclass
class StateMoments:
    """Moments of each element of the state that step i leads to, [S, C, H, W]."""

    steps: int
    shape: Sequence[int]

    def __post_init__(self):
        self.moments = StepMoments(self.steps, self.shape)

    def __call__(self, step: Step) -> None:
        self.moments.add(step.index, step.x_next)


@dataclass
class Residuals:
    """Moments of r = x_s - alpha_s x_0, x_0 [B, C, H, W] the images that seeded x_T; call `follow` for each batch."""

    schedule: Schedule
    steps: int
    shape: Sequence[int]

    def __post_init__(self):
        self.moments, self.data = StepMoments(self.steps, self.shape), StepMoments(1, self.shape)
        self.x0: Tensor | None = None

    def follow(self, x0: Tensor) -> None:
        """The clean images of the batch that is sampled next."""
        self.x0 = x0
        self.data.add(0, x0)

    def __call__(self, step: Step) -> None:
        if self.x0 is None:
            raise ValueError("call follow(x0) with the images that x_T came from, before observing the sampler")
        self.moments.add(step.index, step.x_next - step.transition.alpha.to(step.x_next) * self.x0)


@torch.no_grad()
def observe(steps: Iterable[Step], *observers: Observer) -> Tensor:
    """Show every step (at least one) to every observer, without gradients; return the last state [..., B, C, H, W]."""
    last = None
    for last in steps:
        for observer in observers:
            observer(last)
    if last is None:
        raise ValueError("the sampler made no step")
    return last.x_next


def each_step(
    sampler: Callable[..., Iterator[Step]],
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Tensor,
    times: Tensor,
    noise: Noise,
) -> Iterator[Step]:
    """The sampler's step from a true x_u at every time of the times, as training shows them.

    Args:
        x0: clean images [B, C, H, W].
        noise: `noise(index, shape)`; what noises x_0 is drawn apart from what the step draws.
    """
    for index in range(len(times) - 1):
        x = schedule.noised(x0, noise(-2 - index, x0.shape).to(x0), float(times[index]))
        yield next(iter(sampler(denoiser, schedule, x, times, noise=noise, start=index)))


@dataclass(frozen=True)
class Delta:
    """delta_t [S] after each step, with its floor and what exceeds it; `times` are those that the steps lead to."""

    times: Tensor
    delta: Tensor
    floor: Tensor

    @property
    def excess(self) -> Tensor:
        return self.delta - self.floor


def delta(schedule: Schedule, times: Tensor, residuals: StepMoments, data_var: Tensor) -> Delta:
    """Exposure bias delta_t = (s - sigma_t)^2, s the standard deviation of x_t - alpha_t x_0, averaged over elements.

    A perfect sampler does not reach 0: its x_t has forgotten the x_0 that seeded x_T, so that an element's variance is
    sigma_t^2 + 2 alpha_t^2 Var(x_0). That is the floor. It neglects what x_T still knows of x_0 (alpha at the first
    time over sigma), which lowers delta_t.

    Args:
        times: [S + 1]; residuals: of `Residuals`, [S, C, H, W]; data_var: variance [C, H, W] of the clean images; of a
            model that is conditioned on each x_0's class, the variance within classes (`StepMoments.within`).
    """
    each_time = times[1:]
    if len(residuals.count) != len(each_time):
        raise ValueError(
            f"residuals of {len(residuals.count)} steps on {len(each_time)} times: both must be of one sampler"
        )
    sigma, alpha = schedule.sigma(each_time), schedule.alpha(each_time)
    ideal = sigma[:, None] ** 2 + 2 * alpha[:, None] ** 2 * data_var.double().cpu().flatten()
    measured = residuals.var.cpu().flatten(1).sqrt().mean(1)
    return Delta(each_time, (measured - sigma) ** 2, (ideal.sqrt().mean(1) - sigma) ** 2)


def state_distance(schedule: Schedule, times: Tensor, states: StepMoments, data: StepMoments) -> Tensor:
    """Mean over elements of the squared 2-Wasserstein distance of x_t in sampling from the true x_t, [S].

    Each element as a Gaussian: (difference of means)^2 + (difference of standard deviations)^2, where the true x_t
    has mean alpha E[x_0] and variance alpha^2 Var(x_0) + sigma^2. No floor but the noise of the number of images.

    Args:
        states: of `StateMoments`, [S, C, H, W]; data: of the clean images, [1, C, H, W].
    """
    sigma, alpha = (value.reshape(-1, 1, 1, 1) for value in (schedule.sigma(times[1:]), schedule.alpha(times[1:])))
    mean, std = alpha * data.mean.cpu(), (alpha**2 * data.var.cpu() + sigma**2).sqrt()
    return ((states.mean.cpu() - mean) ** 2 + (states.var.cpu().sqrt() - std) ** 2).flatten(1).mean(1)
