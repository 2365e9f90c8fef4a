"""Other samples from states around an intermediate one: how they differ, and whether they repair a bad sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.evaluation.classifier import SmallClassifier, signed
from ldm.evaluation.diversity import pairwise_ssim
from ldm.images import to_uint8
from ldm.pipelines import PosteriorPipeline
from ldm.uncertainty.resampling import finished, step_at, variants
from ldm.util import derive_seed

# Structural similarity looks at windows of this side.
_SSIM_SIDE = 6


@torch.no_grad()
def sample_variants(
    posterior: PosteriorPipeline,
    images: Sequence[int],
    *,
    method: str,
    cut: int,
    kind: str,
    count: int,
    strength: float = 1.0,
) -> Tensor:
    """Return pictures [V, B, C, H, W] in [-1, 1] of `count` variants of some images, that of the state itself first.

    Args:
        images: their numbers [B], the classes in turn.
        method: of `ldm.pipelines.METHODS`, how the variance is propagated.
        cut: steps before the trajectory is left.
        kind, strength: see `ldm.uncertainty.resampling.variants`.
    """
    pipeline = posterior.pipeline
    labels = pipeline.cycle_classes(images)
    at = step_at(posterior.steps(method, labels, images), cut)
    noise = ImageNoise(derive_seed("variants", pipeline.sampling.seed), tuple(images), device=pipeline.device)
    states = variants(at, count, noise, kind, strength)
    denoiser = posterior.build(labels)(pipeline.model.network)
    schedule = pipeline.model.schedule
    ends = finished(posterior.sampler(labels), denoiser, schedule, states, pipeline.times, cut, pipeline.noise(images))
    return pipeline.decode(ends)


@torch.no_grad()
def measure_variants(pictures: Tensor, classifier: SmallClassifier | None, classes: int) -> dict[str, float]:
    """Return what is measured of pictures [V, N, C, H, W], whose first variant is the plain sample.

    Returns:
        diversity, the mean distance between variants (root mean square over pixels in [-1, 1]); ssim, the mean
        structural similarity of pairs (pictures of at least 6 pixels a side); and with a classifier of the N
        pictures' classes in turn: recognised_plain and recognised_variants, shares that it recognises; repaired, the
        share of the plain samples not recognised for which some variant is; broken, the share of the variants of
        recognised samples that are not.
    """
    away = (pictures[:, None] - pictures[None]).square().mean((-3, -2, -1)).sqrt()
    pairs = len(pictures) * (len(pictures) - 1)
    found = {"diversity": float(away.sum((0, 1)).mean() / pairs)}
    if min(pictures.shape[-2:]) >= _SSIM_SIDE:
        found["ssim"] = float(pairwise_ssim(pictures).mean())
    if classifier is None:
        return found
    labels = torch.arange(pictures.shape[1]) % classes
    pixels = torch.from_numpy(to_uint8(pictures.flatten(0, 1))).permute(0, 3, 1, 2)
    right = classifier(signed(pixels)).argmax(1).unflatten(0, pictures.shape[:2]) == labels
    good = right[1:, right[0]]
    bad = right[1:, ~right[0]]
    return found | {
        "recognised_plain": float(right[0].double().mean()),
        "recognised_variants": float(right[1:].double().mean()),
        "repaired": float(bad.any(0).double().mean()) if bad.numel() else float("nan"),
        "broken": float((~good).double().mean()) if good.numel() else float("nan"),
    }
