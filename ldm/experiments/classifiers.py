"""Training of the small classifier on the data of a config, and its accuracy on the images that it did not see."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.data.base import check_class_names
from ldm.data.own import build_dataset
from ldm.evaluation.classifier import Architecture, ClassifierTraining, SmallClassifier, accuracy, train_classifier
from ldm.jobs import step_bar
from ldm.pipelines.images import DataSetImages


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier, and how it came about.

    Attributes:
        data: the training and validation data, as the config names them.
        accuracy: the share of `tests` validation images that it recognises.
        seconds: CPU time of the training.
    """

    model: SmallClassifier
    data: Mapping[str, Any]
    training: ClassifierTraining
    seed: int
    accuracy: float
    tests: int
    seconds: float

    def describe(self) -> dict[str, Any]:
        """Return what the record beside the weights says."""
        return {
            "data": self.data,
            "training": asdict(self.training),
            "seed": self.seed,
            "test_accuracy": self.accuracy,
            "test_images": self.tests,
            "cpu_seconds": round(self.seconds, 1),
        }


def train_on_config(
    config: DictConfig,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> TrainedClassifier:
    """Train on a config's `data.params.train`, and test on its `data.params.validation`.

    Args:
        config: its section `classifier` may hold fields of `ClassifierTraining`, and width and num_features.
        changes: fields of `ClassifierTraining` in place of these.
        seed: of the initial weights and the order of the images.

    Raises:
        ValueError: for an unknown key of the section, or images that are not square.
    """
    section: Any = OmegaConf.to_container(config.get("classifier", OmegaConf.create()))
    known = {field.name for field in fields(ClassifierTraining)}
    sizes = {key: value for key, value in section.items() if key not in known}
    if unknown := set(sizes) - {"width", "num_features"}:
        raise ValueError(
            f"unknown keys {sorted(unknown)} in the section classifier; known: {sorted(known)}, width, num_features"
        )
    training = ClassifierTraining(**{key: value for key, value in section.items() if key in known})
    training = replace(training, **(changes or {}))
    params: Any = OmegaConf.to_container(config.data.params, resolve=True)
    sets = {name: params[name] for name in ("train", "validation")}
    data = build_dataset(sets["train"])
    images, labels = DataSetImages(data).everything()
    tests = build_dataset(sets["validation"])
    check_class_names(data, tests)
    _, channels, side, other = images.shape
    if side != other:
        raise ValueError(f"expected square images, got {side} x {other}")
    model = SmallClassifier(Architecture(channels, side, data.n_classes, **sizes), seed)
    began = time.process_time()
    with step_bar("steps") as progress:
        train_classifier(model, images, labels, training, seed, progress, device)
    seconds = time.process_time() - began
    test_images, test_labels = DataSetImages(tests).everything()
    rate = accuracy(model, test_images, test_labels)
    return TrainedClassifier(model, sets, training, seed, rate, len(test_labels), seconds)
