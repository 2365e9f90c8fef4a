"""Refits of the last layer to bootstraps over images: the sampling variance that a posterior's width is held against.

The refit is the regression's own optimum, so each is one solve with the sums of its images:

    (sum_i w_i A_i / sigma^2 + precision I) (W - W_0) = sum_i w_i g_i / sigma^2 + precision (prior_mean - W_0)

with W_0 the trained parameters, A_i = sum a a^T and g_i = sum r a^T over the draws and
positions of image i, and w_i how often a bootstrap drew it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.ensembles.members import Members
from ldm.laplace.covariance import DenseCovariance
from ldm.laplace.posterior import LastLayerLaplace
from ldm.laplace.statistics import Observation

AT_ONCE = 8  # images whose sums are held at once


@dataclass(frozen=True)
class Refits:
    """`matrices` [N, C, K]: parameters of the last layer of each refit."""

    laplace: LastLayerLaplace
    matrices: Tensor

    def variance(self, features: Tensor) -> Tensor:
        """Unbiased variance over refits of the output at the last layer's input, in the output's shape."""
        away = (self.matrices - self.matrices.mean(0)) / (len(self.matrices) - 1) ** 0.5
        covariance = DenseCovariance(away.permute(1, 2, 0))
        return covariance.variance(self.laplace.layer, features, self.laplace.chunk)

    def members(self) -> Members:
        """The refits as members of an ensemble, keys as in the network's state dict."""
        stacked = self.laplace.layer.overrides(self.matrices)
        return Members({f"{self.laplace.name}.{key}": value for key, value in stacked.items()})


@torch.no_grad()
def bootstrap(
    laplace: LastLayerLaplace,
    batches: Iterable[Observation],
    *,
    images: int,
    draws: int,
    count: int = 60,
    source: torch.Generator,
) -> Refits:
    """Refit the last layer to `count` draws with replacement of all `images`, an image with all its noise draws.

    `laplace` gives sigma_noise, prior and temperature; its own fit is not needed. The sums of an image and of every
    bootstrap are K x K matrices: for last layers of up to about a thousand entries.

    Args:
        batches: as for `LastLayerLaplace.fit`, `images` in all.
        draws: R, rows of an image.

    Raises:
        ValueError: if there are other images than announced, or fewer than two bootstraps.
    """
    if count < 2 or images < 1:
        raise ValueError(f"expected at least two bootstraps and one image, got {count} and {images}")
    layer, mean = laplace.layer, laplace.mean
    drawn = torch.randint(images, (count, images), generator=source)
    weights = torch.stack([each.bincount(minlength=images) for each in drawn]).to(mean)  # [N, images]
    grams = mean.new_zeros(count, layer.width, layer.width)
    crosses = mean.new_zeros(count, *mean.shape)
    done = 0
    for batch in batches:
        features = laplace.features(batch.x, batch.t, batch.cond)
        residual = layer.by_position(batch.target.double() - laplace.output(features).double())
        noise = (laplace.noise_variance(batch.t) * laplace.temperature).sqrt()[:, None, None]
        for rows in torch.arange(len(features), device=features.device).split(draws * AT_ONCE):
            patches = (layer.patches(features[rows]).double() / noise[rows]).unflatten(0, (-1, draws)).flatten(1, 2)
            errors = (residual[rows] / noise[rows]).unflatten(0, (-1, draws)).flatten(1, 2)  # [I, R P, C]
            own = weights[:, done : done + len(patches)]
            done += len(patches)
            if own.shape[1] != len(patches):
                raise ValueError(f"there are more images than the {images} announced")
            grams += torch.tensordot(own, patches.mT @ patches, 1)
            crosses += torch.tensordot(own, errors.mT @ patches, 1)
    if done != images:
        raise ValueError(f"{images} images were announced, the batches hold {done}")
    precision = laplace.prior_precision * torch.eye(layer.width).to(mean)
    pull = laplace.prior_precision * (laplace.prior_mean.to(mean) - mean)
    scale = (laplace.data_size or images) / images
    change = torch.linalg.solve(scale * grams + precision, (scale * crosses + pull).transpose(1, 2))
    return Refits(laplace, mean + change.transpose(1, 2))
