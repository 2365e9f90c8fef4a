"""Tiny models with a posterior on disk, for tests that call the Laplace scripts."""

import csv

from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from scripts import fit_laplace
from tests.conftest import tiny_config, tiny_model

DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
TEST = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}


def write_model(folder, **params):
    """A config with data and a checkpoint, and the words that name them."""
    save_checkpoint({"state_dict": tiny_model(**params).state_dict()}, folder / "model.ckpt")
    data = {"params": {"batch_size": 8, "train": DIGITS, "validation": TEST}}
    OmegaConf.save(OmegaConf.create({"model": tiny_config(**params), "data": data}), folder / "tiny.yaml")
    return ["--base", str(folder / "tiny.yaml"), "--ckpt", str(folder / "model.ckpt"), "--device", "cpu"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def opened_with(words):
    return fit_laplace.open_model(fit_laplace.get_parser().parse_args([*words, "--out", "unused"]))


def write_posterior(folder):
    """A guided model, its posterior, a classifier and the features of some digits; (folder, words that name them)."""
    words = write_model(folder, guidance_scale=2.0)
    fit = ["--n", "40", "--draws", "2", "--also", "sandwich", "--prior_precision", "50", "--out", str(folder / "fit")]
    fit_laplace.main([*words, *fit])
    fit_laplace.main([*words, "--n", "20", "--published", "--out", str(folder / "published")])
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), folder / "c.safetensors", {})
    images = ImageSource(data=("target=ldm.data.digits.Digits", "params.split=test"), n=60)
    features = FeatureChoice("classifier", weights=str(folder / "c.safetensors"))
    EvaluateReference(images, str(folder / "ref"), features=features).run()
    return folder, [*words, "--posterior", str(folder / "fit"), "--steps", "4", "--draws", "3"]
