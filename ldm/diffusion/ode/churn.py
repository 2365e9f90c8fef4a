"""Churn: noise that raises the noise level of a state before a deterministic step (Karras et al. 2022, alg. 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise

# The greatest share by which churn raises a noise level.
GREATEST = math.sqrt(2) - 1


@dataclass(frozen=True)
class Churn:
    """How much noise is added before a step, and where; r = sigma / alpha is the noise level.

    Args:
        rate: gamma, from r to (1 + gamma) r.
        least, most: the levels r between which it acts.
        scale: standard deviation of its draws.
    """

    rate: float
    least: float
    most: float
    scale: float

    def add(self, schedule: Schedule, index: int, x: Tensor, u: float, noise: Noise | None) -> tuple[Tensor, float]:
        """Return the state [..., B, C, H, W] and the time that step `index` begins with.

        They are as given where the rate is 0, the level lies outside its bounds, or no data is left in x.

        Raises:
            ValueError: if noise is to be drawn and none was given.
        """
        ratio = schedule.ratio(u)
        level = float(ratio)
        if not (self.rate > 0 and self.least <= level <= self.most and math.isfinite(level)):
            return x, u
        if noise is None:
            raise ValueError("churn draws noise: pass noise=ImageNoise(seed, images), or S_churn = 0")
        later = schedule.time_at(ratio * (1 + self.rate))
        added = (schedule.ratio(later) ** 2 - ratio**2).clamp(min=0).sqrt()
        kept = (schedule.alpha(later) / schedule.alpha(u)).to(x)
        width = (schedule.alpha(later) * added * self.scale).to(x)
        return kept * x + width * noise(index, x.shape).to(x), float(later)


def make_churn(steps: int, S_churn: float, S_min: float, S_max: float, S_noise: float, eta: float = 0.0) -> Churn:
    """Make the churn of a sampler of so many steps, gamma = min(S_churn / steps, sqrt(2) - 1).

    Args:
        eta: in place of S_churn, the share of the greatest gamma, which does not depend on the steps (DDAE).

    Raises:
        ValueError: for amounts below 0, an eta above 1, or both S_churn and eta.
    """
    if S_churn < 0 or not 0 <= eta <= 1:
        raise ValueError(f"expected S_churn of at least 0 and eta from 0 to 1, got {S_churn} and {eta}")
    if S_churn and eta:
        raise ValueError(f"give S_churn or eta, which is a share of its greatest; got {S_churn} and {eta}")
    rate = eta * GREATEST if eta else min(S_churn / steps, GREATEST)
    return Churn(rate, S_min, S_max, S_noise)
