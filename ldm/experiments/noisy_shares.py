"""Classifiers of noisy images that several processes share: what a frozen network computes, in parts of a work list.

A head on frozen features learns from what the backbone makes of each epoch's batches, and is tested on what it makes
of the test images: both are read in parts, and whoever finishes last trains and tests the head on them. Of a classifier
that does not train here, each process tests a share of the images. Parts hold whole batches, so that one process finds
what several do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.evaluation.noise_conditional import (
    TEST_BATCH,
    BackboneClassifier,
    NoisyTraining,
    count_right,
    draw_batch,
    draw_times,
    minimise_noisy,
)
from ldm.experiments.noisy_classifiers import NoisyStudy, tabulate_recognition, tested_levels
from ldm.jobs import WorkList, split_range, step_bar
from ldm.pipelines.features import DataStates

# Training batches in a part.
BATCHES_A_PART = 32


@dataclass(frozen=True)
class NoisyShares:
    """A study of a classifier of noisy images, shared between the processes of a work list.

    Attributes:
        study: the classifier, and what it is tried on.
        folder: where parts are kept, a folder of their own for each set of settings.
        settings: what the classifier depends on: its weights, its layer.
        shard: (rank, world) of this process.
        seed: of everything that is drawn.
        n_train, n_test: images, all where None.
        training: of the head; None where nothing trains.
    """

    study: NoisyStudy
    folder: Path
    settings: Mapping[str, Any]
    shard: tuple[int, int]
    seed: int
    n_test: int | None
    n_train: int | None = None
    training: NoisyTraining | None = None

    def compute(self) -> bool:
        """Compute what this process's share lacks; whether all is there, whoever computed it."""
        if self.training is None:
            return self._compute_tests()
        trained = self._read_training(self.training)
        return self._read_tests() and trained

    def finish(self) -> list[dict[str, float]]:
        """Train the head on what was read, where one trains, and return a row a noise level."""
        if self.training is not None:
            self._train(self.training)
            return self._test()
        tests = self._tests()
        right = sum(torch.tensor(tests.load(key)["right"]) for key in self._test_parts())
        assert isinstance(right, Tensor)
        images = sum(len(rows) for rows in self._test_parts().values())
        return tabulate_recognition(self.study.schedule, (right / images).tolist())

    # What the parts are

    def _states(self, split: str) -> DataStates:
        return self.study.states(split, self.n_train if split == "train" else self.n_test, self.seed)

    def _work(self, name: str, states: DataStates, **more: Any) -> WorkList:
        settings = {**self.settings, "states": states.describe(), "seed": self.seed, **more}
        return WorkList.apart(self.folder / name, settings, self.shard)

    def _tests(self) -> WorkList:
        return self._work("tests", self._states("validation"))

    def _test_parts(self) -> dict[str, range]:
        return split_range(len(self._states("validation")), TEST_BATCH)

    def _trained(self, training: NoisyTraining) -> WorkList:
        return self._work("training", self._states("train"), training=vars(training))

    def _train_parts(self, training: NoisyTraining) -> dict[str, tuple[int, range]]:
        """Return {key: (epoch, batches of it)}."""
        batches = training.batches(len(self._states("train")), self.seed)
        each = split_range(batches.per_epoch, BATCHES_A_PART)
        return {f"{epoch:04d}_{key}": (epoch, part) for epoch in range(batches.epochs) for key, part in each.items()}

    # Computing and reading them

    def _compute_tests(self) -> bool:
        states = self._states("validation")
        work, parts = self._tests(), self._test_parts()
        classifier = self.study.classifier.eval()
        levels = tested_levels(self.study.schedule)
        for key in tqdm(work.pending(parts), desc="recognition", unit="part"):
            right = count_right(classifier, states, torch.tensor(parts[key]), levels, self.seed)
            work.save(key, {"right": right.tolist()})
        return work.complete(parts)

    def _read_training(self, training: NoisyTraining) -> bool:
        states = self._states("train")
        work, parts = self._trained(training), self._train_parts(training)
        batches = training.batches(len(states), self.seed)
        assert self.study.times is not None
        for key in tqdm(work.pending(parts), desc="features of training images", unit="part"):
            epoch, part = parts[key]
            rows, source = batches.of_epoch(epoch)
            times = [draw_times(self.study.times, one, source) for one in rows]
            found = [self._head.read(*draw_batch(states, rows[index], epoch, self.seed), times[index])
                     for index in part]  # fmt: skip
            self._save(work, key, found, [times[index] for index in part])
        return work.complete(parts)

    def _read_tests(self) -> bool:
        states = self._states("validation")
        work, parts = self._tests(), self._test_parts()
        levels = tested_levels(self.study.schedule)
        for key in tqdm(work.pending(parts), desc="features of test images", unit="part"):
            found: list[Tensor] = []
            times: list[Tensor] = []

            def read(x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
                found.append(self._head.read(x0, eps, u))  # noqa: B023  # the list of this part
                times.append(u)  # noqa: B023
                return x0.new_zeros(len(x0), 1)

            count_right(read, states, torch.tensor(parts[key]), levels, self.seed)
            self._save(work, key, found, times)
        return work.complete(parts)

    @property
    def _head(self) -> BackboneClassifier:
        assert isinstance(self.study.classifier, BackboneClassifier)
        return self.study.classifier

    @staticmethod
    def _save(work: WorkList, key: str, features: Sequence[Tensor], times: Sequence[Tensor]) -> None:
        tensors = {f"features.{index}": value.cpu().contiguous() for index, value in enumerate(features)}
        tensors |= {f"times.{index}": value for index, value in enumerate(times)}
        save_tensors(tensors, work.folder / f"{key}.safetensors", overwrite=True)
        work.save(key, {"batches": len(features)})

    def _load(self, work: WorkList, keys: Sequence[str], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features [B, C] and times [B], batch by batch, part by part."""
        for key in keys:
            held = load_state_dict(work.folder / f"{key}.safetensors")
            for index in range(work.load(key)["batches"]):
                yield held[f"features.{index}"].to(device), held[f"times.{index}"]

    # Training and testing a head on them

    def _train(self, training: NoisyTraining) -> None:
        states = self._states("train")
        device = next(self._head.parameters()).device
        stored = self._load(self._trained(training), list(self._train_parts(training)), device)

        def loss(rows: Tensor, _epoch: int, _source: torch.Generator) -> Tensor:
            features, u = next(stored)
            return F.cross_entropy(self._head.classify(features, u), states.labels[rows].to(device))

        with step_bar("training") as progress:
            minimise_noisy(self._head, loss, training, len(states), self.seed, progress)

    @torch.no_grad()
    def _test(self) -> list[dict[str, float]]:
        states = self._states("validation")
        device = next(self._head.parameters()).device
        levels = tested_levels(self.study.schedule)
        right = torch.zeros(len(levels))
        for key, rows in self._test_parts().items():
            stored = self._load(self._tests(), [key], device)
            labels = states.labels[list(rows)]
            right += torch.stack([(self._head.classify(*one).argmax(1).cpu() == labels).sum() for one in stored])
        return tabulate_recognition(self.study.schedule, (right / len(states)).tolist())
