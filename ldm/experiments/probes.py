"""Probes of a loaded model on its own data: features kept on disk, heads chosen on validation images, one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.checkpoint import sha256
from ldm.data.base import check_class_names
from ldm.data.module import DataModuleFromConfig
from ldm.data.own import complete_dataset, splits_of
from ldm.evaluation.finetuning import Tuning, tune
from ldm.evaluation.grid_features import GridFeatures, load_or_make_features, make_feature_parts
from ldm.evaluation.probe import Arrays, ProbeResult, ProbeTraining, probe, validation_split
from ldm.evaluation.taps import Backbone, Place, Reading, place_name
from ldm.jobs import step_bar
from ldm.pipelines.features import DataStates
from ldm.pipelines.laplace import chosen_positions as drawn_positions
from ldm.pipelines.model import ModelPipeline
from ldm.training.latent_cache import prepare_latents
from ldm.trust import escape

PIXELS: Place = (0.0, "pixels")
# Seeds of test noises lie this far above those of training noises.
TEST_SEEDS = 1000


def draw_probe_positions(count: int, wanted: int | None, seed: int) -> list[int]:
    """Ascending positions of `wanted` images of `count`, drawn by the seed; all of them where None."""
    return sorted(drawn_positions(count, wanted, seed, "probe images"))


@dataclass(frozen=True)
class ProbePlan:
    """How a model's features are probed.

    Attributes:
        training: how the heads learn.
        tuning: how the encoder and its head learn.
        seed: of the first split, order and test noise; `seeds` count on from it.
        n_train: training images, drawn by the seed; all where None.
        copies: noised and augmented copies of each training image, between which epochs take turns.
        validation: the share of the training images that heads are chosen on.
        images_per_pass: images in one pass through the backbone.
        latent_cache: a folder for latents of a model with a first stage.
    """

    training: ProbeTraining = field(default_factory=ProbeTraining)
    tuning: Tuning = field(default_factory=Tuning)
    seed: int = 42
    seeds: int = 3
    n_train: int | None = None
    copies: int = 1
    validation: float = 0.1
    images_per_pass: int = 100
    latent_cache: str | None = None


class ProbeStudy:
    """Training and test images of a model's config, and the probes of what is read from them.

    Args:
        plan: how many images, heads and seeds.
        folder: where features are kept.

    Raises:
        ValueError: if the config names no images to test on.
    """

    def __init__(self, pipeline: ModelPipeline, plan: ProbePlan, folder: Path):
        self.pipeline = pipeline
        self.plan = plan
        self.folder = folder
        splits_of(pipeline.config, "train", "validation")
        config = OmegaConf.create(escape(OmegaConf.to_container(OmegaConf.create(pipeline.config), resolve=True)))
        params = config.data.params
        if plan.latent_cache:
            params.update({"latent_cache": plan.latent_cache, "latent_views": plan.copies})
        params = OmegaConf.to_container(params, resolve=True)
        self.configs = {"train": params["train"], "test": params["validation"]}
        known = {key: value for key, value in params.items() if key not in ("global_batch_size", "test", "predict")}
        module = DataModuleFromConfig(**{"batch_size": plan.images_per_pass, **known})
        module.setup()
        prepare_latents(pipeline.model, config, module, pipeline.device)
        splits = {"train": "train", "test": "validation"}
        self.data = {name: complete_dataset(module.dataset(split)) for name, split in splits.items()}
        check_class_names(self.data["train"], self.data["test"])
        self.classes = self.data["train"].n_classes
        self.positions = draw_probe_positions(len(self.data["train"]), plan.n_train, plan.seed)
        self.seeds = range(plan.seed, plan.seed + plan.seeds)

    def states(self, split: str, copy: int = 0) -> DataStates:
        """States of the training images (those chosen) or of all test images."""
        positions = self.positions if split == "train" else None
        return DataStates(self.pipeline.model, self.data[split], positions, copy, self.configs[split])

    def _settings(self, backbone: Backbone, weights: str | None) -> dict[str, Any]:
        """What features depend on beside images and places; `weights` names the backbone's, else the checkpoint's."""
        weights = weights or sha256(self.pipeline.checkpoint)
        return {"weights": weights, "precision": self.pipeline.speed.precision, "label": backbone.cond}

    def read(
        self, backbone: Backbone, reading: Reading, split: str, name: str, weights: str | None = None, copy: int = 0
    ) -> GridFeatures:
        """Features below `folder/name`, read or made."""
        states = self.states(split, copy)
        with tqdm(total=len(states), desc=name, unit="image") as bar:
            return load_or_make_features(
                states, backbone, reading, self.folder / name, self._settings(backbone, weights),
                batch_size=self.plan.images_per_pass, progress=bar.update,
            )  # fmt: skip

    def read_share(
        self, backbone: Backbone, reading: Reading, name: str, shard: tuple[int, int], weights: str | None = None
    ) -> bool:
        """Read this process's share of the training images; whether all are read, whoever did."""
        complete = True
        for copy, copy_name, one in self._copies(reading, name):
            states, settings = self.states("train", copy), self._settings(backbone, weights)
            with tqdm(desc=copy_name, unit="image") as bar:
                work, parts = make_feature_parts(
                    states, backbone, one, self.folder / copy_name, settings,
                    batch_size=self.plan.images_per_pass, shard=shard, progress=bar.update,
                )  # fmt: skip
            complete = work.complete(parts) and complete
        return complete

    def _copies(self, reading: Reading, name: str) -> Iterator[tuple[int, str, Reading]]:
        """Number, folder and reading of each copy of the training images: none shares a noise with another."""
        count = len(reading.draws)
        for copy in range(self.plan.copies):
            draws = tuple(range(copy * count, (copy + 1) * count))
            yield copy, f"{name}_{copy}", replace(reading, draws=draws)

    def _probe(self, copies: list[Arrays], labels: NDArray, tested: Callable[..., Any], name: str) -> ProbeResult:
        with step_bar(f"{name} heads", len(self.seeds)) as progress:
            return probe(
                copies, labels, tested, self.classes, self.plan.training, self.seeds, self.plan.validation,
                self.pipeline.device, progress,
            )  # fmt: skip

    def probe_backbone(
        self, backbone: Backbone, reading: Reading, name: str, weights: str | None = None
    ) -> ProbeResult:
        """Probe every place of a reading; `weights` names what the backbone was given, else the pipeline checkpoint."""
        copies = [
            self.read(backbone, one, "train", copy_name, weights, copy)
            for copy, copy_name, one in self._copies(reading, name)
        ]

        def tested(place: Place, seed: int) -> tuple[Arrays, NDArray]:
            one = replace(reading, times=place[:1], taps={place[1]: reading.taps[place[1]]}, seed=TEST_SEEDS + seed)
            found = self.read(backbone, one, "test", f"{name}_test_{seed}_{place_name(place)}", weights)
            return found.arrays, found.labels

        return self._probe([copy.arrays for copy in copies], copies[0].labels, tested, name)

    def probe_pixels(self) -> ProbeResult:
        """Probe the images themselves."""
        found = {}
        for split in ("train", "test"):
            data, positions = self.data[split], self.positions if split == "train" else range(len(self.data[split]))
            pixels = np.stack([np.asarray(data[position]["image"]).ravel() for position in positions])
            found[split] = ({PIXELS: pixels}, torch.as_tensor(data.labels)[list(positions)].numpy())
        arrays, labels = found["train"]
        return self._probe([arrays], labels, lambda _place, _seed: found["test"], "pixels")

    def fine_tune(self, backbone: Backbone, reading: Reading, place: Place) -> list[float]:
        """Test accuracy of the encoder up to a place, trained with its head, one entry a seed.

        It learns from the images that the heads of that seed learned from: all but those of validation.

        Raises:
            ValueError: in fp16, whose small gradients would vanish.
        """
        if self.pipeline.speed.precision == "fp16":
            raise ValueError("--finetune keeps no scale of the loss, which fp16 needs: take bf16 or float32")
        u, tap = place
        states, tests = self.states("train"), self.states("test")
        one = replace(reading, times=(u,), taps={tap: reading.taps[tap]})
        found = []
        with step_bar("tuning", len(self.seeds)) as progress:
            for seed in self.seeds:
                rows, _ = validation_split(states.labels.numpy(), self.plan.validation, seed)
                found.append(tune(backbone, one, states, rows, tests, self.classes, self.plan.tuning, seed, progress))
        return found
