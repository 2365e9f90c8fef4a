"""Noise in standard deviations of the data: how large the data of a loaded ensemble are, of how many numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.pipelines.branching import BranchingPipeline
from ldm.uncertainty.channel import NoiseLevel

# Samples of the base model that the standard deviation of the data is measured on, where nobody says it.
DATA_SAMPLES = 64


def count_elements(pipeline: BranchingPipeline, image: bool) -> int:
    """Return how many numbers an image has, or a latent."""
    latent = torch.zeros(pipeline.model.latent_shape, device=pipeline.device)
    return (pipeline.decode(latent) if image else latent).numel()


def measure_data_deviation(pipeline: BranchingPipeline, image: bool) -> float:
    """Return the standard deviation of an element of the data around its mean, root mean square over the elements.

    It is that of `DATA_SAMPLES` samples of the base model, over all classes: of images in [-1, 1], or of latents. It is
    rounded to three digits, so that all processes of a run find the same.

    Raises:
        ValueError: if all samples are alike, or one is not finite.
    """
    latents = draw_data_samples(pipeline)
    return find_deviation(pipeline.decode(latents) if image else latents)


def draw_data_samples(pipeline: BranchingPipeline) -> Tensor:
    """Draw `DATA_SAMPLES` latents [B, c, h, w] of the base model, over all classes."""
    count = pipeline.n_classes
    images = range(DATA_SAMPLES)
    if count <= DATA_SAMPLES:
        return pipeline.sample_latents(pipeline.cycle_classes(images), images)
    return pipeline.sample_latents([index * count // DATA_SAMPLES for index in images], images)


def find_deviation(samples: Tensor) -> float:
    """Return the standard deviation of an element around its mean, root mean square, in three digits.

    Raises:
        ValueError: if all samples [B, C, H, W] are alike, or one is not finite.
    """
    found = float(f"{samples.double().var(0).mean().sqrt().item():.3g}")
    if not 0 < found < float("inf"):
        raise ValueError(
            f"{len(samples)} samples of the base model have the standard deviation {found:g}, which is no unit for "
            "noise: look at its samples, or say the deviation of the data (data_sd)"
        )
    return found


def make_noise_level(
    pipeline: BranchingPipeline, level: float, compared: str, data_sd: float | None = None
) -> NoiseLevel:
    """Return noise of `level` standard deviations of the data, for what is compared: x0, or image.

    Args:
        data_sd: standard deviation of the data, in units of latents, or of images in [-1, 1]; measured where None.
    """
    image = compared == "image"
    found = measure_data_deviation(pipeline, image) if data_sd is None else data_sd
    return NoiseLevel(level, found, count_elements(pipeline, image))


def find_pixel_factor(pipeline: BranchingPipeline, level: float, space: str, joint: bool) -> float:
    """Return what a pixel's squared distance is multiplied by to be the KL divergence seen through noise.

    Args:
        space: image, whose values are in [0, 1], or latent.
        joint: a pixel's channels are one event.
    """
    image = space == "image"
    latent = torch.zeros(pipeline.model.latent_shape, device=pipeline.device)
    channels = (pipeline.decode(latent) if image else latent).shape[0] if joint else 1
    found = measure_data_deviation(pipeline, image) / (2 if image else 1)
    return NoiseLevel(level, found, channels).factor
