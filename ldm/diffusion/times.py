"""Time grids: float64 tensors [S + 1] of descending u, whose last entry is where the sampler stops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ldm.diffusion.levels import LEVEL_SPACINGS, level_range, spaced_levels, vp_levels
from ldm.diffusion.schedule import EDMSchedule, Schedule, VPSchedule
from ldm.diffusion.shifted import shifted_times

# diffusers' `leading`: the offset of its times, and the u that it ends at.
LEADING = {"leading": (0, 0), "leading_first": (0, 1), "leading_offset": (1, 1), "leading_offset_clean": (1, 0)}
TABLE_SPACINGS = ("trailing", "trailing_first", "published", *LEADING, "quad", "respace")
SPACINGS = ("auto", *TABLE_SPACINGS, "time_uniform", "time_quadratic", *LEVEL_SPACINGS)


def _check_steps(steps: int, largest: int) -> None:
    if not isinstance(steps, int) or not 1 <= steps <= largest:
        raise ValueError(f"number of steps must be a whole number from 1 to {largest}, got {steps!r}")


def default_spacing(steps: int, end: int) -> str:
    """`published` where CompVis' grid has exactly `steps` steps and does not stop short, else `trailing`."""
    return "published" if 2 <= steps <= end // 2 and end % steps == 0 else "trailing"


def vp_times(schedule: VPSchedule, steps: int | str, spacing: str = "auto") -> Tensor:
    """Whole-numbered times for a table of betas.

    trailing: T = u_0 > .. > u_S = 0, evenly spaced and rounded (Lin et al. 2024): exactly S steps for any S.
    trailing_first: the same, ending at u = 1 (alpha-bar_0): diffusers' where `set_alpha_to_one` is false.
    published: latent-diffusion's range(0, T, T // S) + 1 as network times; ends at u = 1 (alpha-bar_0) and may have
        more steps than asked for (S = 30 gives 31).
    leading: diffusers' default, range(0, T, T // S) as network times, the first S of them; ends at clean data.
    leading_first: the same, ending at u = 1.
    leading_offset: one entry later (`steps_offset` 1), ending at u = 1: published where S divides T.
    leading_offset_clean: one entry later, ending at clean data.
    quad: latent-diffusion's quadratic times, (linspace(0, sqrt(0.8 T), S))^2 + 1 as network times, ends at u = 1; times
        that it repeats from about S = 29 on are steps that go nowhere, and are left out.
    respace: ADM's timestep_respacing "S", both ends of the table included.
    time_uniform, time_quadratic: BayesDiff's, see `even_times`; they end at u = 1.
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
    if spacing in ("time_uniform", "time_quadratic"):
        return even_times(schedule, steps, 1 if spacing == "time_uniform" else 2)
    if spacing in ("trailing", "trailing_first"):
        even = (schedule.end * (steps - torch.arange(steps + 1, dtype=torch.float64)) / steps).round()
        return even if spacing == "trailing" else even.clamp(min=1).unique().flip(0)
    if spacing in LEADING:
        offset, last = LEADING[spacing]
        kept = (torch.arange(steps, dtype=torch.float64) * (schedule.end // steps) + offset).clamp(max=schedule.end - 1)
        return torch.cat([torch.tensor([float(last)], dtype=torch.float64), kept + 1]).unique().flip(0)
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
    return spaced_times(schedule, steps, "karras", rho=rho)


def uniform_times(schedule: Schedule, steps: int) -> Tensor:
    """S equal steps from the noisy end to 0: the times of a flow; `shifted_times` where the schedule has a shift."""
    _check_steps(steps, 1000)
    shift = getattr(schedule, "shift", 1.0)
    if shift != 1:
        return shifted_times(steps, shift)
    return torch.linspace(schedule.end, 0, steps + 1, dtype=torch.float64)


def spaced_times(
    schedule: Schedule,
    steps: int,
    spacing: str,
    *,
    rho: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """The times of noise levels sigma / alpha that are spaced as `ldm.diffusion.levels` has it, on any schedule.

    karras, exponential, polyexponential and vp are S levels, and then clean data. logsnr is S + 1 levels evenly spaced
    in log(alpha / sigma), which end at the lowest (DPM-Solver's singlestep methods know no step to clean data).

    Where no sigma_max is given, the first time is the schedule's end, pure noise on a flow.

    Args:
        rho: the power of karras (7) and polyexponential (1).
        sigma_min, sigma_max: the lowest and the highest level; those of `level_range` where None.

    Raises:
        ValueError: for levels that the schedule does not have, or an option that the spacing does not act on.
    """
    _check_steps(steps, 1000)
    if spacing == "vp":
        if (rho, sigma_min, sigma_max) != (None, None, None):
            raise ValueError("spacing vp has levels of its own: leave out rho, sigma_min and sigma_max")
        levels = vp_levels(steps)
        if isinstance(schedule, VPSchedule):
            levels = levels.clamp(*level_range(schedule, None, None))
    else:
        low, high = level_range(schedule, sigma_min, sigma_max)
        levels = spaced_levels(spacing, steps, low, high, rho)
    times = schedule.time_at(levels)
    if sigma_min is None and isinstance(schedule, VPSchedule) and spacing != "vp":
        times[-1] = 1
    if sigma_max is None and spacing != "vp":
        times[0] = schedule.end
    if spacing != "logsnr":
        times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    # Levels of vp that a table does not have are its first or its last entry, each of them once.
    return times.unique_consecutive()


def even_times(schedule: VPSchedule, steps: int, power: int) -> Tensor:
    """BayesDiff's time_uniform (power 1) and time_quadratic (2): even in u^(1 / power) from T to 1, not rounded."""
    _check_steps(steps, schedule.end)
    roots = torch.linspace(schedule.end ** (1 / power), 1, steps + 1, dtype=torch.float64)
    return roots**power


def make_times(
    schedule: Schedule,
    steps: int | str,
    spacing: str = "auto",
    *,
    rho: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """Make the times that fit a schedule: `vp_times`, `edm_times` or `uniform_times`, or on all `spaced_times`.

    Raises:
        ValueError: for a spacing that the schedule does not have, or rho, sigma_min and sigma_max without effect.
    """
    given = {"rho": rho, "sigma_min": sigma_min, "sigma_max": sigma_max}
    if spacing == "auto" and isinstance(schedule, EDMSchedule) and not isinstance(steps, str):
        spacing = "karras"
    if spacing in LEVEL_SPACINGS:
        if isinstance(steps, str):
            raise ValueError(f"spacing {spacing} takes a number of steps, got the respacing '{steps}'")
        return spaced_times(schedule, steps, spacing, **given)
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise ValueError(f"{', '.join(unused)} belong to the spacings {', '.join(LEVEL_SPACINGS)}, not to '{spacing}'")
    if isinstance(schedule, VPSchedule):
        return vp_times(schedule, steps, spacing)
    if isinstance(steps, str) or spacing not in ("auto", "trailing"):
        raise ValueError(
            f"{type(schedule).__name__} takes a number of steps, and of spacings auto, trailing, "
            f"{', '.join(LEVEL_SPACINGS)}; got {steps!r} and '{spacing}'"
        )
    return edm_times(schedule, steps) if isinstance(schedule, EDMSchedule) else uniform_times(schedule, steps)
