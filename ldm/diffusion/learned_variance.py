"""Learned variance of ancestral steps, and the variational bound that trains it (Nichol and Dhariwal 2021).

The network's output has 2 C channels: what it regresses, and v in [-1, 1], which places the log-variance of a step of
the training table between its two bounds,

    log w = f log(beta_t) + (1 - f) log(posterior variance_t),    f = (v + 1) / 2                        (eq. 15)

Sampling uses it as `ancestral(.., variance="learned_range")`, on any times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Target
from ldm.diffusion.schedule import VPSchedule
from ldm.diffusion.transition import forward_variance, posterior_variance

BOUND_LOSSES = ("hybrid", "vlb")
# Half the distance between two of the 256 values of a pixel in [-1, 1], and where the first and the last one begin.
HALF_BIN, EDGE = 1 / 255, 0.999


@dataclass(frozen=True)
class LearnedVariance:
    """How the bound enters the loss.

    Args:
        loss: "hybrid": L_simple + weight L_vlb, where the bound trains the variance and leaves the mean alone
            (eq. 16); "vlb": L_vlb alone, for mean and variance.
        weight: lambda of the hybrid loss.
    """

    loss: str = "hybrid"
    weight: float = 1e-3

    def __post_init__(self):
        if self.loss not in BOUND_LOSSES:
            raise ValueError(f"learned_variance must be one of {BOUND_LOSSES}, got '{self.loss}'")
        if not self.weight >= 0:
            raise ValueError(f"the weight of the bound must not be negative, got {self.weight}")

    def bound(
        self, schedule: VPSchedule, target: Target, output: Tensor, v: Tensor, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """An estimate of L_vlb without its constant last term, in bits per dimension [B]: T L_t at each image's time.

        Args:
            output, v: halves of the network's output; x_start, noise: what the x_t that the network saw was made of
                (with input perturbation the perturbed noise), all [B, C, H, W].
            t: entries of the schedule's table [B], from 0.
        """
        output = output.detach() if self.loss == "hybrid" else output
        u = t.double() + 1
        x0, _ = target.solve(output, schedule.noised(x_start, noise, u), *schedule.per_image(u))
        return schedule.end * bound_terms(schedule, x_start, x0, v, t)

    def combine(self, simple: Tensor, bound: Tensor) -> Tensor:
        """Return the loss that the two parts, of the same shape, make."""
        return simple + self.weight * bound if self.loss == "hybrid" else bound


def make_learned_variance(config: str | Mapping[str, Any] | None) -> LearnedVariance | None:
    """Read a config's `learned_variance`: the name of a loss, the arguments of `LearnedVariance`, or None."""
    if config is None:
        return None
    return LearnedVariance(loss=config) if isinstance(config, str) else LearnedVariance(**config)


def check_out_channels(network: object, channels: int, learned: LearnedVariance | None) -> None:
    """Make sure that a network has 2 C output channels where it learns a variance, and C where it does not.

    Raises:
        ValueError: if it has another number. A network that does not say its `out_channels` is not judged.
    """
    expected = channels * (1 if learned is None else 2)
    found = getattr(network, "out_channels", None)
    if found is None or found == expected:
        return
    if found not in (channels, 2 * channels):
        raise ValueError(
            f"model.params.channels is {channels}, and the network gives {found} channels (out_channels of "
            f"unet_config): expected {expected}"
        )
    raise ValueError(
        f"learned_variance: {'null' if learned is None else learned.loss} needs a network with out_channels: "
        f"{expected} for {channels} channels, got {found}; {2 * channels} go with learned_variance: hybrid"
    )


@lru_cache(maxsize=8)
def step_tables(schedule: VPSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """(share c of x_0 in the posterior mean, log posterior variance, log forward variance) of each table entry,
    float64 [T] each; the vanishing posterior variance of entry 0 is replaced by that of entry 1, as published."""
    u = torch.arange(1, schedule.end + 1, dtype=torch.float64)
    small, large = posterior_variance(schedule, u, u - 1), forward_variance(schedule, u, u - 1)
    small[0] = small[1] if schedule.end > 1 else large[0]
    share = large * schedule.alpha(u - 1) / schedule.sigma(u) ** 2
    return share, small.log(), large.log()


def bound_terms(schedule: VPSchedule, x_start: Tensor, x0: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """L_t of the variational bound in bits per dimension [B] (Ho et al. 2020, eq. 5; Nichol and Dhariwal 2021, eq. 4).

    The divergence of the step from q(x_{t-1} | x_t, x_0), and at entry 0 the negative log-likelihood of 8-bit images.

    Args:
        x_start: the true x_0; x0: the predicted one; v: the network's variance output, all [B, C, H, W].
        t: table entries [B], from 0.
    """
    share, small, large = (table[t.cpu()].reshape(-1, 1, 1, 1).to(x_start) for table in step_tables(schedule))
    fraction = (v + 1) / 2
    logvar = fraction * large + (1 - fraction) * small
    distance = share * (x_start - x0)
    divergence = 0.5 * (logvar - small - 1 + (small - logvar).exp() + distance.square() * (-logvar).exp())
    likelihood = discretised_log_likelihood(x_start, x_start - distance, 0.5 * logvar)
    terms = torch.where((t == 0).reshape(-1, 1, 1, 1), -likelihood, divergence)
    return terms.mean(dim=(1, 2, 3)) / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability in nats of 8-bit pixels x in [-1, 1] under a Gaussian, integrated over each pixel's bin.

    The first and the last bin reach to infinity (Ho et al. 2020, eq. 13). Shapes broadcast.
    """
    scale = (-log_std).exp()
    above = torch.special.ndtr((x - mean + HALF_BIN) * scale)
    below = torch.special.ndtr((x - mean - HALF_BIN) * scale)
    inside = torch.where(x > EDGE, 1 - below, above - below)
    return torch.where(x < -EDGE, above, inside).clamp(min=1e-12).log()
