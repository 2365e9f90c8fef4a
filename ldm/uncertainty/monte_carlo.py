"""Mutual information by sampling: what the closed forms of `measures` bound, for ensembles small enough to sample."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.modules.distributions.gaussian import Gaussian


class MonteCarlo(NamedTuple):
    """An estimate [B] in nats and its standard error [B]."""

    estimate: Tensor
    error: Tensor


def monte_carlo_information(gaussian: Gaussian, pairs: int, source: torch.Generator) -> MonteCarlo:
    """Mutual information between output and member of the equal-weight mixture, unbiased, in nats.

        I = (1/M) sum_i E_{x ~ N_i} [ ln N_i(x) - ln (1/M) sum_j N_j(x) ]

    PaiDE with Bhattacharyya distances lies below I, with KL above it (Kolchinsky & Tracey, arXiv 1706.02419).

    Args:
        gaussian: mean [M, B, ...], positive variance; all trailing axes are one event.
        pairs: antithetic pairs, mean + noise and mean - noise, drawn from each member; at least 2.
        source: generator of the draws.

    Raises:
        ValueError: at zero covariance, where I is ln M as soon as members differ, or for fewer than 2 pairs.
    """
    mean = gaussian.mean.double().flatten(2) if gaussian.mean.ndim > 2 else gaussian.mean.double().unsqueeze(2)
    std = gaussian.std.double().expand_as(gaussian.mean).reshape(mean.shape)  # [M, B, D]
    if pairs < 2 or not bool((std > 0).all()):
        raise ValueError(
            f"Monte-Carlo information needs at least 2 pairs and every variance above 0, got {pairs} pairs and the "
            f"smallest variance {gaussian.var.min().item():g}: sample with eta > 0"
        )
    means, variances = [], []
    for own in range(gaussian.members):
        noise = torch.randn((1, pairs, 1, *mean.shape[1:]), generator=source, dtype=torch.float64).to(mean)
        noise = torch.cat([noise, -noise])  # [2, pairs, 1, B, D]
        gap = (mean[own] - mean + std[own] * noise) / std  # [2, pairs, M, B, D]
        log_density = -(0.5 * gap.square() + std.log()).sum(-1)  # up to a constant, [2, pairs, M, B]
        ratio = log_density[:, :, own] - log_density.logsumexp(2) + math.log(gaussian.members)
        ratio = ratio.mean(0)  # [pairs, B]
        means.append(ratio.mean(0))
        variances.append(ratio.var(0))
    error = (torch.stack(variances).sum(0) / pairs).sqrt() / gaussian.members
    return MonteCarlo(torch.stack(means).mean(0), error)
