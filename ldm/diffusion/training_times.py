"""The times at which a continuous schedule is trained, as quantile functions: a uniform draw in, a time out.

`times(uniform, schedule) -> u`. So a time belongs to the generator of its sample, as every draw of training does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

TrainingTimes = Callable[[Tensor, Schedule], Tensor]


@dataclass(frozen=True)
class UniformTimes:
    """u uniform between two shares of the schedule: (first + (last - first) p) end.

    Args:
        first, last: shares of the schedule's end in [0, 1]; Song et al. 2021b train from first = 1e-5.
    """

    first: float = 0.0
    last: float = 1.0

    def __post_init__(self):
        if not 0 <= self.first < self.last <= 1:
            raise ValueError(f"times lie between two shares 0 <= first < last <= 1, got {self.first} and {self.last}")

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Times [B] in float64 for uniform draws [B] in [0, 1)."""
        return (self.first + (self.last - self.first) * uniform.double()) * schedule.end


@dataclass(frozen=True)
class LogNormalNoise:
    """ln(sigma / alpha), the noise for each unit of data, normal with mean `P_mean` and deviation `P_std`.

    On the EDM schedule this is Karras et al. 2022, table 1; on a straight schedule the logit of u is normal: (0, 1)
    is Esser et
    al. 2024, section 3.1, and (-1.2, 1.2) the skewed times of the flow matching guide (Lipman et al. 2024).
    """

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self):
        if not self.P_std > 0:
            raise ValueError(f"P_std is the standard deviation of ln(sigma / alpha): expected > 0, got {self.P_std}")

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Times [B] in float64 for uniform draws [B] in [0, 1)."""
        # Half a step of the draws' lattice away from 0, where the logarithm would be infinite.
        normal = torch.special.ndtri(uniform.double().clamp(min=2.0**-54))
        return schedule.time_at((self.P_mean + self.P_std * normal).exp())
