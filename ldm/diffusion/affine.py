"""Further affine schedules of flow matching: data at u = 0, pure noise at u = 1; u = 1 - t of flow_matching's.

    here               flow_matching               alpha           sigma
    FlowSchedule           CondOTScheduler             1 - u           u
    PolynomialSchedule     PolynomialConvexScheduler   (1 - u)^n       1 - (1 - u)^n
    CosineSchedule         CosineScheduler             cos(pi u / 2)   sin(pi u / 2)
    LinearAlphaSchedule    LinearVPScheduler           1 - u           sqrt(1 - (1 - u)^2)
    LinearVPSchedule       VPScheduler                 (alpha does not reach 0)

Samplers do not depend on which of them a network was trained on: they move along straight lines of
(x / (alpha + sigma), sigma / (alpha + sigma)), which all schedules share.

Source: Lipman et al. 2024 (arXiv 2412.06264).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import AffineSchedule


def _time(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class PolynomialSchedule(AffineSchedule):
    """alpha = (1 - u)^power, sigma = 1 - alpha. For power > 1 the velocity is 0 at u = 1, whatever the data."""

    power: float = 2.0

    def __post_init__(self):
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    def alpha(self, u: Tensor | float) -> Tensor:
        return (1 - _time(u)) ** self.power

    def sigma(self, u: Tensor | float) -> Tensor:
        return 1 - self.alpha(u)

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        rate = self.power * (1 - _time(u)) ** (self.power - 1)
        return -rate, rate

    def time_at(self, ratio: Tensor | float) -> Tensor:
        return 1 - (1 + _time(ratio)) ** (-1 / self.power)


@dataclass(frozen=True)
class CosineSchedule(AffineSchedule):
    """alpha = cos(pi u / 2), sigma = sin(pi u / 2): a quarter of the circle at constant speed."""

    def alpha(self, u: Tensor | float) -> Tensor:
        return torch.cos(_time(u) * (math.pi / 2))

    def sigma(self, u: Tensor | float) -> Tensor:
        return torch.sin(_time(u) * (math.pi / 2))

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(u), math.pi / 2 * self.alpha(u)

    def time_at(self, ratio: Tensor | float) -> Tensor:
        return torch.atan(_time(ratio)) * (2 / math.pi)


@dataclass(frozen=True)
class LinearAlphaSchedule(AffineSchedule):
    """alpha = 1 - u, sigma = sqrt(1 - alpha^2). The velocity is infinite at u = 0: train from a time above 0."""

    def alpha(self, u: Tensor | float) -> Tensor:
        return 1 - _time(u)

    def sigma(self, u: Tensor | float) -> Tensor:
        return (_time(u) * (2 - _time(u))).sqrt()

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(_time(u)), self.alpha(u) / self.sigma(u)

    def time_at(self, ratio: Tensor | float) -> Tensor:
        return 1 - (1 + _time(ratio) ** 2).rsqrt()
