"""The times of a flow moved towards the noise, as diffusers' scheduler has them (Esser et al. 2024, eq. 23)."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_times(steps: int, shift: float = 3.0) -> Tensor:
    """The times of diffusers' FlowMatchEulerDiscreteScheduler as times here, float64 [steps + 1].

    Even times u, moved towards the noise by shift u / (1 + (shift - 1) u), then 0 (Esser et al. 2024, eq. 23; shift 3
    in SD3). Even times run from 1 to the shifted 1/1000.

    Raises:
        ValueError: for fewer steps than one, or a shift that is not above 0.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got {steps} and {shift}")
    # The scheduler shifts its last time, which is shifted already, once more.
    lowest = float(_shifted(torch.tensor(1e-3, dtype=torch.float64), shift))
    even = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat([_shifted(even, shift), torch.zeros(1, dtype=torch.float64)])


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)
