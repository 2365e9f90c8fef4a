"""Tiny models with a posterior on disk, for tests of the Laplace commands."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.shared import ModelSource, Placement, PosteriorSource
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.settings import Sampling
from tests.conftest import tiny_config, tiny_model

DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
TEST = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
CPU = Placement("cpu")


class LeftHalf(torch.nn.Module):
    """A segmentation model that knows where the object is."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def forward(self, images):
        return (torch.arange(images.shape[-1]) < self.columns).double().expand(images.shape[0], *images.shape[2:])


@dataclass(frozen=True)
class Written:
    """A guided model, its posteriors `fit` and `published`, a classifier, and the features `ref` of some digits."""

    folder: Path
    model: ModelSource

    @property
    def classifier(self):
        return str(self.folder / "c.safetensors")

    @property
    def posterior(self):
        return PosteriorSource(str(self.folder / "fit"), draws=3)

    @property
    def published(self):
        return replace(self.posterior, posterior=str(self.folder / "published"))

    def load(self, **sampling):
        """The model, ready to sample in four steps."""
        return self.model.load(Sampling(**{"steps": 4, **sampling}), device="cpu")

    @property
    def shared(self):
        """Fields that the commands share: model, posterior, four steps, on the CPU."""
        return {
            "source": self.model,
            "posterior": self.posterior,
            "sampling": Sampling(steps=4),
            "place": CPU,
        }

    @property
    def words(self):
        """The same as words of a command line."""
        posterior = ["--posterior", str(self.folder / "fit"), "--steps", "4", "--draws", "3"]
        return [*model_words(self.model), *posterior]


def write_model(folder, **params):
    """Write a config with data and a checkpoint."""
    save_checkpoint({"state_dict": tiny_model(**params).state_dict()}, folder / "model.ckpt")
    data = {"params": {"batch_size": 8, "train": DIGITS, "validation": TEST}}
    OmegaConf.save(OmegaConf.create({"model": tiny_config(**params), "data": data}), folder / "tiny.yaml")
    return ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))


def model_words(model):
    """A model as words of a command line, on the CPU."""
    return ["--base", model.base, "--ckpt", model.ckpt, "--device", "cpu"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_posterior(folder):
    """A guided model, its posteriors, a classifier and the features of some digits."""
    model = write_model(folder, guidance_scale=2.0)
    fit = FitLaplace(model, str(folder / "fit"), n=40, draws=2, also=("sandwich",), prior_precision=50.0, place=CPU)
    fit.run()
    FitLaplace(model, str(folder / "published"), n=20, published=True, place=CPU).run()
    written = Written(folder, model)
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), written.classifier, {})
    images = ImageSource(data=("target=ldm.data.digits.Digits", "params.split=test"), n=60)
    features = FeatureChoice("classifier", weights=written.classifier)
    EvaluateReference(images, str(folder / "ref"), features=features, place=CPU).run()
    return written
