"""Epsilon scaling: divide the predicted noise by lambda in sampling, against exposure bias (Ning et al. 2024, ADM-ES).

    eps' = eps / lambda,     x_0' = (x - sigma eps') / alpha = x_0 + (sigma / alpha) (1 - 1 / lambda) eps

lambda = k t + b, or a table. It is one wrapper of a Denoiser, so that every evaluation of every sampler is scaled
exactly once. Order of wrappers: guidance without a classifier, then scaling, then clipping. A classifier's gradient is
not scaled: it comes after (`mean_shift` of ancestral sampling does). Training is unchanged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.arguments import check_value
from ldm.diffusion.denoiser import Denoiser, MappedDenoiser, Prediction
from ldm.diffusion.schedule import Schedule
from ldm.files import reading
from ldm.util import atomic_write

UNITS = ("step", "log_snr")
DIRECTIONS = ("full", "x0_only")
_FORMAT = 1
# Samplers that step with x_0 and eps as two values; the others derive one of them from the other.
TWO_VALUED = ("DDIM", "DDPM", "Euler", "Euler-ancestral")


@dataclass(frozen=True)
class EpsilonScaling:
    """lambda at each noise level, and what is divided by it.

    Args:
        b: lambda where t = 0, positive; below 1 enlarges the noise. b = 1 with k = 0 is off.
        k: growth with t. The published slopes are positive: more is taken away where there is more noise.
        unit: what t counts. "step": the index in the respaced process as published, 0 .. S - 1 from the least noisy
            evaluation, so that k belongs to one number of steps. "log_snr": t = -log SNR = 2 ln(sigma / alpha), 0
            where data and noise are equal, so that k carries over between numbers of steps, schedules and schedules.
        direction: "full" divides eps everywhere (ADM-ES, EDM-ES); "x0_only" changes x_0 and leaves eps as predicted in
            the direction term (LDM-ES), which breaks x = alpha x_0 + sigma eps.
        window: (low, high) of sigma / alpha between which lambda acts, ends included; None: everywhere.
        table: pairs (-log SNR, lambda), ascending, in place of k t + b; straight between them, constant outside.
    """

    b: float = 1.0
    k: float = 0.0
    unit: str = "step"
    direction: str = "full"
    window: tuple[float, float] | None = None
    table: tuple[tuple[float, float], ...] = ()

    def __post_init__(self):
        for name, choices in (("unit", UNITS), ("direction", DIRECTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.b) and self.b > 0 and math.isfinite(self.k)):
            raise ValueError(f"b must be positive (1 is off) and k finite, got b = {self.b}, k = {self.k}")
        if self.window is not None and (len(self.window) != 2 or not 0 <= self.window[0] <= self.window[1]):
            raise ValueError(f"window must be (low, high) of sigma / alpha with 0 <= low <= high, got {self.window}")
        if self.table:
            self._check_table()

    def _check_table(self) -> None:
        levels, factors = np.asarray(self.table, dtype=np.float64).reshape(-1, 2).T
        if not (np.isfinite(levels).all() and (np.diff(levels) > 0).all()):
            raise ValueError(f"the levels (-log SNR) of a table must be finite and ascend, got {levels.tolist()}")
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ValueError(f"every lambda of a table must be positive, got {factors.tolist()}")
        if (self.b, self.k) != (1.0, 0.0):
            raise ValueError(f"a table replaces k t + b: leave out b and k, got b = {self.b}, k = {self.k}")

    @property
    def off(self) -> bool:
        """Whether lambda is 1 everywhere."""
        return self.k == 0 and self.b == 1 and all(factor == 1 for _, factor in self.table)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, as a schedule file holds them."""
        plain = {"table": [list(pair) for pair in self.table], "window": self.window and list(self.window)}
        return {**asdict(self), **plain}

    def check_sampler(self, name: str) -> None:
        """Refuse a direction that the sampler would silently ignore.

        Raises:
            ValueError: for "x0_only" with a sampler that derives x_0 from eps, or eps from x_0.
        """
        if self.direction == "x0_only" and not self.off and name not in TWO_VALUED:
            raise ValueError(
                f"direction 'x0_only' scales x_0 and keeps eps, but {name} derives one of them from the other "
                f"(x = alpha x_0 + sigma eps); use 'full', or a sampler that steps with both: {', '.join(TWO_VALUED)}"
            )


