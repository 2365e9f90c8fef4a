"""Maps of uncertainty of the same images under a grid of sigma_noise and prior_precision.

With A the data's sum of a a^T, the covariance is S = (A / sigma^2 + precision I)^-1, so a^T S a grows like sigma^2
where the data decide, falls like 1 / precision where the prior does, and scales exactly: (10 sigma, precision / 100)
gives 100 times the variance of (sigma, precision), whatever the data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.jobs import split_range
from ldm.pipelines import PosteriorPipeline
from ldm.records import Row
from ldm.uncertainty.agreement import agreement


class Hyperparameters(NamedTuple):
    """One point of the grid."""

    sigma_noise: float
    prior_precision: float


class ScalingError(NamedTuple):
    """The largest relative departure from the exact scaling, over all pairs of points that it relates."""

    largest: float
    pairs: int


@torch.no_grad()
def map_variances(
    posterior: PosteriorPipeline, point: Hyperparameters, method: str, count: int, batch_size: int
) -> Tensor:
    """Return pixel variances [N, C, H, W] at one point of the grid; draws of the weights share their noise.

    Args:
        count: images N, the classes in turn; batch_size: images sampled together.
    """
    laplace = posterior.laplace.with_curvature(posterior.laplace.curvature)
    laplace.sigma_noise = point.sigma_noise
    laplace.prior_precision = point.prior_precision
    own = replace(posterior, laplace=laplace, _members=[])
    maps = []
    for images in split_range(count, batch_size).values():
        *_, last = own.steps(method, own.pipeline.cycle_classes(images), list(images))
        maps.append(own.pixel_variance(last, list(images)).cpu())
    return torch.cat(maps)


@dataclass(frozen=True)
class Sweep:
    """Maps under every pair of two hyperparameters.

    Attributes:
        sigmas, precisions: the axes of the grid, ascending.
        maps: pixel variances [N, C, H, W] at each point.
    """

    sigmas: Sequence[float]
    precisions: Sequence[float]
    maps: Mapping[Hyperparameters, Tensor]

    @property
    def totals(self) -> dict[Hyperparameters, float]:
        """The sum of all variances at each point."""
        return {point: float(each.double().sum()) for point, each in self.maps.items()}

    @property
    def stacked(self) -> NDArray[np.float32]:
        """Maps with channels averaged [R, K, N, H, W], R sigmas by K precisions."""
        points = grid_points(self.sigmas, self.precisions)
        flat = torch.stack([self.maps[point].mean(1) for point in points])
        return flat.unflatten(0, (len(self.sigmas), len(self.precisions))).float().numpy()

    def rows(self) -> list[Row]:
        """Return a row a point: total an image, its ratio to the first, agreement with the first map, slopes."""
        points = grid_points(self.sigmas, self.precisions)
        totals = self.totals
        first = points[0]
        rows = []
        for point in points:
            agrees = agreement(self.maps[point], self.maps[first])
            rows.append(
                {
                    "sigma_noise": point.sigma_noise,
                    "prior_precision": point.prior_precision,
                    "total": totals[point] / len(self.maps[point]),
                    "ratio": totals[point] / totals[first],
                    "pixel_rank": agrees.pixel,
                    "image_rank": agrees.image,
                    "slope_sigma": self._slope(totals, point, "sigma_noise", self.sigmas),
                    "slope_precision": self._slope(totals, point, "prior_precision", self.precisions),
                }
            )
        return rows

    def scaling_error(self) -> ScalingError:
        """Return how far V(10 sigma, precision / 100) = 100 V(sigma, precision) is from true."""
        totals = self.totals
        errors = []
        for one, other in itertools.product(totals, repeat=2):
            related = np.isclose(other.sigma_noise, 10 * one.sigma_noise)
            if related and np.isclose(other.prior_precision, one.prior_precision / 100):
                errors.append(abs(totals[other] / (100 * totals[one]) - 1))
        return ScalingError(max(errors, default=math.nan), len(errors))

    @staticmethod
    def _slope(
        totals: Mapping[Hyperparameters, float], point: Hyperparameters, name: str, values: Sequence[float]
    ) -> float | None:
        """Return d ln total / d ln of one hyperparameter towards its next larger value; None at the last."""
        own = getattr(point, name)
        following = values.index(own) + 1
        if following == len(values):
            return None
        other = point._replace(**{name: values[following]})
        return float(np.log(totals[other] / totals[point]) / np.log(values[following] / own))


def grid_points(sigmas: Sequence[float], precisions: Sequence[float]) -> list[Hyperparameters]:
    """Return every pair of the two, sigma by sigma."""
    return [Hyperparameters(sigma, precision) for sigma, precision in itertools.product(sigmas, precisions)]
