"""Do scores of samples find the classes that training starved? Control: the same score of a model that saw all data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.evaluation.detection import auroc, mean_interval
from ldm.evaluation.recognition import nearest_distances
from ldm.opened import OpenModel, OpenPosterior, new_posterior, observations
from ldm.report.yardsticks import METHODS, Row

NEIGHBOUR = "distance to the nearest training image"
RENOISED = "gamma^2 of the re-noised sample"
NOISE_SHARES = tuple(tenth / 10 for tenth in range(1, 10))


def posterior_of(opened: OpenModel, train: Dataset, draws: int = 4) -> OpenPosterior:
    """The evidence-tuned full posterior of an opened model, on its own training images."""
    laplace = new_posterior(opened)
    laplace.fit(observations(opened.model, train, draws=draws, seed=opened.options.seed), draws=draws)
    laplace.optimize_sigma_noise()
    laplace.optimize_prior_precision()
    return OpenPosterior(opened, laplace)


@torch.no_grad()
def renoised_variance(walks: OpenPosterior, x0: Tensor, labels: Sequence[int], images: Sequence[int]) -> Tensor:
    """Sum of the field's variances [B, C, H, W] at latents x0, noised anew to each of `NOISE_SHARES`."""
    denoiser, path, noise = walks.predictive(labels), walks.opened.model.path, walks.noise(images)
    for number, share in enumerate(NOISE_SHARES):
        u = float(path.time_at(share / (1 - share)))
        denoiser(path.noised(x0, noise(number, x0.shape), u), u)
    return torch.stack([variance for _, variance in denoiser.visited]).sum(0)


@torch.no_grad()
def sample_scores(
    walks: OpenPosterior, train: Dataset, labels: Sequence[int], scores: Sequence[str]
) -> dict[str, Tensor]:
    """Summed variance of each sample [N] by several of `METHODS` and re-noised, and its distance to training images."""
    images = list(range(len(labels)))
    maps = {name: METHODS[name].run(walks, labels, images) for name in scores}
    x0 = walks.opened.sample(labels, images)
    maps[RENOISED] = renoised_variance(walks, x0, labels, images)
    found = {name: value.flatten(1).sum(1).double().cpu() for name, value in maps.items()}
    pictures = walks.opened.decode(x0).permute(0, 2, 3, 1)
    real = np.stack([train[index]["image"].numpy() for index in range(len(train))])
    return {**found, NEIGHBOUR: torch.as_tensor(nearest_distances(pictures, real))}


def score_rows(scores: Mapping[str, Tensor], labels: Sequence[int], starved: Sequence[int]) -> list[Row]:
    """The scores of one model's samples as a table; `starved` marks the samples of its classes with few images."""
    rows = []
    for number, label in enumerate(labels):
        own = {name: float(values[number]) for name, values in scores.items()}
        rows.append({"class": label, "starved": label in starved, **own})
    return rows


def detection_rows(starved: Sequence[Row], control: Sequence[Row]) -> list[Row]:
    """AUROC of the starved classes' samples against the others, of both models (`score_rows`) on the same noises."""
    positives = np.array([row["starved"] for row in starved])
    rows = []
    for name in (column for column in starved[0] if column not in ("class", "starved")):
        areas = [auroc(np.array([row[name] for row in table]), positives) for table in (starved, control)]
        rows.append({"score": name, "starved": areas[0], "control": areas[1], "difference": areas[0] - areas[1]})
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over models of each score, with Student's 95 % interval of the difference."""
    found = []
    for name in dict.fromkeys(row["score"] for row in rows):
        own = [row for row in rows if row["score"] == name]
        interval = mean_interval([row["difference"] for row in own])
        means = {key: float(np.mean([row[key] for row in own])) for key in ("starved", "control")}
        found.append(
            {"score": name, **means, "difference": interval.mean, "low": interval.low, "high": interval.high}
            | {"models": interval.n}
        )
    return found
