"""Maps that look like uncertainty and know nothing of weights: what a Bayesian map has to beat.

Much of a last layer's predictive variance is the size of its features, and much of that are edges; so each of these is
a control for the claim that a map shows what a model does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.samplers import Step, run
from ldm.laplace import LastLayerLaplace


def feature_energy(laplace: LastLayerLaplace, features: Tensor) -> Tensor:
    """|a_p|^2 of the last layer's patch at each position [B, C, H, W], the bias's 1 included: no data, no posterior.

    The reproduction's "Hessian-free" map is this over a constant (curvature `isotropic`).
    """
    ones = torch.ones(1, laplace.layer.width, dtype=torch.float64)
    return laplace.layer.for_all_outputs(laplace.layer.apply(ones, features.square()))


def edge_strength(images: Tensor) -> Tensor:
    """Squared length of the gradient [B, 1, H, W] of images [B, C, H, W], by Sobel's filters, channels averaged."""
    rows = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=images.dtype, device=images.device) / 8
    filters = torch.stack([rows, rows.T])[:, None]
    flat = F.pad(images.flatten(0, 1)[:, None], [1] * 4, mode="replicate")
    return F.conv2d(flat, filters).square().sum(1).unflatten(0, images.shape[:2]).mean(1, keepdim=True)


def successive_differences(steps: Iterable[Step]) -> Tensor:
    """Sum over steps of |x_0_hat' - x_0_hat| [B, C, H, W]: how much the predicted image still moves along the way."""
    before, moved = None, None
    for step in steps:
        if before is not None:
            change = (step.x0 - before).abs()
            moved = change if moved is None else moved + change
        before = step.x0
    if moved is None:
        raise ValueError("the control map differences compares steps: take at least two steps, got fewer")
    return moved


def seed_variance(sample: Callable[[int], Iterator[Step]], seeds: int) -> Tensor:
    """Unbiased variance [B, C, H, W] over seeds of one model's final images.

    Args:
        sample: seed -> the steps of a sampler that draws noise (eta > 0), from one state of the plain trajectory:
            what the data leave open there, whatever the weights are.
        seeds: how many, at least 2.
    """
    if seeds < 2:
        raise ValueError(f"a variance over seeds needs at least 2, got {seeds}")
    return torch.stack([run(sample(seed)) for seed in range(seeds)]).var(0)
