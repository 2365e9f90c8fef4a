"""Are class-conditional samples recognised by a classifier of the real images, and are they copies of these?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.data.own import splits_of
from ldm.evaluation.recognition import PixelClassifier, nearest_distances
from ldm.pipelines import ModelPipeline
from ldm.pipelines.images import real_images


@dataclass(frozen=True)
class Distances:
    """Distances of images from their nearest training image, root mean square in units of -1 .. 1."""

    median: float
    smallest: float


@dataclass(frozen=True)
class RecognisedSamples:
    """What a classifier of the real images says of samples.

    Attributes:
        images: the samples, n of each class, [K n, C, H, W] in [-1, 1].
        rates: the share of each class's samples that is recognised.
        real: the share of real test images that is recognised.
        samples_apart, real_apart: distances of samples and of real test images from the training images.
    """

    images: Tensor
    rates: tuple[float, ...]
    real: float
    samples_apart: Distances
    real_apart: Distances

    @property
    def mean(self) -> float:
        """The share of all samples that is recognised."""
        return float(np.mean(self.rates))

    def first_of_each(self, count: int) -> Tensor:
        """Return the first samples of each class, [K, `count` at most, C, H, W]."""
        return self.images.unflatten(0, (len(self.rates), -1))[:, :count]


def recognise_samples(pipeline: ModelPipeline, n: int, most: int = 10000) -> RecognisedSamples:
    """Sample `n` images of each class, and compare them with the config's training and validation images.

    Args:
        most: training and test images at most, drawn by the pipeline's seed.
    """
    splits = splits_of(pipeline.config, "train", "validation")
    images, labels = real_images(splits["train"], most, pipeline.sampling.seed)
    test_images, test_labels = real_images(splits["validation"], most, pipeline.sampling.seed)
    classifier = PixelClassifier(images, labels)
    own = float(classifier.recognised(test_images, test_labels).mean())
    rates, samples = [], []
    for label in tqdm(range(pipeline.n_classes), desc="classes", unit="class"):
        numbers = range(label * n, (label + 1) * n)
        drawn = pipeline.decode(pipeline.sample_latents([label] * n, numbers))
        samples.append(drawn)
        rates.append(float(classifier.recognised(drawn.permute(0, 2, 3, 1), [label] * n).mean()))
    every = torch.cat(samples)
    apart = _summarise(nearest_distances(every.permute(0, 2, 3, 1), images))
    return RecognisedSamples(every, tuple(rates), own, apart, _summarise(nearest_distances(test_images, images)))


def _summarise(distances: NDArray[np.float64]) -> Distances:
    return Distances(float(np.median(distances)), float(distances.min()))