def noise_level(schedule: Schedule, u: Tensor | float) -> Tensor:
    """-log SNR = 2 ln(sigma / alpha), float64 of the shape of u; infinite where there is no noise or no data."""
    return 2 * schedule.ratio(torch.as_tensor(u, dtype=torch.float64).cpu()).log()


@dataclass(frozen=True)
class ScaledDenoiser:
    """A denoiser whose eps is divided by lambda; `times` [S + 1] is the sampler's.

    Between times times (the middle of a midpoint step, churn) the index is interpolated; the end of the times counts as
    its last evaluation. Where there is no data (alpha = 0: a flow's first point) x_0 does not follow from eps, and
    lambda is 1. `var_fraction` stays: the variance of a step is not scaled.
    """

    denoiser: Denoiser
    schedule: Schedule
    scaling: EpsilonScaling
    times: Tensor

    def factor(self, u: Tensor | float) -> Tensor:
        """lambda at times u, float64 of the shape of u."""
        u = torch.as_tensor(u, dtype=torch.float64).cpu()
        ratio = self.schedule.ratio(u)
        if self.scaling.table:
            levels, factors = zip(*self.scaling.table, strict=True)
            factor = _interpolated(noise_level(self.schedule, u), levels, factors)
        else:
            factor = self.scaling.k * self._position(u) + self.scaling.b
        active = ratio.isfinite()
        if self.scaling.window is not None:
            low, high = self.scaling.window
            active &= (low <= ratio) & (ratio <= high)
        return torch.where(active, factor, 1.0)

    def _position(self, u: Tensor) -> Tensor:
        """t of k t + b; levels that are infinite count as the nearest finite one of the times."""
        if self.scaling.unit == "step":
            times = self.times[:-1].flip(0)
            return _interpolated(u, times, range(len(times)))
        levels = noise_level(self.schedule, self.times)
        levels = levels[levels.isfinite()]
        low, high = (float(levels.min()), float(levels.max())) if len(levels) else (0.0, 0.0)
        level = noise_level(self.schedule, u)
        return torch.where(level.isfinite(), level, level.clamp(low, high))

    def eps_variance(self, var: Tensor, u: Tensor | float) -> Tensor:
        """Variance of the scaled eps, var / lambda^2, where a posterior gives eps the variance `var` [..., B, C, H, W].

        Members are scaled one by one, so their spread needs no correction.
        """
        return var / _beside(self.factor(u), var) ** 2

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        prediction, factor = self.denoiser(x, u), self.factor(u)
        if bool((factor == 1).all()):
            return prediction
        removed = torch.where(factor == 1, 0.0, self.schedule.ratio(u).to(factor) * (1 - 1 / factor))
        x0 = prediction.x0 + _beside(removed, prediction.x0) * prediction.eps
        eps = prediction.eps
        if self.scaling.direction == "full":
            eps = eps / _beside(factor, eps)
        return Prediction(x0, eps, prediction.var_fraction)


def _interpolated(at: Tensor, positions: Iterable[float], values: Iterable[float]) -> Tensor:
    """Straight lines between (position, value), positions ascending, constant outside; derivatives pass through it."""
    given = (each if isinstance(each, Tensor) else list(each) for each in (positions, values))
    places, heights = (torch.as_tensor(each, dtype=torch.float64) for each in given)
    if len(places) == 1:
        return heights[0].expand(at.shape)
    right = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    left = right - 1
    share = ((at - places[left]) / (places[right] - places[left])).clamp(0, 1)
    return torch.lerp(heights[left], heights[right], share)


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """Values [] or [B] to multiply images [..., B, C, H, W]."""
    return values.reshape((-1, 1, 1, 1) if values.ndim else ()).to(like)


def _layers(denoiser: Denoiser | None) -> Iterator[Denoiser]:
    """A denoiser and those it wraps."""
    while denoiser is not None:
        yield denoiser
        denoiser = getattr(denoiser, "denoiser", None)


