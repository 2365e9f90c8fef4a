"""Do scores find the classes that had few training images? Control: the same score of a model that saw all data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ldm.evaluation.recognition import nearest_distances
from ldm.experiments.exposure import load_split
from ldm.experiments.variance_benchmarks import BENCHMARKED_METHODS
from ldm.pipelines import ModelPipeline, PosteriorPipeline, chosen_positions, new_posterior, observations
from ldm.records import Row
from ldm.stats import auroc, mean_interval

NEIGHBOUR = "distance to the nearest training image"
RENOISED = "gamma^2 of the re-noised sample"
NOISE_SHARES = tuple(tenth / 10 for tenth in range(1, 10))


def load_own_data(pipeline: ModelPipeline, split: str, count: int | None = None) -> Dataset:
    """Return a split of the data that a model's config names, or `count` of its images."""
    data = load_split(pipeline.config, split)
    return data if count is None else Subset(data, chosen_positions(len(data), count, pipeline.sampling.seed))


def fit_posterior(pipeline: ModelPipeline, train: Dataset, draws: int = 4) -> PosteriorPipeline:
    """The evidence-tuned full posterior of a loaded model, on its own training images."""
    laplace = new_posterior(pipeline)
    laplace.fit(observations(pipeline.model, train, draws=draws, seed=pipeline.sampling.seed), draws=draws)
    laplace.optimize_sigma_noise()
    laplace.optimize_prior_precision()
    return PosteriorPipeline(pipeline, laplace)


@torch.no_grad()
def renoised_variance(posterior: PosteriorPipeline, x0: Tensor, labels: Sequence[int], images: Sequence[int]) -> Tensor:
    """Sum of the field's variances [B, C, H, W] at latents x0, noised again to each of `NOISE_SHARES`."""
    denoiser, schedule, noise = posterior.predictive(labels), posterior.pipeline.model.schedule, posterior.noise(images)
    for number, share in enumerate(NOISE_SHARES):
        u = float(schedule.time_at(share / (1 - share)))
        denoiser(schedule.noised(x0, noise(number, x0.shape), u), u)
    return torch.stack([variance for _, variance in denoiser.visited]).sum(0)


@torch.no_grad()
def sample_scores(
    posterior: PosteriorPipeline, train: Dataset, labels: Sequence[int], scores: Sequence[str]
) -> dict[str, Tensor]:
    """Scores [N] of each sample, by name.

    They are its summed variance by several of `BENCHMARKED_METHODS`, its variance when it is noised again, and its
    distance to the nearest training image.
    """
    images = list(range(len(labels)))
    maps = {name: BENCHMARKED_METHODS[name].run(posterior, labels, images) for name in scores}
    x0 = posterior.pipeline.sample_latents(labels, images)
    maps[RENOISED] = renoised_variance(posterior, x0, labels, images)
    found = {name: value.flatten(1).sum(1).double().cpu() for name, value in maps.items()}
    pictures = posterior.pipeline.decode(x0).permute(0, 2, 3, 1)
    real = np.stack([train[index]["image"].numpy() for index in range(len(train))])
    return {**found, NEIGHBOUR: torch.as_tensor(nearest_distances(pictures, real))}


def score_rows(scores: Mapping[str, Tensor], labels: Sequence[int], low_data: Sequence[int]) -> list[Row]:
    """The scores of one model's samples as a table; `low_data` marks the samples of its classes with few images."""
    rows = []
    for number, label in enumerate(labels):
        own = {name: float(values[number]) for name, values in scores.items()}
        rows.append({"class": label, "low_data": label in low_data, **own})
    return rows


def detection_rows(low_data: Sequence[Row], control: Sequence[Row]) -> list[Row]:
    """AUROC of the low_data classes' samples against the others, of both models (`score_rows`) on the same noises."""
    positives = np.array([row["low_data"] for row in low_data])
    rows = []
    for name in (column for column in low_data[0] if column not in ("class", "low_data")):
        areas = [auroc(np.array([row[name] for row in table]), positives) for table in (low_data, control)]
        rows.append({"score": name, "low_data": areas[0], "control": areas[1], "difference": areas[0] - areas[1]})
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over models of each score, with Student's 95 % interval of the difference."""
    found = []
    for name in dict.fromkeys(row["score"] for row in rows):
        own = [row for row in rows if row["score"] == name]
        interval = mean_interval([row["difference"] for row in own])
        means = {key: float(np.mean([row[key] for row in own])) for key in ("low_data", "control")}
        found.append(
            {"score": name, **means, "difference": interval.estimate, "low": interval.low, "high": interval.high}
            | {"models": interval.n}
        )
    return found
