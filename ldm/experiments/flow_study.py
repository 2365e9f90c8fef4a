"""Variances along a flow and its diffusion twin: trajectories, maps of all methods, numbers of steps, both kinds.

States of different schedules are compared as x / (alpha + sigma), in which data and noise have the share of a straight
path, against the noise share sigma / (alpha + sigma): so a flow with 10 steps and a diffusion with 50 have one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.own import splits_of
from ldm.evaluation.recognition import PixelClassifier
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.pipelines import PosteriorPipeline
from ldm.pipelines.images import real_images
from ldm.uncertainty.aleatoric import data_posterior
from ldm.util import generator

# The name of the map that the others are held against.
TRUE_MAP = "sampled weights, K = 64"
_TRUTH_DRAWS = 64


@dataclass(frozen=True)
class VarianceTrajectory:
    """A sampling trajectory with its variances.

    Attributes:
        shares: noise shares [S + 1], from 1 on.
        states, variances: [S + 1, B, c, h, w], in units that all schedules share.
        pictures: the last states, decoded [B, C, H, W].
        labels: the classes [B].
    """

    name: str
    shares: Tensor
    states: Tensor
    variances: Tensor
    pictures: Tensor
    labels: Sequence[int]

    @property
    def totals(self) -> Tensor:
        """Mean variance of an element [S + 1, B]."""
        return self.variances.flatten(2).mean(2)


@torch.no_grad()
def sample_trajectory(
    posterior: PosteriorPipeline, name: str, method: str, labels: Sequence[int] | None, images: Sequence[int]
) -> VarianceTrajectory:
    """Sample once by one of `ldm.pipelines.METHODS` and keep every step; without classes all images are of class 0."""
    path, times = posterior.pipeline.model.schedule, posterior.pipeline.times
    scale = (path.alpha(times) + path.sigma(times)).float()
    steps = list(posterior.steps(method, labels, images))
    states = torch.stack([steps[0].step.x, *(each.step.x_next for each in steps)]).cpu()
    variances = torch.stack([torch.zeros_like(steps[0].var), *(each.var for each in steps)]).cpu()
    by_time = scale.reshape(-1, 1, 1, 1, 1)
    shares = path.sigma(times) / (path.alpha(times) + path.sigma(times))
    pictures = posterior.pipeline.decode(steps[-1].step.x_next)
    return VarianceTrajectory(
        name,
        shares,
        states / by_time,
        variances / by_time**2,
        pictures,
        [0] * len(images) if labels is None else list(labels),
    )


class MethodMaps(NamedTuple):
    """Pictures [N, C, H, W] and the maps [N, h, w] of every method that the schedule knows, by name."""

    pictures: Tensor
    maps: dict[str, Tensor]


@torch.no_grad()
def map_by_methods(posterior: PosteriorPipeline, images: Sequence[int]) -> MethodMaps:
    """Return samples of these image numbers, and their variances by every method, channels averaged."""
    labels = posterior.pipeline.cycle_classes(range(len(images))) or []
    chosen = dict(benchmarks.applicable(posterior))
    chosen.pop("tangents, every direction")
    maps = {TRUE_MAP: benchmarks.truth(posterior, labels, images, _TRUTH_DRAWS)}
    maps |= {name: method.run(posterior, labels, images) for name, method in chosen.items()}
    pictures = posterior.pipeline.decode(posterior.pipeline.sample_latents(labels, images))
    return MethodMaps(pictures, {name: value.mean(1).cpu() for name, value in maps.items()})


@torch.no_grad()
def map_aleatoric(
    posterior: PosteriorPipeline, images: Sequence[int], share: float, probes: int | None = None
) -> Tensor:
    """Return the variance of the data [N, h, w] given each sample's own state at a noise share sigma / (alpha + sigma).

    Args:
        share: where on the trajectory; the nearest state is taken.
        probes: Hutchinson's probes of the diagonal; exact where None.
    """
    pipeline = posterior.pipeline
    labels = pipeline.cycle_classes(range(len(images)))
    schedule = pipeline.model.schedule
    u = float(schedule.time_at(share / (1 - share)))
    step = min(posterior.plain(labels, images), key=lambda step: abs(step.u - u))
    denoiser = pipeline.model.denoiser(None if labels is None else pipeline.labels(labels))
    source = generator("probes", pipeline.sampling.seed) if probes else None
    found = data_posterior(denoiser, schedule, step.x, step.u, probes=probes, generator=source, chunk=64)
    return found.var.mean(1).cpu()


@torch.no_grad()
def measure_totals(
    posterior: PosteriorPipeline, steps: Sequence[int], images: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Return the mean variance of an element at the end, by method and number of steps."""
    labels = posterior.pipeline.cycle_classes(range(len(images))) or []
    names = ["tangents, K = 8", "fresh weights, total variance, S = 10"]
    names += [name for name, _ in benchmarks.applicable(posterior) if name.startswith("BayesFlow as published, S")]
    found: dict[str, dict[int, float]] = {}
    for name in names:
        run = benchmarks.BENCHMARKED_METHODS[name].run
        found[name] = {
            count: float(run(benchmarks.at_steps(posterior, count), labels, images).mean()) for count in steps
        }
    return found


@torch.no_grad()
def measure_quality(posterior: PosteriorPipeline, steps: Sequence[int], per_class: int, real: int) -> dict[int, float]:
    """Return the share of samples recognised as their class, by the number of steps.

    Args:
        per_class: samples of a class.
        real: images of the run's training data that the classifier learns from, at most.
    """
    pipeline = posterior.pipeline
    train = splits_of(pipeline.config, "train")["train"]
    classifier = PixelClassifier(*real_images(train, real, pipeline.sampling.seed))
    labels = [label for label in range(pipeline.n_classes) for _ in range(per_class)]
    found = {}
    for count in steps:
        other = benchmarks.at_steps(posterior, count).pipeline
        images = other.decode(other.sample_latents(labels, range(len(labels))))
        found[count] = float(classifier.recognised(images.permute(0, 2, 3, 1), labels).mean())
    return found
