"""Variances found by refitting the last layer, against which those of a posterior are held.

`bootstrap_refits` refits to draws of the images: the sampling variance of the fit. Each refit is
the regression's own optimum, one solve with the sums of its images:

    (sum_i w_i A_i / sigma^2 + precision I) (W - W_0)
        = sum_i w_i g_i / sigma^2 + precision (prior_mean - W_0)

with W_0 the trained parameters, A_i = sum a a^T and g_i = sum r a^T over the draws and positions
of image i, times visits / draws, and w_i how often a bootstrap drew it. Draws of noise are the
image's own in every refit, so the variance is between + within / draws.

`hessian_free_covariance` refits while rewarding one output for moving: the variance of the
posterior itself, without a Hessian that is formed, factorised or stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.ensembles.members import Members
from ldm.laplace.covariance import DenseCovariance
from ldm.laplace.fit import Observation
from ldm.laplace.posterior import LastLayerLaplace

_IMAGES_AT_ONCE = 8  # images whose sums are held at once


@dataclass(frozen=True)
class Refits:
    """Refits of the last layer: `matrices` [N, C, K] are the parameters of each."""

    laplace: LastLayerLaplace
    matrices: Tensor

    def variance(self, features: Tensor) -> Tensor:
        """Return the unbiased variance [B, C, H, W] over refits of the output at the layer's input."""
        away = (self.matrices - self.matrices.mean(0)) / (len(self.matrices) - 1) ** 0.5
        covariance = DenseCovariance(away.permute(1, 2, 0))
        return covariance.variance(self.laplace.layer, features, self.laplace.chunk)

    def members(self) -> Members:
        """Return the refits as members of an ensemble, with keys as in the network's state dict."""
        return self.laplace.members(self.matrices)


@torch.no_grad()
def bootstrap_refits(
    laplace: LastLayerLaplace,
    batches: Iterable[Observation],
    *,
    images: int,
    draws: int,
    count: int = 60,
    data_size: int | None = None,
    source: torch.Generator,
) -> Refits:
    """Refit the last layer to bootstraps: as many images as the data set has, drawn with replacement of `images`.

    An image is drawn with all its noise draws. The sums of an image and of every bootstrap
    are K x K matrices, so this is for last layers of up to about a thousand entries.

    Args:
        laplace: gives sigma_noise, prior, temperature and visits; its own fit is not needed.
        batches: as for `fit_state`, `images` in all.
        draws: rows of an image.
        count: number of refits.
        data_size: N, images that a bootstrap draws; where None, that of `laplace`'s fit, and
            without a fit `images`.

    Raises:
        ValueError: if there are other images than announced, or fewer than two bootstraps.
    """
    size = data_size or laplace.data_size or images
    if count < 2 or images < 1:
        raise ValueError(f"expected at least two bootstraps and one image, got {count} and {images}")
    layer = laplace.layer
    mean = laplace.mean
    drawn = [torch.randint(images, (size,), generator=source).bincount(minlength=images) for _ in range(count)]
    weights = laplace.visits / draws * torch.stack(drawn).to(mean)  # [count, images]
    grams = mean.new_zeros(count, layer.width, layer.width)
    crosses = mean.new_zeros(count, *mean.shape)
    done = 0
    for batch in batches:
        features = laplace.features(batch.x, batch.t, batch.cond)
        residual = layer.by_position(batch.target.double() - layer.output(features).double())
        noise = (laplace.state.noise_variance(batch.t) * laplace.temperature).sqrt()[:, None, None]
        for rows in torch.arange(len(features), device=features.device).split(draws * _IMAGES_AT_ONCE):
            patches = _by_image(layer.patches(features[rows]).double() / noise[rows], draws)  # [I, R P, K]
            errors = _by_image(residual[rows] / noise[rows], draws)  # [I, R P, C]
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
    change = torch.linalg.solve(grams + precision, (crosses + pull).transpose(1, 2))
    return Refits(laplace, mean + change.transpose(1, 2))


def _by_image(rows: Tensor, draws: int) -> Tensor:
    """Return rows [I R, P, K] of `draws` R for each image as [I, R P, K]."""
    return rows.unflatten(0, (-1, draws)).flatten(1, 2)


class LayerInputs(NamedTuple):
    """What a fit takes of a batch: the layer's input, and the variance of its noise [B]."""

    features: Tensor
    noise: Tensor


@torch.no_grad()
def cache_layer_inputs(laplace: LastLayerLaplace, batches: Iterable[Observation]) -> list[LayerInputs]:
    """Return what a fit takes of every batch, so that the backbone runs once."""
    return [
        LayerInputs(
            laplace.features(batch.x, batch.t, batch.cond),
            laplace.state.noise_variance(batch.t) * laplace.temperature,
        )
        for batch in batches
    ]


