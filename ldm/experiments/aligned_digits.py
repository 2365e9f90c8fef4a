"""Trainings of a small transformer on digits by `decu train`, with and without alignment of its tokens (REPA)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ldm.evaluation.classifier import (
    Architecture,
    ClassifierTraining,
    SmallClassifier,
    save_classifier,
    train_classifier,
)
from ldm.experiments.judged_digits import Judge, to_bytes, to_square
from ldm.experiments.small_networks import read_digits, read_mnist
from ldm.pipelines import load_model
from ldm.settings import Sampling, Training
from ldm.training.runs import RunDirectory, runs_named
from ldm.training.session import train

DIGITS_CONFIG = "configs/uvit/digits.yaml"
# A small DiT of 16 tokens that regresses v, whose errors count evenly where an eps network has learned little.
DIT = (
    "model.params.parameterization=v",
    "model.params.unet_config.target=ldm.modules.dit.DiT",
    "model.params.unet_config.params={{input_size: {side}, patch_size: {patch}, in_channels: 1, hidden_size: 64, "
    "depth: 4, num_heads: 4, num_classes: 10, learn_sigma: false}}",
)
SAMPLER = Sampling("DPM-Solver++", steps=15, scale=1.0)


@dataclass(frozen=True)
class AlignmentTrainings:
    """A folder of trainings, which are made where they are missing.

    Attributes:
        folder: of the runs and the teacher.
        steps: of the optimiser.
        batch: images of a step.
        mnist: folder of MNIST, which is trained on in place of scikit-learn's digits.
        side: of the images in pixels, a multiple of 4.
    """

    folder: Path
    steps: int
    batch: int
    mnist: str | None = None
    side: int = 8

    @property
    def teacher(self) -> Path:
        """The file of a classifier of the training split, whose features the tokens are aligned with.

        It is another network than a `Judge`, and has not seen the held-out images.
        """
        path = self.folder / "teacher.safetensors"
        if not path.exists():
            images, labels = read_mnist(self.mnist, "train", self.side) if self.mnist else read_digits("train")
            model = SmallClassifier(Architecture(1, self.side, 10, num_features=64), 1)
            training = ClassifierTraining(epochs=2 if self.mnist else 5)
            train_classifier(model, to_bytes(to_square(images)), labels, training, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_classifier(model, path, {"data": "the digits' training split"})
        return path

    def make(self, aligned: bool, seed: int) -> Training:
        """Return a training."""
        words = [
            f"data.params.batch_size={self.batch}",
            f"model.params.scheduler_config.params.cycle_lengths=[{self.steps}]",
            "lightning.callbacks.image_logger.params.disabled=true",
            f"model.params.image_size={self.side}",
            *(word.format(side=self.side, patch=self.side // 4) for word in DIT),
        ]
        if self.mnist:
            words += self.name_mnist(Path(self.mnist).resolve())
        if aligned:
            words.append("model.params.alignment_config={tap: layer-1, features: classifier, width: 256}")
            words.append(f"model.params.alignment_config.weights={self.teacher}")
        options = {"max_steps": self.steps, "enable_progress_bar": False, "limit_val_batches": 0}
        name = f"{'aligned' if aligned else 'plain'}_seed{seed}"
        return Training(base=(DIGITS_CONFIG,), name=name, logdir=str(self.folder / "runs"), seed=seed, scale_lr=False,
                        gpus="0", trainer=options, changes=tuple(words))  # fmt: skip

    def name_mnist(self, root: Path) -> list[str]:
        """Return the words that put MNIST in place of the config's images."""
        words = []
        for part, split in {"train": "train", "validation": "test"}.items():
            place = f"data.params.{part}"
            words.append(f"{place}.target=ldm.data.idx.MNIST")
            words.append(f"{place}.params={{root: {root}, split: {split}, image_size: {self.side}, fit: resize}}")
        return words

    def run(self, aligned: bool, seed: int) -> RunDirectory:
        """Return a run, which is trained if no training of it came to its end."""
        training = self.make(aligned, seed)
        Path(training.logdir).mkdir(parents=True, exist_ok=True)
        for run in runs_named(training.logdir, f"_{training.name}"):
            if run.finished.exists():
                return run
            shutil.rmtree(run.path)
        return RunDirectory(train(training))

    def measure(self, aligned: bool, seed: int, judge: Judge, n: int) -> Mapping[str, float]:
        """Measure samples of all classes in turn, without guidance."""
        pipeline = load_model(self.run(aligned, seed).path, SAMPLER, device="cpu")
        labels = [image % 10 for image in range(n)]
        images = pipeline.decode(pipeline.sample_latents(labels, range(n)))
        return asdict(judge.measure(images, torch.tensor(labels)))
