"""Classifiers of noisy images, made or loaded with the noise that they see, and the images they recognise under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from ldm.data.own import build_dataset, splits_of
from ldm.diffusion.schedule import EDMSchedule, Schedule, VPSchedule, make_betas
from ldm.diffusion.training_times import LogNormalNoise
from ldm.evaluation.noise_conditional import (
    BackboneClassifier,
    NetworkClassifier,
    NoiseHead,
    NoisyTraining,
    Times,
    level_times,
    recognition,
    train_noisy,
)
from ldm.evaluation.taps import Reading, resolve_taps
from ldm.experiments.probes import draw_probe_positions
from ldm.jobs import step_bar
from ldm.models.diffusion.classifier import NoisyClassifier
from ldm.modules.wide_resnet import WideResNet
from ldm.pipelines import ModelPipeline, build_model
from ldm.pipelines.features import INDEX_STEPS, DataStates, edm_index_times, make_backbone
from ldm.settings import FeatureReading
from ldm.util import instantiate_from_config


@dataclass(frozen=True)
class NoisyStudy:
    """A classifier of noisy images with what it is tried on.

    Attributes:
        classifier: on its device.
        schedule: the noise that its images have.
        model: encodes the images.
        config: names the images.
        times: the training times; None where nothing trains.
        trained: what of the classifier trains.
    """

    classifier: BackboneClassifier | NetworkClassifier
    schedule: Schedule
    model: Any
    config: Mapping[str, Any] | DictConfig
    times: Times | None = None
    trained: nn.Module | None = None

    @property
    def parameters(self) -> int:
        """The number of parameters that train."""
        values = self.trained.parameters() if self.trained is not None else ()
        return sum(value.numel() for value in values if value.requires_grad)

    def states(self, split: str, wanted: int | None, seed: int) -> DataStates:
        """Return images of the config's data set as the model's states: all, or `wanted` of them."""
        data = build_dataset(splits_of(self.config, split)[split])
        return DataStates(self.model, data, draw_probe_positions(len(data), wanted, seed))

    def train(self, training: NoisyTraining, n_train: int | None, seed: int) -> None:
        """Train in place what trains."""
        assert self.times is not None
        states = self.states("train", n_train, seed)
        with step_bar("training") as progress:
            train_noisy(self.classifier, states, self.times, training, seed, progress)

    def recognise(self, n_test: int | None, seed: int) -> list[dict[str, float]]:
        """Return a row a noise level: its time, its log signal-to-noise ratio, % of test images recognised."""
        tests = self.states("validation", n_test, seed)
        levels = tested_levels(self.schedule)
        with tqdm(desc="recognition", total=len(tests), unit="image") as bar:
            rates = recognition(self.classifier, tests, levels, seed, progress=bar.update)
        return tabulate_recognition(self.schedule, rates)


def trained_levels(schedule: Schedule) -> torch.Tensor:
    """Return the times that heads are trained on: 1 .. T of a table of betas, else EDM's steps."""
    if isinstance(schedule, VPSchedule):
        return torch.arange(1, schedule.end + 1, dtype=torch.float64)
    return torch.tensor(edm_index_times(schedule, range(1, INDEX_STEPS + 1)), dtype=torch.float64)


def tested_levels(schedule: Schedule) -> list[float]:
    """Return the times that classifiers are tested at: every 50th of a table of 1,000 betas, else EDM's steps."""
    levels = trained_levels(schedule)
    return (levels[:: max(1, schedule.end // 20)] if isinstance(schedule, VPSchedule) else levels).tolist()


def tabulate_recognition(schedule: Schedule, rates: Sequence[float]) -> list[dict[str, float]]:
    """Return a row a tested noise level: its time, its log signal-to-noise ratio, % of images recognised."""
    return [
        {"t": u, "log_snr": -2 * float(schedule.ratio(u).log()), "recognised": 100 * rate}
        for u, rate in zip(tested_levels(schedule), rates, strict=True)
    ]


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Initialise what is made within from the seed, and put torch's own random state back after it.

    The published numbers draw the initial weights after those of the model that is loaded first: load it within, too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_noisy_head(pipeline: ModelPipeline, given: FeatureReading) -> NoisyStudy:
    """Make a head on one layer of a diffusion model's frozen features; see `seeded_initialisation`.

    Args:
        given: its layer (else the config's probe.layer), pooling and class.

    Raises:
        ValueError: if no layer is named.
    """
    backbone = make_backbone(pipeline.model, given.label)
    layer = given.layers[0] if given.layers else (pipeline.config.get("probe") or {}).get("layer")
    if layer is None:
        raise ValueError("which layer? Give --layers, or probe.layer in the config")
    tap = resolve_taps(backbone.network, [layer])
    schedule = pipeline.model.schedule
    levels = trained_levels(schedule)
    zero = torch.zeros((1, *pipeline.model.latent_shape), device=pipeline.device)
    reading = Reading((float(levels[0]),), tap, None if given.pool == "none" else int(given.pool))
    (width,) = {value.shape[1] for value in backbone.features(zero, [0], reading).values()}
    classes = build_dataset(splits_of(pipeline.config, "train")["train"]).n_classes
    head = NoiseHead(width, classes).to(pipeline.device)
    classifier = BackboneClassifier(backbone, tap, levels, head, reading.pool)
    return NoisyStudy(classifier, schedule, pipeline.model, pipeline.config, level_times(levels), head)


def make_wide_resnet(
    config: DictConfig, noise: Literal["VP", "VE"], depth: int, width: int, device: torch.device
) -> NoisyStudy:
    """Make a wide residual network of noisy images; see `seeded_initialisation`.

    Args:
        config: names a model, whose shape the images have, and the data.
        noise: VP (1,000 steps of DDPM) or VE (EDM).
        depth, width: see `WideResNet`.
    """
    schedule: Schedule = VPSchedule(make_betas("sqrt_linear", 1000)) if noise == "VP" else EDMSchedule()

    def log_normal(uniform: torch.Tensor) -> torch.Tensor:
        return LogNormalNoise()(uniform, schedule)

    times = level_times(trained_levels(schedule)) if noise == "VP" else log_normal
    model = build_model(config).to(device)
    classes = build_dataset(config.data.params.train).n_classes
    network = WideResNet(depth, width, classes, model.channels).to(device)
    return NoisyStudy(NetworkClassifier(network, schedule), schedule, model, config, times, network)


def load_noisy_classifier(config: DictConfig, checkpoint: str, device: torch.device) -> NoisyStudy:
    """Load a classifier that was trained to guide a diffusion model, of which nothing trains here.

    Raises:
        ValueError: if the config is not that of a NoisyClassifier.
    """
    model = instantiate_from_config(config.model)
    if not isinstance(model, NoisyClassifier):
        raise ValueError(f"the config names {config.model.target}: expected the config of a NoisyClassifier")
    model.init_from_ckpt(checkpoint)
    model = model.to(device).requires_grad_(False)
    classifier = NetworkClassifier(model.classifier, model.schedule, model.schedule.time_to_net)
    return NoisyStudy(classifier, model.schedule, model, config)
