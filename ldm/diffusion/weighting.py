"""Weights of the loss per noise level, each the same loss whatever the network regresses.

A weight is said of the error of eps, in snr = alpha^2 / sigma^2. Of the same state, the errors are proportional to one
another: that of a target a eps + b x_0 is (a alpha - b sigma) / alpha times that of eps, so that

    w_target = w_eps (alpha / (a alpha - b sigma))^2          w_x0 = w_eps snr,    w_v = w_eps snr / (snr + 1)

`LOSS_WEIGHTS` names them all. The law of the times is the config's: a weight multiplies the errors at the times that
are drawn, and no weight divides by their density.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.arguments import check_arguments, check_value, suggest_key
from ldm.diffusion.denoiser import Target
from ldm.diffusion.process import NoiseProcess, TableProcess
from ldm.ranges import POSITIVE, check_range
from ldm.util import generator

# Levels beyond are weighted as these: at clean data and at pure noise a weight of one of the targets is infinite.
LOWEST_RATIO, HIGHEST_RATIO = 1e-5, 1e5


class LossWeight(ABC):
    """A weight w(t) of the squared error of what a network regresses."""

    @abstractmethod
    def at(self, snr: Tensor) -> Tensor:
        """Return the weight [B] of the squared error of eps at signal-to-noise ratios alpha^2 / sigma^2 [B]."""

    def of_noise(self, process: NoiseProcess, t: Tensor, like: Tensor) -> Tensor:
        """Return the weight [B], float64, of the squared error of eps at times t [B] of states `like`."""
        alpha, sigma = find_levels(process, t, like)
        return self.at((alpha / sigma) ** 2)

    def of_target(self, process: NoiseProcess, target: Target, t: Tensor, like: Tensor) -> Tensor:
        """Return the weight [B], float64, of the squared error of a target; see `of_noise`."""
        alpha, sigma = find_levels(process, t, like)
        a, b, _ = target.coefficients(alpha, sigma)
        return self.of_noise(process, t, like) * (alpha / (a * alpha - b * sigma)) ** 2

    def weigh(self, error: Tensor, process: NoiseProcess, target: Target, t: Tensor, like: Tensor) -> Tensor:
        """Return the loss [B] of the mean squared errors [B] of a target at times t [B] of states `like`."""
        return self.of_target(process, target, t, like).to(error) * error


def find_levels(process: NoiseProcess, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma [B], float64, kept away from clean data and from pure noise."""
    alpha, sigma = (level.double().flatten() for level in process.levels(t, like))
    return torch.maximum(alpha, sigma / HIGHEST_RATIO), torch.maximum(sigma, alpha * LOWEST_RATIO)