def scaled(denoiser: Denoiser, schedule: Schedule, scaling: EpsilonScaling, times: Tensor) -> Denoiser:
    """`denoiser` under epsilon scaling on a sampler's times; a scaling that is off returns it unchanged.

    Wrap after guidance and before `clipped`. Clipping derives eps from x_0 again, which makes "x0_only" equal "full".

    Raises:
        ValueError: if lambda is not positive at every time of the times, or the denoiser is scaled or clipped already.
    """
    for layer in _layers(denoiser):
        if isinstance(layer, ScaledDenoiser):
            raise ValueError("this denoiser is scaled already: epsilon scaling acts once")
        if isinstance(layer, MappedDenoiser):
            raise ValueError("epsilon scaling comes before clipping: clipped(scaled(denoiser, ..), schedule)")
    if scaling.off:
        return denoiser
    wrapped = ScaledDenoiser(denoiser, schedule, scaling, times)
    factors = wrapped.factor(times)
    if not bool((factors > 0).all()):
        raise ValueError(
            f"lambda = k t + b must be positive at every step, got {float(factors.min()):.4g} with b = {scaling.b}, "
            f"k = {scaling.k}, unit '{scaling.unit}' on {len(times) - 1} steps"
        )
    return wrapped


def tabulated(schedule: Schedule, times: Tensor, factors: Tensor, direction: str = "full") -> EpsilonScaling:
    """The scaling whose lambda at step i is factors[i]; other grids read it by their noise levels.

    Args:
        times: [S + 1], from the noisiest; factors: [S], for the evaluations at times[:-1]. Those at infinite levels are
            left out.

    Raises:
        ValueError: if the lengths differ, or no level is finite.
    """
    if len(factors) != len(times) - 1:
        raise ValueError(f"one lambda for each step: there are {len(times) - 1} steps, got {len(factors)} factors")
    levels = noise_level(schedule, times[:-1])
    pairs = [(float(a), float(b)) for a, b in zip(levels, factors, strict=True) if math.isfinite(float(a))]
    if not pairs:
        raise ValueError("none of these times has both data and noise: take more steps")
    return EpsilonScaling(direction=direction, table=tuple(sorted(pairs)))


def scaling_from(mapping: Mapping[str, Any]) -> EpsilonScaling:
    """An EpsilonScaling from the keys of its arguments, as they stand in a YAML or JSON file.

    Raises:
        ValueError: for an unknown key or a value out of range.
    """
    known = get_type_hints(EpsilonScaling)
    if unknown := set(mapping) - set(known):
        raise ValueError(f"epsilon scaling has no {sorted(unknown)}; its keys are {sorted(known)}")
    values = {key: value for key, value in mapping.items() if value is not None}
    for key, value in values.items():
        check_value(value, known[key], key)
    values["window"] = values.get("window") and tuple(values["window"])
    values["table"] = tuple((float(level), float(factor)) for level, factor in values.get("table", ()))
    return EpsilonScaling(**values)


def save_scaling(scaling: EpsilonScaling, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write a schedule file (YAML) for `load_scaling`: format, b, k, unit, ...; over one only by `overwrite`."""
    with atomic_write(path, overwrite) as partial:
        OmegaConf.save(OmegaConf.create({"format": _FORMAT, **scaling.as_dict()}), partial)


def load_scaling(path: str | os.PathLike) -> EpsilonScaling:
    """Read a schedule file, YAML or JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another format or an unknown key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no schedule of epsilon scaling at {path}")
    with reading(path, "a schedule of epsilon scaling", "choose it again (decu exposure choose)"):
        content = OmegaConf.to_container(OmegaConf.load(Path(path)))
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is no schedule of epsilon scaling: expected 'format: {_FORMAT}', b, k, ..")
    try:
        return scaling_from({str(key): value for key, value in content.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def published_scaling(
    entries: Iterable[Mapping[str, Any]], steps: int, linear: bool = False, sampler: str | None = None
) -> EpsilonScaling:
    """The entry of a config's `epsilon_scaling` list for a number of steps; `linear`: the one with a slope.

    Args:
        entries: each with `steps`, and with `sampler` where its values are one sampler's alone.
        steps: of the sampler.
        linear: whether lambda has a slope.
        sampler: the one that samples; None: any.

    Raises:
        ValueError: if the list has none.
    """
    kinds = set()
    for entry in map(dict, entries):
        own = entry.pop("sampler", None)
        if entry["steps"] == steps and bool(entry.get("k", 0)) == linear and sampler in (None, own or sampler):
            return scaling_from({key: value for key, value in entry.items() if key != "steps"})
        kinds.add((entry["steps"], "linear" if entry.get("k", 0) else "uniform", *([own] if own else [])))
    wanted = f"{'linear' if linear else 'uniform'} scaling for {steps} steps"
    if any(len(kind) > 2 for kind in kinds):
        wanted += f" of {sampler}"
    raise ValueError(f"no published {wanted}; there are {sorted(kinds)}: give b, or estimate it")
