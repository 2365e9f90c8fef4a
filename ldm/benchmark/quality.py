"""Metrics of pictures by a classifier of real images, and what they gain when the most uncertain are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.benchmark.epistemic import fit_features
from ldm.benchmark.images import BenchmarkImages
from ldm.evaluation.cmmd import cubic_kernel, mmd2
from ldm.evaluation.fid import frechet_distance
from ldm.evaluation.precision_recall import precision_recall
from ldm.evaluation.recognition import PixelClassifier
from ldm.evaluation.statistics import FeatureStatistics, moments
from ldm.util import generator

# {metric: 1 where large is good, -1 where small is}.
PICTURE_METRICS = {"FD": -1, "KID": -1, "precision": 1, "recall": 1}
# Random removals of the same size that a removal is held to.
RANDOM_REMOVALS = 20


@dataclass(frozen=True)
class PictureJudge:
    """A classifier of all training images, and the features of images that nothing was trained on.

    Attributes:
        hidden: weight [D, F] and bias [F] of the layer whose units are the features.
        classifier: says which class a picture is taken for.
        reference: features [N, F] of the held-back images; statistics: their moments.
    """

    hidden: dict[str, Tensor]
    classifier: PixelClassifier
    reference: Tensor
    statistics: FeatureStatistics

    @classmethod
    def make(cls, images: BenchmarkImages) -> PictureJudge:
        """Fit the classifier and its features to the training images, and measure the held-back ones."""
        hidden = fit_features(images.train, images.labels)
        classifier = PixelClassifier(images.train.numpy(), images.labels.numpy())
        reference = find_features(hidden, images.tests)
        return cls(hidden, classifier, reference, moments(reference).statistics())

    def features(self, pictures: Tensor) -> Tensor:
        """Return features [B, F] of pictures [B, D]."""
        return find_features(self.hidden, pictures)

    def recognised(self, pictures: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """Return whether each picture [B, D] is taken for its class [B]."""
        return self.classifier.recognised(pictures.numpy(), labels.numpy())

    def measure(self, features: Tensor) -> dict[str, float]:
        """Return {metric: value} of features [B, F]; FD depends on their number, so compare equal ones."""
        shares = precision_recall(self.reference, features)
        return {
            "FD": frechet_distance(self.statistics, moments(features).statistics()),
            "KID": mmd2(cubic_kernel, self.reference, features).estimate,
            "precision": shares.precision.estimate,
            "recall": shares.recall.estimate,
        }


def find_features(hidden: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the hidden units [B, F] of images [B, D], float64."""
    return torch.relu(images @ hidden["weight"] + hidden["bias"]).double()


@dataclass(frozen=True)
class KeptPictures:
    """What is left of some pictures, measured.

    Attributes:
        judge: of the pictures.
        features: of every picture [B, F].
        seed: of the random removals.
    """

    judge: PictureJudge
    features: Tensor
    seed: int

    def at_random(self, kept: int) -> NDArray[np.float64]:
        """Return the metrics [PICTURE_METRICS], mean over random choices of so many pictures."""
        source = generator("random removals", self.seed)
        chosen = [torch.randperm(len(self.features), generator=source)[:kept] for _ in range(RANDOM_REMOVALS)]
        return np.mean([self.values(one) for one in chosen], 0)

    def values(self, chosen: Tensor) -> NDArray[np.float64]:
        """Return the metrics [PICTURE_METRICS] of the chosen pictures."""
        found = self.judge.measure(self.features[chosen])
        return np.array([found[name] for name in PICTURE_METRICS])