@dataclass(frozen=True)
class SimpleWeight(LossWeight):
    """1 on eps: the loss L_simple (Ho et al. 2020, eq. 14)."""

    def at(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


@dataclass(frozen=True)
class BoundWeight(LossWeight):
    """(snr_{t-1} / snr_t - 1) / 2 on eps: a term of the variational bound (Ho et al. 2020, eq. 12; Kingma et al. 2021).

    It is the divergence in nats of the step from entry t of a table of betas, under the posterior variance. Entry 0,
    where that variance vanishes, takes the weight of entry 1.
    """

    def at(self, snr: Tensor) -> Tensor:
        raise TypeError("the weight of the bound is that of a step, not of a level")

    def of_noise(self, process: NoiseProcess, t: Tensor, like: Tensor) -> Tensor:
        if not isinstance(process, TableProcess) or process.schedule.end < 2:
            raise TypeError("the weight of the bound is that of the steps of a table of betas, of at least two")
        drop = process.schedule.log_abar
        snr = torch.exp(drop) / -torch.expm1(drop)  # infinite at clean data, entry 0 of these
        return (0.5 * (snr[1:-1] / snr[2:] - 1)).to(t.device)[(t - 1).clamp(min=0)]


@dataclass(frozen=True)
class MinSNRWeight(LossWeight):
    """min(snr, gamma) on x_0, which is min(snr, gamma) / snr on eps (Hang et al. 2023, section 3.4).

    Args:
        gamma: the published value is 5.
    """

    gamma: float = 5.0

    def at(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma) / snr


@dataclass(frozen=True)
class SoftMinSNRWeight(LossWeight):
    """snr gamma / (snr + gamma) on x_0: a smooth min(snr, gamma) (Crowson et al. 2024; k-diffusion).

    Args:
        gamma: k-diffusion's is 1 / sigma_data^2, 4 of its sigma_data 0.5.
    """

    gamma: float = 4.0

    def at(self, snr: Tensor) -> Tensor:
        return self.gamma / (snr + self.gamma)


@dataclass(frozen=True)
class P2Weight(LossWeight):
    """1 / (k + snr)^gamma on eps: less on the levels where only details are left (Choi et al. 2022, eq. 8).

    Args:
        gamma: 0.5 or 1 in the paper; 0 is `simple`.
        k: 1 in the paper.
    """

    gamma: float = 1.0
    k: float = 1.0

    def at(self, snr: Tensor) -> Tensor:
        return (self.k + snr) ** -self.gamma


@dataclass(frozen=True)
class EDMWeight(LossWeight):
    """snr + 1 / sigma_data^2 on x_0, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1).

    It is 1 on what a network of the parameterization edm regresses.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def at(self, snr: Tensor) -> Tensor:
        return 1 + 1 / (snr * self.sigma_data**2)


@dataclass(frozen=True)
class SigmoidWeight(LossWeight):
    """sigmoid(bias - ln snr) on eps (Kingma and Gao 2023, section 4; Hoogeboom et al. 2024).

    Args:
        bias: the larger, the more weight has the cleaner half. The papers take 2 and less, and multiply by the rate of
            ln snr in time besides, which belongs to the law of times here.
    """

    bias: float = 0.0

    def at(self, snr: Tensor) -> Tensor:
        return torch.sigmoid(self.bias - snr.log())


class LearnedWeight(nn.Module):
    """w(t) error / exp(u) + u, u(ln(sigma / alpha)) being a learned log variance (Karras et al. 2024, eq. 21).

    At its minimum u is the logarithm of the weighted error, so that every level has the same share of the loss:
    uncertainty weighting of one task per level (Kendall et al. 2018). u is a linear function of cosines
    sqrt(2) cos(2 pi (f c + p)) of c = ln(sigma / alpha) / 4 with fixed f and p, and begins at 0, where this is `base`.

    Args:
        base: the weight w(t).
        channels: number of cosines.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, base: LossWeight, channels: int = 128):
        super().__init__()
        self.base = base
        draws = generator("loss weight", channels)
        self.register_buffer("frequencies", torch.randn(channels, generator=draws))
        self.register_buffer("phases", torch.rand(channels, generator=draws))
        self.logvar = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.logvar.weight)

    def log_variance(self, process: NoiseProcess, t: Tensor, like: Tensor) -> Tensor:
        """Return u [B] at times t [B] of states `like`."""
        alpha, sigma = find_levels(process, t, like)
        level = ((sigma / alpha).log() / 4).to(self.phases)
        features = torch.cos(2 * math.pi * (level[:, None] * self.frequencies + self.phases))  # [B, channels]
        return self.logvar(math.sqrt(2) * features)[:, 0]

    def weigh(self, error: Tensor, process: NoiseProcess, target: Target, t: Tensor, like: Tensor) -> Tensor:
        """Return the loss [B] of the mean squared errors [B] of a target at times t [B] of states `like`."""
        logvar = self.log_variance(process, t, like).to(error)
        return self.base.weigh(error, process, target, t, like) / logvar.exp() + logvar


Weighting = LossWeight | LearnedWeight
LOSS_WEIGHTS: dict[str, Callable[..., LossWeight]] = {
    "simple": SimpleWeight,
    "vlb": BoundWeight,
    "min_snr": MinSNRWeight,
    "soft_min_snr": SoftMinSNRWeight,
    "p2": P2Weight,
    "edm": EDMWeight,
    "sigmoid": SigmoidWeight,
}
LEARNED = "learned"
RANGES = {"gamma": POSITIVE, "k": POSITIVE, "sigma_data": POSITIVE}


def make_loss_weight(config: str | Mapping[str, Any] | None, place: str = "loss_weight") -> Weighting | None:
    """Make the weight that a config names; None: the mean error of what the network regresses, as it is.

    Args:
        config: a name of `LOSS_WEIGHTS`, or `{name: min_snr, gamma: 5}`; `learned` takes `base`, a weight of these
            (edm), and `channels`.
        place: what a message begins with.

    Raises:
        ValueError: for a name or an argument that does not exist, or a value out of its range.
    """
    if config is None:
        return None
    check_value(config, str | Mapping[str, Any], place)
    options = {"name": config} if isinstance(config, str) else dict(config)
    known = [*LOSS_WEIGHTS, LEARNED]
    name = options.pop("name", None)
    if name not in known:
        needs = "needs a name" if name is None else f"is unknown: '{name}'"
        raise ValueError(f"{place} {needs}; {suggest_key(str(name), known)}")
    if name == LEARNED:
        base = make_loss_weight(options.pop("base", "edm"), f"{place}.base")
        if not isinstance(base, LossWeight):
            raise ValueError(f"{place}.base is a weight that is not learned itself: one of {', '.join(LOSS_WEIGHTS)}")
        check_arguments(LearnedWeight, {"base": base, **options}, place)
        return LearnedWeight(base, **options)
    check_arguments(LOSS_WEIGHTS[name], options, place)
    for key, value in options.items():
        check_range(key, value, RANGES, f"{place}.{key}")
    return LOSS_WEIGHTS[name](**options)
