"""Time grids: float64 tensors [S + 1] of descending u, whose last entry is where the sampler stops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ldm.diffusion.schedule import EDMSchedule, Schedule, VPSchedule

SPACINGS = ("auto", "trailing", "published", "quad", "respace")


def _check_steps(steps: int, largest: int) -> None:
    if not isinstance(steps, int) or not 1 <= steps <= largest:
        raise ValueError(f"number of steps must be a whole number from 1 to {largest}, got {steps!r}")


def default_spacing(steps: int, end: int) -> str:
    """`published` where CompVis' grid has exactly `steps` steps and does not stop short, else `trailing`."""
    return "published" if 2 <= steps <= end // 2 and end % steps == 0 else "trailing"


def vp_times(schedule: VPSchedule, steps: int | str, spacing: str = "auto") -> Tensor:
    """Whole-numbered times for a table of betas.

    trailing: T = u_0 > .. > u_S = 0, evenly spaced and rounded (Lin et al. 2024): exactly S steps for any S.
    published: latent-diffusion's range(0, T, T // S) + 1 as network times; ends at u = 1 (alpha-bar_0) and may have
        more steps than asked for (S = 30 gives 31).
    quad: latent-diffusion's quadratic times, (linspace(0, sqrt(0.8 T), S))^2 + 1 as network times, ends at u = 1; times
        that it repeats from about S = 29 on are steps that go nowhere, and are left out.
    respace: ADM's timestep_respacing "S", both ends of the table included.
    auto: see `default_spacing`. A string as `steps` is a respacing of ADM: "20", "ddim20" or sections "10,10,5".

    Raises:
        ValueError: if the number of steps is not in 1..T, or the spacing is unknown.
    """
    if isinstance(steps, str):
        return respaced_times(schedule, steps)
    _check_steps(steps, schedule.end)
    if spacing == "respace":
        return respaced_times(schedule, str(steps))
    if spacing == "auto":
        spacing = default_spacing(steps, schedule.end)
    if spacing == "trailing":
        return (schedule.end * (steps - torch.arange(steps + 1, dtype=torch.float64)) / steps).round()
    if spacing == "published":
        times = torch.arange(0, schedule.end, schedule.end // steps, dtype=torch.float64) + 1
    elif spacing == "quad":
        times = torch.linspace(0, (0.8 * schedule.end) ** 0.5, steps, dtype=torch.float64).square().floor() + 1
    else:
        raise ValueError(f"spacing must be one of {SPACINGS}, got '{spacing}'")
    ascending = torch.cat([torch.ones(1, dtype=torch.float64), times.clamp(max=schedule.end - 1) + 1])
    return ascending.unique().flip(0)


def respaced_times(schedule: VPSchedule, respacing: str) -> Tensor:
    """ADM's `timestep_respacing` (Nichol and Dhariwal 2021): section counts, or "ddimN" for one whole stride.

    Within a section of n entries, k kept ones lie a fractional stride (n - 1) / (k - 1) apart, rounded, ends included.

    Raises:
        ValueError: if a section is shorter than its count, or no stride gives exactly N.
    """
    end = schedule.end
    if respacing.startswith("ddim"):
        wanted = int(respacing[4:])
        whole = next((i for i in range(1, end) if len(range(0, end, i)) == wanted), None)
        if whole is None:
            raise ValueError(
                f"no whole stride takes exactly {wanted} of {end} times; use '{wanted}' instead of '{respacing}'"
            )
        kept = list(range(0, end, whole))
    else:
        counts = [int(part) for part in respacing.split(",")]
        kept, first = [], 0
        for section, count in enumerate(counts):
            size = end // len(counts) + (section < end % len(counts))
            if not 1 <= count <= size:
                raise ValueError(
                    f"respacing '{respacing}': cannot keep {count} of the {size} times of section {section}"
                )
            stride = (size - 1) / (count - 1) if count > 1 else 1.0
            # Summed up as published: a product would round some of the places half-way the other way.
            places = itertools.accumulate([0.0] + [stride] * (count - 1))
            kept += [first + round(place) for place in places]
            first += size
    return torch.tensor([*[float(time + 1) for time in reversed(kept)], 0.0], dtype=torch.float64)


def edm_times(schedule: EDMSchedule, steps: int, rho: float = 7.0) -> Tensor:
    """sigma_i = (smax^(1/rho) + i / (S - 1) (smin^(1/rho) - smax^(1/rho)))^rho, then 0 (Karras et al. 2022, eq. 5)."""
    _check_steps(steps, 1000)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    times = schedule.time_at((high + ramp * (low - high)) ** rho)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def uniform_times(schedule: Schedule, steps: int) -> Tensor:
    """S equal steps from the noisy end to 0: the times of a flow."""
    _check_steps(steps, 1000)
    return torch.linspace(schedule.end, 0, steps + 1, dtype=torch.float64)


def make_times(schedule: Schedule, steps: int | str, spacing: str = "auto") -> Tensor:
    """Make the times that fit a schedule: `vp_times`, `edm_times` or `uniform_times`."""
    if isinstance(schedule, VPSchedule):
        return vp_times(schedule, steps, spacing)
    if isinstance(steps, str) or spacing not in ("auto", "trailing"):
        raise ValueError(
            f"{type(schedule).__name__} takes a number of steps and no spacing, got {steps!r} and '{spacing}'"
        )
    return edm_times(schedule, steps) if isinstance(schedule, EDMSchedule) else uniform_times(schedule, steps)
