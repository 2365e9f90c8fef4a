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
from ldm.experiments.judged_digits import Judge, to_bytes
from ldm.experiments.small_networks import read_digits
from ldm.pipelines import load_model
from ldm.settings import Sampling, Training
from ldm.training.runs import RunDirectory, runs_named
from ldm.training.session import train

DIGITS_CONFIG = "configs/uvit/digits.yaml"
DIT = (
    "model.params.unet_config.target=ldm.modules.dit.DiT",
    "model.params.unet_config.params={input_size: 8, patch_size: 2, in_channels: 1, hidden_size: 64, depth: 4, "
    "num_heads: 4, num_classes: 10, learn_sigma: false}",
)
SAMPLER = Sampling("DPM-Solver++", steps=15, scale=1.0)


@dataclass(frozen=True)
class AlignmentTrainings:
    """A folder of trainings, which are made where they are missing.

    Attributes:
        folder: of the runs and the teacher.
        steps: of the optimiser.
        batch: images of a step.
    """

    folder: Path
    steps: int
    batch: int

    @property
    def teacher(self) -> Path:
        """The file of a classifier of the training split, whose features the tokens are aligned with.

        It is another network than a `Judge`, and has not seen the held-out images.
        """
        path = self.folder / "teacher.safetensors"
        if not path.exists():
            images, labels = read_digits("train")
            model = SmallClassifier(Architecture(1, 8, 10, num_features=64), 1)
            train_classifier(model, to_bytes(images.reshape(-1, 1, 8, 8)), labels, ClassifierTraining(epochs=5), 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_classifier(model, path, {"data": "the digits' training split"})
        return path

    def make(self, aligned: bool, seed: int) -> Training:
        """Return a training."""
        words = [
            f"data.params.batch_size={self.batch}",
            f"model.params.scheduler_config.params.cycle_lengths=[{self.steps}]",
            "lightning.callbacks.image_logger.params.disabled=true",
            *DIT,
        ]
        if aligned:
            words.append("model.params.alignment_config={tap: layer-1, features: classifier, width: 256}")
            words.append(f"model.params.alignment_config.weights={self.teacher}")
        options = {"max_steps": self.steps, "enable_progress_bar": False, "limit_val_batches": 0}
        name = f"{'aligned' if aligned else 'plain'}_seed{seed}"
        return Training(base=(DIGITS_CONFIG,), name=name, logdir=str(self.folder / "runs"), seed=seed, scale_lr=False,
                        gpus="0", trainer=options, changes=tuple(words))  # fmt: skip

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