@torch.no_grad()
def hessian_free_covariance(
    laplace: LastLayerLaplace,
    data: Iterable[LayerInputs],
    features: Tensor,
    functionals: Tensor,
    *,
    data_size: int | None = None,
    strength: float = 1.0,
    steps: int = 1000,
    tolerance: float = 1e-10,
) -> Tensor:
    """Return the covariance of every output with Q scalars of its image, by fine-tuning.

        g = <functional, output>
        W(strength) = argmax log posterior(W) + strength g(W)
        Var g = (g(W(strength)) - g(W_0)) / strength

    For a last layer with a Gaussian likelihood the objective is quadratic, so this is the
    Laplace variance for every strength, not only in the limit of a small one. The data's targets
    are replaced by the network's own outputs: residuals have no part in this likelihood's
    curvature, and W_0 is the optimum. The fit climbs along conjugate directions, each step one
    pass over the data; it needs at most as many as the data have different directions.

    With a functional that is 1 at one pixel the value at that pixel is its variance; with one of
    all ones it is each pixel's covariance with the sum (the amortised form of the paper's second
    version, which is no variance of the pixel). The reproduction of BayesDiff gives the name
    "Hessian-free" to `isotropic`, which is something else. Source: McInerney and Kallus 2024
    (Hessian-Free Laplace in Bayesian Deep Learning), section 3.

    Args:
        laplace: prior, layer and noise; its fit is used for `scale` alone, if it has one.
        data: from `cache_layer_inputs`, iterated at every step.
        features: the last layer's input [B, F, H, W] of the images that are asked about.
        functionals: [Q, C, H, W], the same for every image.
        data_size: images of the data set for those in `data`; the posterior's scale where it is
            None.
        strength: the reward's weight, above 0.
        steps: at most so many.
        tolerance: relative size of the gradient at which a fit has converged.

    Returns:
        [Q, B, C, H, W] in the network's output units squared.

    Raises:
        ValueError: if the strength is not positive, or the fit has not converged.
    """
    if not strength > 0:
        raise ValueError(f"strength must be above 0, got {strength:g}")
    layer = laplace.layer
    scale = laplace.state.scale if data_size is None and laplace.sums is not None else 1.0
    if data_size is not None:
        scale = data_size * laplace.visits / sum(len(each.features) for each in data)
    patches = layer.patches(features).double()  # [B, P, K]
    weights = layer.by_position(functionals).to(patches)  # [Q, P, C]
    reward = strength * torch.einsum("qpc,bpk->qbck", weights, patches)  # gradient of strength g
    change = _climb(lambda at: _find_slope(laplace, data, scale, at), reward, steps, tolerance)
    moved = torch.einsum("bpk,qbck->qbpc", patches, change) / strength
    return torch.stack([layer.as_output(each, features) for each in moved])


def _find_slope(
    laplace: LastLayerLaplace,
    data: Iterable[LayerInputs],
    scale: float,
    change: Tensor,
) -> Tensor:
    """Return minus the log posterior's gradient at W_0 + change [Q, B, C, K]."""
    total = laplace.prior_precision * change
    for inputs, noise in data:
        for rows in torch.arange(len(inputs), device=inputs.device).split(laplace.chunk):
            own = laplace.layer.patches(inputs[rows]).double()
            moved = torch.einsum("npk,qbck->qbnpc", own, change) / noise[rows, None, None]
            total = total + scale * torch.einsum("qbnpc,npk->qbck", moved, own)
    return total


def _climb(slope: Callable[[Tensor], Tensor], reward: Tensor, steps: int, tolerance: float) -> Tensor:
    """Return where slope(change) = reward [..., C, K], by conjugate directions.

    Each leading index is a problem of its own.
    """
    change = torch.zeros_like(reward)
    residual = reward.clone()
    direction = residual.clone()
    size = _dot(residual, residual)
    goal = tolerance**2 * size
    for _ in range(steps):
        if bool((size <= goal).all()):
            return change
        ahead = slope(direction)
        slope_along = _dot(direction, ahead).clamp(min=1e-300)
        length = torch.where(size > goal, size / slope_along, torch.zeros_like(size))
        change = change + length * direction
        residual = residual - length * ahead
        before = size
        size = _dot(residual, residual)
        direction = residual + size / before.clamp(min=1e-300) * direction
    if bool((size <= goal).all()):
        return change
    raise ValueError(f"not converged after {steps} steps: allow more, or a larger tolerance")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product over a row's parameters, [Q, B, 1, 1]."""
    return (a * b).sum((-2, -1), keepdim=True)
