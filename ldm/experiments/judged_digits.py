"""Drawn digits judged by a classifier of all real ones: likeness, variety, and whether they are of their class."""

from __future__ import annotations

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
    """A classifier of all digits, and its features of them."""

    model: SmallClassifier
    features: Tensor
    radii: Tensor

    @classmethod
    def make(cls) -> Judge:
        """Train the classifier on both splits."""
        parts = [read_digits(split) for split in ("train", "test")]
        images = to_bytes(torch.cat([part[0] for part in parts]).reshape(-1, 1, 8, 8))
        model = SmallClassifier(Architecture(1, 8, 10), 0)
        train_classifier(model, images, torch.cat([part[1] for part in parts]), ClassifierTraining(epochs=10), 0)
        with torch.no_grad():
            features = model.activations(signed(images))[1].double()
        return cls(model, features, squared_radii(features, 3))

    @torch.no_grad()
    def measure(self, samples: Tensor, labels: Tensor) -> Classed:
        """Measure samples [B, 1, 8, 8]."""
        _, features, logits = self.model.activations(signed(to_bytes(samples)))
        features = features.double()
        found = precision_recall(self.features, features, radii=self.radii)
        distance = frechet_distance(moments(self.features).statistics(), moments(features).statistics())
        recognised = float((logits.argmax(1) == labels).double().mean())
        return Classed(found.precision.estimate, found.recall.estimate, distance, recognised)


def to_bytes(images: Tensor) -> Tensor:
    """Return pictures as uint8 [B, 1, 8, 8]."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
