"""Drawn digits judged by a classifier of real ones: likeness, variety, and whether they are of their class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.classifier import Architecture, ClassifierTraining, SmallClassifier, signed, train_classifier
from ldm.evaluation.fid import frechet_distance
from ldm.evaluation.precision_recall import precision_recall, squared_radii
from ldm.evaluation.statistics import moments
from ldm.experiments.small_networks import read_digits
from ldm.images import to_uint8


@dataclass(frozen=True)
class Classed:
    """How samples lie to the real digits in a classifier's features, and the share of them that it recognises."""

    precision: float
    recall: float
    frechet: float
    recognised: float


@dataclass(frozen=True)
class Judge:
    """A classifier of digits, and its features of real ones."""

    model: SmallClassifier
    features: Tensor
    radii: Tensor

    @classmethod
    def make(cls) -> Judge:
        """Train the classifier on both splits of scikit-learn's digits, with all of which samples are compared."""
        parts = [read_digits(split) for split in ("train", "test")]
        images = torch.cat([part[0] for part in parts])
        return cls.train(images, torch.cat([part[1] for part in parts]), images, epochs=10)

    @classmethod
    def train(cls, images: Tensor, labels: Tensor, real: Tensor, epochs: int) -> Judge:
        """Train the classifier.

        Args:
            images, labels: that it is trained on, square pictures [N, D] in [-1, 1] and their classes [N].
            real: with which samples are compared, [R, D].
            epochs: of its training.
        """
        pictures = to_square(images)
        model = SmallClassifier(Architecture(1, pictures.shape[2], 10), 0)
        train_classifier(model, to_bytes(pictures), labels, ClassifierTraining(epochs=epochs), 0)
        with torch.no_grad():
            features = model.activations(signed(to_bytes(to_square(real))))[1].double()
        return cls(model, features, squared_radii(features, 3))

    @torch.no_grad()
    def measure(self, samples: Tensor, labels: Tensor) -> Classed:
        """Measure samples [B, 1, S, S]."""
        _, features, logits = self.model.activations(signed(to_bytes(samples)))
        features = features.double()
        found = precision_recall(self.features, features, radii=self.radii)
        distance = frechet_distance(moments(self.features).statistics(), moments(features).statistics())
        recognised = float((logits.argmax(1) == labels).double().mean())
        return Classed(found.precision.estimate, found.recall.estimate, distance, recognised)


def to_square(images: Tensor) -> Tensor:
    """Return square pictures [B, 1, S, S] of their pixels in a row [B, S S]."""
    side = math.isqrt(images.shape[1])
    return images.reshape(-1, 1, side, side)


def to_bytes(images: Tensor) -> Tensor:
    """Return pictures as uint8 [B, 1, S, S]."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
