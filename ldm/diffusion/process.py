"""Noising in training: which times are drawn, how much data and noise they mean, what time the network takes.

A time `t` [B] has one of two kinds. A `TableProcess` counts the entries of a table of betas from 0 (latent-diffusion,
ADM). A `ContinuousProcess` takes the times u of its schedule as they are, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, VPSchedule, make_betas
from ldm.diffusion.training_times import TrainingTimes


@dataclass(frozen=True)
class BetaSchedule:
    """A table of betas as latent-diffusion's configs describe it.

    Args:
        given: the betas themselves [T]; where they are given, only `unit_time` and `first_time` act beside them.
        name: linear, sqrt_linear, sqrt or cosine, see `make_betas`.
        timesteps: T, the number of entries.
        linear_start, linear_end: the first and the last beta of all names but cosine.
        cosine_s: the offset of the cosine table.
        unit_time: the network takes (t + 1) / T (DDAE) in place of t.
        first_time: what the network takes as time at the first entry, t = 0: 0 (LDM, ADM), or 1 (U-ViT).
    """

    given: Sequence[float] | None = None
    name: str = "linear"
    timesteps: int = 1000
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    cosine_s: float = 8e-3
    unit_time: bool = False
    first_time: int = 0

    def build(self) -> VPSchedule:
        """Compute the table, whatever torch's default device is.

        Raises:
            ValueError: for an unknown name.
        """
        with torch.device("cpu"):
            if self.given is not None:
                betas = torch.as_tensor(self.given, dtype=torch.float64)
            else:
                betas = make_betas(self.name, self.timesteps, self.linear_start, self.linear_end, self.cosine_s)
            return VPSchedule(betas, self.unit_time, self.first_time)


class NoiseProcess(ABC):
    """x_t = alpha(t) x_0 + sigma(t) noise at the times of training, and what a network takes as time."""

    schedule: Schedule

    @property
    @abstractmethod
    def timesteps(self) -> int | None:
        """The number of entries that t counts; None where time is continuous."""

    @property
    @abstractmethod
    def cleanest(self) -> float:
        """The t of the cleanest state whose time a network can take."""

    @abstractmethod
    def training_times(self, draws: Tensor) -> Tensor:
        """Turn draws of `TrainingDraws`, of any shape, into the times t that they stand for."""

    @abstractmethod
    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma [B, 1, 1, 1] at times t [B], to multiply states `like` [B, C, H, W]."""

    @abstractmethod
    def network_time(self, t: Tensor, like: Tensor) -> Tensor:
        """Return what the network takes as time [B] at times t [B], where its states are `like` [B, C, H, W]."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = alpha x_0 + sigma noise [B, C, H, W] at times t [B]."""
        alpha, sigma = self.levels(t, x_start)
        return alpha * x_start + sigma * noise


@dataclass(frozen=True)
class TableProcess(NoiseProcess):
    """Noising at the entries of a table of betas.

    Args:
        schedule: the table, in float64.
        alphas: sqrt(alpha-bar) of each entry [T], on the device and in the precision of training.
        sigmas: sqrt(1 - alpha-bar) of each entry [T], likewise.
    """

    schedule: VPSchedule
    alphas: Tensor
    sigmas: Tensor

    @property
    def timesteps(self) -> int | None:
        return self.schedule.end

    @property
    def cleanest(self) -> float:
        return 0.0

    def training_times(self, draws: Tensor) -> Tensor:
        """The draws themselves, which are entries of the table."""
        return draws

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t].reshape(-1, 1, 1, 1), self.sigmas[t].reshape(-1, 1, 1, 1)

    def network_time(self, t: Tensor, like: Tensor) -> Tensor:
        return (t + 1) / self.schedule.end if self.schedule.unit_time else t + self.schedule.first_time


@dataclass(frozen=True)
class ContinuousProcess(NoiseProcess):
    """Noising at the times u of a continuous schedule.

    Args:
        schedule: `FlowSchedule`, `EDMSchedule` or another of `ldm.diffusion.schedule`.
        times: the law of the training times, a quantile function of `ldm.diffusion.training_times`.
    """

    schedule: Schedule
    times: TrainingTimes

    @property
    def timesteps(self) -> int | None:
        return None

    @property
    def cleanest(self) -> float:
        return self.schedule.cleanest

    def training_times(self, draws: Tensor) -> Tensor:
        """Quantiles [...] of the law of times, for uniform draws [...] in [0, 1)."""
        return self.times(draws, self.schedule)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.coefficients(t, like)

    def network_time(self, t: Tensor, like: Tensor) -> Tensor:
        return self.schedule.time_to_net(t).to(like)
