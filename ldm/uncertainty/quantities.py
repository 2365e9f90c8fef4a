"""What is reported of a branched step: every quantity of a batch from one matrix of distances.

One-step and multi-step. Of the first branched step all members start from the shared state z_b: the mutual information
of its distributions, I(z_{b-1}; member | z_b), is *one-step*. Of later steps each member stands where its own chain has
led it: the distributions of their next states differ also by what was accumulated since; that number is *multi-step*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.modules.distributions.gaussian import Gaussian, check_members
from ldm.uncertainty.information import (
    DISTANCES,
    Scale,
    mean_pairwise_distance,
    mutual_information,
    paide,
    total_variance,
)


@dataclass(frozen=True)
class Estimator:
    """A distance between members and its scale: "sum" over the dimensions (as published), "mean", or a factor."""

    distance: str = "wasserstein"
    scale: Scale = "sum"

    def distances(self, gaussian: Gaussian) -> Tensor:
        """[M, M, B], float64.

        Raises:
            ValueError: if the distance is unknown, or undefined at zero covariance.
        """
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {sorted(DISTANCES)}, got '{self.distance}'")
        return DISTANCES[self.distance](gaussian, scale=self.scale)

    @property
    def units(self) -> str:
        """What one unit of the distance is, in words."""
        unit = "squared latent units" if self.distance == "wasserstein" else "nats"
        how = {"sum": "summed over the dimensions", "mean": "averaged over the dimensions"}
        return f"{unit}, {how.get(str(self.scale), f'summed over the dimensions, times {self.scale}')}"


def quantities(gaussian: Gaussian, estimator: Estimator) -> dict[str, Tensor]:
    """Of the members' distributions of one step, mean [M, B, ...]: what is reported of each of the B samples.

    Returns:
        mi: mutual information between the state and the member, nats, [B].
        mean_pairwise_distance: [B]; epistemic_variance, aleatoric_variance: the law of total variance, latent units
            squared, under the estimator's scale, [B].
        distances: [M, M, B].
    """
    distances = estimator.distances(gaussian)
    parts = total_variance(gaussian, scale=estimator.scale)
    return {
        "mi": paide(distances),
        "mean_pairwise_distance": mean_pairwise_distance(distances),
        "epistemic_variance": parts.epistemic,
        "aleatoric_variance": parts.aleatoric,
        "distances": distances,
    }


def group_quantities(distances: Tensor, certain: Sequence[int], uncertain: Sequence[int]) -> dict[str, Tensor]:
    """Of two groups of members: mutual information within each, and mean distance within and between them.

    A group of one has no disagreement: 0 nats, and NaN for its distance. An empty group gives NaN for all.

    Args:
        distances: [M, M, B]; certain, uncertain: the members of each group.

    Returns:
        mi_certain, mi_uncertain, distance_certain, distance_uncertain, distance_between, each [B].

    Raises:
        ValueError: if a member does not exist or is in both groups.
    """
    check_members([*certain, *uncertain], len(distances))
    undefined = torch.full(distances.shape[2:], float("nan"), dtype=torch.float64, device=distances.device)
    found = {}
    for name, group in (("certain", certain), ("uncertain", uncertain)):
        found[f"mi_{name}"] = paide(distances, group) if group else undefined
        found[f"distance_{name}"] = mean_pairwise_distance(distances, group) if len(group) > 1 else undefined
    # The mean over both directions, since the Kullback-Leibler divergence has two.
    both = distances + distances.transpose(0, 1)
    between = both[list(certain)][:, list(uncertain)].double() / 2
    found["distance_between"] = between.mean((0, 1)) if certain and uncertain else undefined
    return found


def step_curve(distributions: Iterable[Gaussian], estimator: Estimator) -> Iterator[Tensor]:
    """Mutual information I(z_{b-1}), I(z_{b-2}), ... of each branched step, nats, [B] each.

    The first is one-step, the others are multi-step (see above); it ends near ln M where the chains have been apart for
    good.
    """
    for gaussian in distributions:
        yield paide(estimator.distances(gaussian))


def pixel_maps(samples: Tensor, scale: Scale = "sum", joint: bool = True) -> Tensor:
    """Mutual information between a pixel of the final sample and the member, nats.

    Args:
        samples: [M, n, K, C, H, W], images or latents of n noises from K base members.
        scale: of the squared distances, over a pixel's channels.
        joint: a pixel's channels are one event; False takes channel by channel and averages, as published.

    Returns:
        [n, K, H, W], float64.
    """
    flat = Gaussian(samples.flatten(1, 2))
    if joint:
        maps = mutual_information(flat, dims="pixel", scale=scale)
    else:
        maps = mutual_information(flat, dims="element", scale=scale).mean(1)
    return maps.unflatten(0, samples.shape[1:3])
