"""Hessian-free Laplace: a prediction's variance from how far it moves when the fit is rewarded for moving it.

    W(strength) = argmax log posterior(W) + strength g(W),     Var g = (g(W(strength)) - g(W_0)) / strength

for a scalar g of the output: a pixel, a patch, the image's sum. No Hessian is formed, factorised or stored: the fit
sees data, and a layer's width of numbers at a time. For a last layer with a Gaussian likelihood the objective is
quadratic, so the answer is the Laplace variance for every strength, not only in the limit of a small one. The data's
targets are replaced by the network's own outputs: residuals have no part in this likelihood's curvature, and W_0 is the
optimum.

The reproduction of BayesDiff gives this name to `isotropic`, which is something else.

Source: McInerney and Kallus 2024 (Hessian-Free Laplace in Bayesian Deep Learning), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ldm.laplace.posterior import LastLayerLaplace
from ldm.laplace.statistics import Observation


@torch.no_grad()
def cached_features(laplace: LastLayerLaplace, batches: Iterable[Observation]) -> list[tuple[Tensor, Tensor]]:
    """(last layer's input, variance of the noise [B]) of every batch: the frozen trunk runs once."""
    return [
        (laplace.features(batch.x, batch.t, batch.cond), laplace.noise_variance(batch.t) * laplace.temperature)
        for batch in batches
    ]


@torch.no_grad()
def hessian_free_covariance(
    laplace: LastLayerLaplace,
    data: Iterable[tuple[Tensor, Tensor]],
    features: Tensor,
    functionals: Tensor,
    *,
    data_size: int | None = None,
    strength: float = 1.0,
    steps: int = 1000,
    tolerance: float = 1e-10,
) -> Tensor:
    """Cov(output, g) of every output with Q scalars g = <functional, output> of its image, by fine-tuning.

    The fit climbs log posterior + strength g along conjugate directions, each step one pass over the data; it needs at
    most as many as the data have different directions. With a functional that is 1 at one pixel the value at that pixel
    is its variance; with one of all ones it is each pixel's covariance with the sum (the amortised form of the paper's
    second version, which is no variance of the pixel).

    Args:
        laplace: prior, layer and noise; its fit is used for `scale` alone, if it has one.
        data: from `cached_features`, iterated at every step.
        features: the last layer's input [B, F, H, W] of the images that are asked about.
        functionals: [Q, C, H, W], the same for every image.
        data_size: images of the data set for those in `data`; the posterior's scale where None.
        strength: lambda, above 0.
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
    scale = laplace.scale if data_size is None and laplace.statistics is not None else 1.0
    if data_size is not None:
        scale = data_size / (sum(len(each) for each, _ in data) / laplace.repeats)
    patches = layer.patches(features).double()  # [B, P, K]
    weights = layer.by_position(functionals).to(patches)  # [Q, P, C]
    reward = strength * torch.einsum("qpc,bpk->qbck", weights, patches)  # gradient of strength g

    def slope(change: Tensor) -> Tensor:
        """Minus the log posterior's gradient at W_0 + change [Q, B, C, K]."""
        total = laplace.prior_precision * change
        for inputs, noise in data:
            for rows in torch.arange(len(inputs), device=inputs.device).split(laplace.chunk):
                own = layer.patches(inputs[rows]).double()
                moved = torch.einsum("npk,qbck->qbnpc", own, change) / noise[rows, None, None]
                total = total + scale * torch.einsum("qbnpc,npk->qbck", moved, own)
        return total

    change = climbed(slope, reward, steps, tolerance)
    moved = torch.einsum("bpk,qbck->qbpc", patches, change) / strength
    shaped = [layer.as_output(each, features) for each in moved]
    return torch.stack(shaped)


def climbed(slope: Callable[[Tensor], Tensor], reward: Tensor, steps: int, tolerance: float) -> Tensor:
    """Where slope(change) = reward, by conjugate directions; each leading index its own problem [..., C, K].

    Raises:
        ValueError: if it is not converged after `steps`.
    """
    change, residual = torch.zeros_like(reward), reward.clone()
    direction, size = residual.clone(), _dot(residual, residual)
    goal = tolerance**2 * size
    for _ in range(steps):
        if bool((size <= goal).all()):
            return change
        ahead = slope(direction)
        length = torch.where(size > goal, size / _dot(direction, ahead).clamp(min=1e-300), torch.zeros_like(size))
        change, residual = change + length * direction, residual - length * ahead
        before, size = size, _dot(residual, residual)
        direction = residual + size / before.clamp(min=1e-300) * direction
    if bool((size <= goal).all()):
        return change
    raise ValueError(f"not converged after {steps} steps: allow more, or a larger tolerance")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over a row's parameters, [Q, B, 1, 1]."""
    return (a * b).sum((-2, -1), keepdim=True)
