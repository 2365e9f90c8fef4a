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
from ldm.uncertainty.channel import NoiseLevel, implied_deviations
from ldm.uncertainty.information import (
    BOUNDS,
    DISTANCES,
    Scale,
    check_bound,
    mean_pairwise_distance,
    mutual_information,
    paide,
    total_variance,
)


@dataclass(frozen=True)
class Estimator:
    """How far members are apart: a distance, its scale, and the noise that they are seen through.

    Attributes:
        distance: one of `DISTANCES`.
        scale: "sum" over the dimensions (as published), "mean" over them, or a factor on the sum.
        noise: white noise that is added to what is compared; with kl PaiDE is then an upper bound of what gets through
            it, with bhattacharyya a lower one, also where the members have no variance.

    Raises:
        ValueError: for a scale under which a divergence is no bound, or noise with the distance wasserstein, which
            measures no divergence.
    """

    distance: str = "wasserstein"
    scale: Scale = "sum"
    noise: NoiseLevel | None = None

    def __post_init__(self) -> None:
        check_bound(self.distance, self.scale)
        if self.noise is not None and self.distance not in BOUNDS:
            raise ValueError(
                f"information through noise is bounded by {' and '.join(BOUNDS)}; got the distance {self.distance}"
            )

    def distances(self, gaussian: Gaussian) -> Tensor:
        """[M, M, B], float64.

        Raises:
            ValueError: if the distance is unknown, or undefined at zero covariance.
        """
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {sorted(DISTANCES)}, got '{self.distance}'")
        if self.noise is not None:
            gaussian = Gaussian(gaussian.mean.double(), gaussian.var.double() + self.noise.deviation**2)
        return DISTANCES[self.distance](gaussian, "sample", self.scale)

    @property
    def units(self) -> str:
        """What one unit of the distance is, in words."""
        unit = "squared latent units" if self.distance == "wasserstein" else "nats"
        how = {"sum": "summed over the dimensions", "mean": "averaged over the dimensions"}
        return f"{unit}, {how.get(str(self.scale), f'summed over the dimensions, times {self.scale}')}"

    def through(self, size: int) -> str:
        """Return in a few words what `size` numbers are seen through: the noise that nats belong to."""
        if self.noise is not None:
            return f"through noise of {self.noise.level:g} s.d. of the data"
        if self.distance in BOUNDS:
            return "of the drawn state"
        return f"through noise of deviation {implied_deviations(self._factor(size))[0]:.3g}"

    def _factor(self, size: int) -> float:
        """Return what squared distances over `size` numbers are multiplied by."""
        return {"sum": 1.0, "mean": 1 / size}.get(str(self.scale)) or float(self.scale)

    def meaning(self, size: int) -> str:
        """Return what nats by this estimator are, in a sentence, for comparisons between `size` numbers."""
        side = "at least" if self.distance == "bhattacharyya" else "at most"
        if self.noise is not None:
            level = f"{self.noise.level:g} standard deviations of the data"
            return (
                f"nats: the information about the member in {size} numbers seen through Gaussian noise of {level} "
                f"({self.noise.data:.4g}), root mean square, deviation {self.noise.deviation:.4g} in each, "
                f"is {side} this"
            )
        if self.distance in BOUNDS:
            return f"nats: the information about the member in the drawn state is {side} this"
        above, below = implied_deviations(self._factor(size))
        return (
            f"nats: the information about the member in {size} numbers without noise of their own is at most this "
            f"seen through Gaussian noise of deviation {above:.4g} in each, and at least this through {below:.4g}"
        )


@dataclass(frozen=True)
class Quantities:
    """What is reported of each of the B samples of a step, float64.

    Attributes:
        mi: [B], mutual information between the state and the member, nats.
        mean_pairwise_distance: [B], in the units of the distance.
        epistemic_variance, aleatoric_variance: [B], variance of the members' means (with M - 1, so that it does not
            depend on the number of members; 0 for one) and mean of their variances, under the estimator's scale,
            latent units squared.
        distances: [M, M, B].
    """

    mi: Tensor
    mean_pairwise_distance: Tensor
    epistemic_variance: Tensor
    aleatoric_variance: Tensor
    distances: Tensor


def compute_quantities(gaussian: Gaussian, estimator: Estimator) -> Quantities:
    """Compute every quantity of the members' distributions of one step, mean [M, B, ...], from one matrix."""
    distances = estimator.distances(gaussian)
    parts = total_variance(gaussian, scale=estimator.scale)
    # The law of total variance divides by M: it is that of these members, and too small for those that were not drawn.
    epistemic = parts.epistemic * (gaussian.members / max(gaussian.members - 1, 1))
    return Quantities(paide(distances), mean_pairwise_distance(distances), epistemic, parts.aleatoric, distances)


@dataclass(frozen=True)
class GroupQuantities:
    """What two groups of members say, each [B]: nats within each, and mean distances within and between them."""

    mi_certain: Tensor
    mi_uncertain: Tensor
    distance_certain: Tensor
    distance_uncertain: Tensor
    distance_between: Tensor


def compare_groups(distances: Tensor, certain: Sequence[int], uncertain: Sequence[int]) -> GroupQuantities:
    """Compare two groups of members: mutual information within each, mean distance within and between them.

    A group of one has no disagreement: 0 nats, and NaN for its distance. An empty group gives NaN for all.

    Args:
        distances: [M, M, B]; certain, uncertain: the members of each group.

    Raises:
        ValueError: if a member does not exist or is in both groups.
    """
    check_members([*certain, *uncertain], len(distances))
    undefined = torch.full(distances.shape[2:], float("nan"), dtype=torch.float64, device=distances.device)
    # The mean over both directions, since the Kullback-Leibler divergence has two.
    both = distances + distances.transpose(0, 1)
    between = both[list(certain)][:, list(uncertain)].double() / 2
    return GroupQuantities(
        mi_certain=paide(distances, certain) if certain else undefined,
        mi_uncertain=paide(distances, uncertain) if uncertain else undefined,
        distance_certain=mean_pairwise_distance(distances, certain) if len(certain) > 1 else undefined,
        distance_uncertain=mean_pairwise_distance(distances, uncertain) if len(uncertain) > 1 else undefined,
        distance_between=between.mean((0, 1)) if certain and uncertain else undefined,
    )


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
