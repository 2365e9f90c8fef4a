"""A denoiser of one schedule on the times of another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class TranslatedDenoiser:
    """A denoiser of schedule `own` on another `schedule`: states with equal sigma / alpha differ only by their scale.

    So a VP network can be sampled with EDM's times and solver, and an EDM network at VP times; x_0 and eps
    are the same.
    """

    denoiser: Denoiser
    own: Schedule
    schedule: Schedule

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        u = torch.as_tensor(u, dtype=torch.float64)
        own = self.own.time_at(self.schedule.ratio(u))
        size, own_size = torch.hypot(*self.schedule.coefficients(u, x)), torch.hypot(*self.own.coefficients(own, x))
        return self.denoiser(x * (own_size / size), own)
