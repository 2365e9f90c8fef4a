"""Guidance away from a weaker prediction, on an interval of noise levels and with its size corrected.

    x_0 = weaker + s(u) (better - weaker)          s(u) = s where low < sigma / alpha <= high, else 1

The weaker prediction is that of the null condition (Ho and Salimans 2022), or of a weaker model under the same
condition (autoguidance, Karras et al. 2024b). The interval is that of Kynkaanniemi et al. 2024, the correction that of
Lin et al. 2024, section 3.4. Guidance is linear in what a network regresses: eps follows the same rule as x_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, GuidedDenoiser, Network, NetworkDenoiser, Prediction, Target
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class GuidanceRule:
    """How far guidance goes at each noise level.

    Args:
        scale: s, one number, or a tensor that broadcasts to predictions: [M, 1, 1, 1, 1] of members, [B, 1, 1, 1] of
            images.
        low, high: guidance acts where low < sigma / alpha <= high.
        rescale: phi; see `RuledGuidance`.
    """

    scale: float | Tensor
    low: float = 0.0
    high: float = math.inf
    rescale: float = 0.0

    def scale_at(self, ratio: Tensor) -> float | Tensor | None:
        """Return s at ratios sigma / alpha (one, or [B] of images); None where guidance is off for all of them."""
        inside = (ratio > self.low) & (ratio <= self.high)
        if not bool(inside.any()):
            return None
        if bool(inside.all()):
            return self.scale
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        return torch.where(inside.to(scale.device).reshape(-1, 1, 1, 1), scale, 1.0)


@dataclass(frozen=True)
class RuledGuidance:
    """`better` guided away from `weaker` by a rule; where the rule is off, `better` alone is evaluated.

    With phi = `rule.rescale`, what the network regresses, o, is multiplied by phi std(o_better) / std(o) + 1 - phi,
    with deviations over each image: large scales then do not overexpose.

    Args:
        better: what is guided.
        weaker: predictions to lead away from; None: those of the null condition.
        null: null conditions [B, ...], with `weaker` None.
        rule: how far.
    """

    better: NetworkDenoiser
    weaker: Denoiser | None
    null: Any
    rule: GuidanceRule

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        scale = self.rule.scale_at(self.better.schedule.ratio(u))
        if scale is None:
            return self.better(x, u)
        if self.weaker is None:
            weaker, better = GuidedDenoiser(self.better, self.null, 1.0).predict_both(x, u)
        else:
            weaker, better = self.weaker(x, u), self.better(x, u)
        share = torch.as_tensor(scale, dtype=torch.float64).to(better.x0)
        x0 = torch.lerp(weaker.x0, better.x0, share)
        eps = torch.lerp(weaker.eps, better.eps, share)
        if self.rule.rescale:
            x0, eps = self._rescale(x0, eps, better, x, u)
        return Prediction(x0, eps, better.var_fraction)

    def _rescale(
        self, x0: Tensor, eps: Tensor, better: Prediction, x: Tensor, u: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return x_0 and eps of the output whose deviation is nearer to that of the better one."""
        target, (alpha, sigma) = self.better.target, self.better.schedule.per_image(u)
        output = target.of(x0, eps, alpha.to(x0), sigma.to(x0))
        wanted = target.of(better.x0, better.eps, alpha.to(x0), sigma.to(x0))
        pixels = (-3, -2, -1)
        ratio = wanted.std(pixels, keepdim=True) / output.std(pixels, keepdim=True)
        return target.solve((self.rule.rescale * ratio + 1 - self.rule.rescale) * output, x, alpha, sigma)


@dataclass(frozen=True)
class SharedDenoiser:
    """One model for states of all members: [M, B, C, H, W] go through it as one batch, under the conditions of B.

    Args:
        network, schedule, target, learned_range: see `NetworkDenoiser`.
        cond: conditions [B, ...]; None for an unconditional model.
    """

    network: Network
    schedule: Schedule
    target: Target
    cond: Tensor | None = None
    learned_range: bool = False

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        copies = 1 if x.ndim == 4 else len(x)
        u = torch.as_tensor(u)
        cond = self.cond
        if copies > 1 and cond is not None:
            cond = cond.repeat(copies, *[1] * (cond.ndim - 1))
        own = NetworkDenoiser(self.network, self.schedule, self.target, cond, self.learned_range)
        found = own(x.reshape(-1, *x.shape[-3:]), u.repeat(copies) if u.ndim else u)
        return Prediction(found.x0.reshape(x.shape), found.eps.reshape(x.shape))
