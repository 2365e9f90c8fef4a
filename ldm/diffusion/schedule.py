"""Schedules: how much data and how much noise a state holds, x_u = alpha(u) x_0 + sigma(u) eps, and the time grids.

Time u is real, 0 = clean .. `schedule.end` = noise. `time_to_net(u)` gives what a network was trained with. Every
table is
float64 and serves training and sampling alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.modules.diffusionmodules.tables import make_betas as make_betas


class Schedule(ABC):
    """alpha(u), sigma(u) and the conversions of time; all take and return float64 tensors of any shape.

    `field` names what is constant along a straight line of the schedule, hence what solvers with several evaluations a
    step combine: "eps" in the variables (x / alpha, sigma / alpha), or "velocity" = eps - x_0 where alpha reaches 0.
    """

    end: float
    field = "eps"

    @property
    def prior_std(self) -> float:
        """Standard deviation of the states that sampling starts from."""
        return 1.0

    @property
    def cleanest(self) -> float:
        """The least u that a network can be conditioned on: above 0 where its time is the logarithm of the noise."""
        return 0.0

    @abstractmethod
    def alpha(self, u: Tensor | float) -> Tensor:
        """Share of the data in x_u."""

    @abstractmethod
    def sigma(self, u: Tensor | float) -> Tensor:
        """Standard deviation of the noise in x_u."""

    @abstractmethod
    def time_to_net(self, u: Tensor | float) -> Tensor:
        """The time that the network takes as input."""

    @abstractmethod
    def time_at(self, ratio: Tensor | float) -> Tensor:
        """The time u at which sigma(u) / alpha(u) = ratio; a schedule that ends earlier gives its end."""

    def reach(self, ratio: float) -> float:
        """Return the time u at which sigma(u) / alpha(u) = ratio.

        Raises:
            ValueError: where the schedule ends earlier, or begins later.
        """
        u = float(self.time_at(ratio))
        found = float(self.ratio(u))
        if not 0.99 * ratio <= found <= 1.01 * ratio:
            raise ValueError(
                f"noise of {ratio:g} to one of data is beyond the model's schedule, which ends at {found:.3g}"
            )
        return u

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """d alpha / d u and d sigma / d u: the velocity of x_u is alpha' x_0 + sigma' eps.

        Raises:
            NotImplementedError: for a schedule that does not define them.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rates, so no velocity: regress eps, x0 or v on it")

    def ratio(self, u: Tensor | float) -> Tensor:
        """Noise for each unit of data, sigma(u) / alpha(u); infinite where a schedule starts from pure noise."""
        return self.sigma(u) / self.alpha(u)

    def coefficients(self, u: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(u) and sigma(u) in the dtype of `like` [..., B, C, H, W]: scalars, or [B, 1, 1, 1] where u is [B]."""
        alpha, sigma = self.per_image(u)
        return alpha.to(like), sigma.to(like)

    def per_image(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """alpha(u) and sigma(u) in float64, shaped to multiply images: scalars, or [B, 1, 1, 1] where u is [B]."""
        alpha, sigma = self.alpha(u), self.sigma(u)
        shape = (-1, 1, 1, 1) if alpha.ndim else ()
        return alpha.reshape(shape), sigma.reshape(shape)

    def noised(self, x0: Tensor, eps: Tensor, u: Tensor | float) -> Tensor:
        """x_u = alpha(u) x_0 + sigma(u) eps."""
        alpha, sigma = self.coefficients(u, x0)
        return alpha * x0 + sigma * eps


def _vp_rates(log_abar: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Rates of alpha = exp(log_abar / 2) and sigma = sqrt(1 - alpha^2), for the slope of log_abar."""
    return 0.5 * slope * (0.5 * log_abar).exp(), -0.5 * slope * log_abar.exp() / (-torch.expm1(log_abar)).sqrt()


class VPSchedule(Schedule):
    """Variance preserving: alpha^2 + sigma^2 = 1, from a table of betas (DDPM, Ho et al. 2020; LDM, ADM).

    u = 0 is clean data, u = n the n-th entry of the table; between entries log alpha-bar is linear. The network's
    time is u - 1 + `first_time`: u - 1 by default (LDM, ADM), u with 1 (U-ViT); with `unit_time` it is u / T (DDAE).
    """

    end: int

    def __init__(self, betas: Tensor, unit_time: bool = False, first_time: int = 0):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or not bool(((betas >= 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise ValueError(
                "betas must be a vector of values in [0, 1), of which the last may be 1 (pure noise); got shape "
                f"{tuple(betas.shape)}, largest {float(betas.max()):g}"
            )
        self.betas = betas
        self.end = len(betas)
        if unit_time and first_time:
            raise ValueError(
                f"unit_time already says what the network takes as time; leave out first_time {first_time}"
            )
        self.unit_time = unit_time
        self.first_time = first_time
        self.log_abar = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumprod(1 - betas, 0).log()])

    def _log_abar(self, u: Tensor | float) -> Tensor:
        u = torch.as_tensor(u, dtype=torch.float64).cpu()
        if bool(((u < 0) | (u > self.end)).any()):
            raise ValueError(f"time must lie in [0, {self.end}], got {u.min():.4g} .. {u.max():.4g}")
        below = u.floor().clamp(max=self.end - 1)
        index = below.long()
        left, right = self.log_abar[index], self.log_abar[index + 1]
        return torch.where(u == below, left, left + (u - below) * (right - left))

    def alpha(self, u: Tensor | float) -> Tensor:
        return (0.5 * self._log_abar(u)).exp()

    def sigma(self, u: Tensor | float) -> Tensor:
        return (-torch.expm1(self._log_abar(u))).sqrt()

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """Inside an interval of the table, where log alpha-bar is linear; at an entry those of the interval above."""
        below = torch.as_tensor(u, dtype=torch.float64).cpu().floor().clamp(max=self.end - 1).long()
        return _vp_rates(self._log_abar(u), self.log_abar[below + 1] - self.log_abar[below])

    def time_to_net(self, u: Tensor | float) -> Tensor:
        u = torch.as_tensor(u, dtype=torch.float64)
        return u / self.end if self.unit_time else u - 1 + self.first_time

    def time_at(self, ratio: Tensor | float) -> Tensor:
        wanted = -torch.log1p(torch.as_tensor(ratio, dtype=torch.float64).cpu() ** 2)
        descending = self.log_abar
        above = torch.searchsorted(-descending, -wanted).clamp(1, len(descending) - 1)
        left, right = descending[above - 1], descending[above]
        share = ((wanted - left) / (right - left)).nan_to_num(0.0)
        return (above - 1 + share).clamp(0, self.end)


@dataclass(frozen=True)
class LinearVPSchedule(Schedule):
    """Variance preserving in continuous time u in [0, 1], with a rate of noise linear in u (Song et al. 2021b, eq. 32).

    log alpha = -(beta_min u + (beta_max - beta_min) u^2 / 2) / 2. The network's time is `time_scale` u.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 999.0
    end: float = 1.0

    def _log_abar(self, u: Tensor | float) -> Tensor:
        u = torch.as_tensor(u, dtype=torch.float64)
        return -(self.beta_min * u + 0.5 * (self.beta_max - self.beta_min) * u**2)

    def alpha(self, u: Tensor | float) -> Tensor:
        return (0.5 * self._log_abar(u)).exp()

    def sigma(self, u: Tensor | float) -> Tensor:
        return (-torch.expm1(self._log_abar(u))).sqrt()

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        u = torch.as_tensor(u, dtype=torch.float64)
        return _vp_rates(self._log_abar(u), -(self.beta_min + (self.beta_max - self.beta_min) * u))

    def time_to_net(self, u: Tensor | float) -> Tensor:
        return self.time_scale * torch.as_tensor(u, dtype=torch.float64)

    def time_at(self, ratio: Tensor | float) -> Tensor:
        drop = torch.log1p(torch.as_tensor(ratio, dtype=torch.float64) ** 2)
        slope = self.beta_max - self.beta_min
        u = 2 * drop / (self.beta_min + (self.beta_min**2 + 2 * slope * drop).sqrt())
        return torch.where(drop.isinf(), self.end, u).clamp(max=self.end)


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """Variance exploding with u = sigma: x = x_0 + u eps (Karras et al. 2022); the network's time is ln(u) / 4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def end(self) -> float:  # type: ignore[override]  # derived from sigma_max here, a value of its own elsewhere
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def cleanest(self) -> float:
        return float(self.time_at(self.sigma_min))

    def alpha(self, u: Tensor | float) -> Tensor:
        return torch.ones_like(torch.as_tensor(u, dtype=torch.float64))

    def sigma(self, u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64)

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        u = torch.as_tensor(u, dtype=torch.float64)
        return torch.zeros_like(u), torch.ones_like(u)

    def time_to_net(self, u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64).log() / 4

    def time_at(self, ratio: Tensor | float) -> Tensor:
        """The ratio itself, beyond the end too; the end where there is no data."""
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        return torch.where(ratio.isinf(), self.sigma_max, ratio)


@dataclass(frozen=True)
class VESchedule(EDMSchedule):
    """Variance exploding, u = sigma^2 (SMLD in Song et al. 2021b); the network's time is ln(sigma / 2)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def end(self) -> float:  # type: ignore[override]  # derived from sigma_max here, a value of its own elsewhere
        return self.sigma_max**2

    def sigma(self, u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64).sqrt()

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(u)
        return torch.zeros_like(sigma), 0.5 / sigma

    def time_to_net(self, u: Tensor | float) -> Tensor:
        return (self.sigma(u) / 2).log()

    def time_at(self, ratio: Tensor | float) -> Tensor:
        return super().time_at(ratio) ** 2


@dataclass(frozen=True)
class AffineSchedule(Schedule):
    """A schedule from data at u = 0 to pure noise at u = 1, alpha(1) = 0, as flow matching trains on.

    The network's time is `time_scale` u, or `time_scale` (1 - u) with `reversed_time`, where a flow counts from noise
    (flow_matching's users). Sinusoidal embeddings made for 0 .. 1000 want a scale of 1000 (diffusers).
    """

    reversed_time: bool = False
    time_scale: float = 1.0
    end: float = 1.0
    field = "velocity"

    def time_to_net(self, u: Tensor | float) -> Tensor:
        u = torch.as_tensor(u, dtype=torch.float64)
        return self.time_scale * (1 - u if self.reversed_time else u)


@dataclass(frozen=True)
class FlowSchedule(AffineSchedule):
    """Straight schedule x = (1 - u) x_0 + u eps (rectified flow; flow_matching's CondOT). More of them: `affine`.

    `shift` moves the times of sampling towards the noise (Esser et al. 2024, eq. 23; 3 in SD3), see `shifted_times`.
    """

    shift: float = 1.0

    def alpha(self, u: Tensor | float) -> Tensor:
        return 1 - torch.as_tensor(u, dtype=torch.float64)

    def sigma(self, u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64)

    def rates(self, u: Tensor | float) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(torch.as_tensor(u, dtype=torch.float64))
        return -one, one

    def time_at(self, ratio: Tensor | float) -> Tensor:
        return 1 - 1 / (1 + torch.as_tensor(ratio, dtype=torch.float64))
