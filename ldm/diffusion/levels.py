"""Noise levels sigma / alpha of a sampler's steps by the names of k-diffusion: float64 [S], descending.

    karras           (max^(1/rho) + i / (S - 1) (min^(1/rho) - max^(1/rho)))^rho           rho = 7
    exponential      evenly spaced in log(sigma / alpha)
    polyexponential  the same with (1 - i / (S - 1))^rho in place of 1 - i / (S - 1)       rho = 1
    vp               sqrt(exp(19.9 t^2 / 2 + 0.1 t) - 1), t evenly spaced from 1 to 0.001

Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5; Song et al. 2021b for vp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.schedule import EDMSchedule, Schedule, VPSchedule

LEVEL_SPACINGS = ("karras", "exponential", "polyexponential", "vp", "logsnr")
RHO = {"karras": 7.0, "polyexponential": 1.0}
# Levels of a flow, which begins at pure noise: those of EDM.
FLOW_LEVELS = (0.002, 80.0)
# A level from which on a state is pure noise: rounding leaves 1.6e16 at the end of a cosine.
PURE_NOISE = 1e8
# How far beyond a table a level may lie to be taken for its end: published levels are rounded, 0.0292 to 14.6146.
ROUNDED = 0.01


def _falling(steps: int) -> Tensor:
    """1 - i / (S - 1), from 1 to 0; of a single step 1."""
    return torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)


def karras_levels(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Levels evenly spaced in their 1 / rho-th power, from `high` to `low`."""
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return (top + (1 - _falling(steps)) * (bottom - top)) ** rho


def polyexponential_levels(steps: int, low: float, high: float, rho: float = 1.0) -> Tensor:
    """Levels whose logarithm falls as the rho-th power of what is left of the way; rho = 1 is `exponential`."""
    return (math.log(low) + _falling(steps) ** rho * (math.log(high) - math.log(low))).exp()


def vp_levels(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3) -> Tensor:
    """Levels of a variance preserving process with beta linear in time, at even times from 1 to eps_s."""
    t = eps_s + _falling(steps) * (1 - eps_s)
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def spaced_levels(spacing: str, steps: int, low: float, high: float, rho: float | None = None) -> Tensor:
    """Return the levels [S] of a spacing but vp; of logsnr [S + 1].

    Raises:
        ValueError: for a rho that is not above 0, or that the spacing does not have.
    """
    if rho is not None and spacing not in RHO:
        raise ValueError(f"rho belongs to the spacings {' and '.join(RHO)}, not to {spacing}")
    if rho is not None and rho <= 0:
        raise ValueError(f"rho must be above 0, got {rho:g}")
    power = RHO.get(spacing, 1.0) if rho is None else rho
    if spacing == "karras":
        return karras_levels(steps, low, high, power)
    return polyexponential_levels(steps + (spacing == "logsnr"), low, high, power)


def level_range(schedule: Schedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """Return the lowest and the highest level of a sampler's times; what is None is the schedule's.

    A table has the levels of its first entry and of the last that holds any data, EDM's schedule names its own, a flow
    takes EDM's, and another schedule has those at a thousandth of its time and at its end.

    Raises:
        ValueError: for levels that a table does not have, or that do not ascend from above 0.
    """
    lowest, highest = _own_range(schedule)
    low = lowest if sigma_min is None else sigma_min
    high = highest if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    if isinstance(schedule, VPSchedule):
        if low < lowest * (1 - ROUNDED) or high > highest * (1 + ROUNDED):
            raise ValueError(
                f"sigma_min and sigma_max must lie in the levels {lowest:g} .. {highest:g} of this table of betas, "
                f"got {low:g} and {high:g}"
            )
        return max(low, lowest), min(high, highest)
    return low, high


def _own_range(schedule: Schedule) -> tuple[float, float]:
    if isinstance(schedule, VPSchedule):
        last = float(schedule.ratio(schedule.end))
        return float(schedule.ratio(1)), last if math.isfinite(last) else float(schedule.ratio(schedule.end - 1))
    if isinstance(schedule, EDMSchedule):
        return schedule.sigma_min, schedule.sigma_max
    highest = float(schedule.ratio(schedule.end))
    if highest >= PURE_NOISE:
        return FLOW_LEVELS
    return float(schedule.ratio(1e-3 * schedule.end)), highest
