"""Methods that ask what the data leave open, and controls that ask neither weights nor data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.benchmark.epistemic import RENOISED_SHARES
from ldm.benchmark.method import MethodKind, Scored
from ldm.benchmark.problem import Problem
from ldm.diffusion.samplers import Step
from ldm.diffusion.transition import ddim
from ldm.experiments.small_networks import SmallNetwork
from ldm.uncertainty.aleatoric import data_posterior
from ldm.uncertainty.control_maps import edge_strength, seed_variance
from ldm.uncertainty.control_maps import feature_energy as energy_map
from ldm.util import generator

# Draws of what is a variance over noises of one network.
NOISES = 8


@dataclass(frozen=True)
class Divergence:
    """Variance of clean data given the re-noised picture, by the derivative of the denoiser.

    Cov(x_0 | x) = (sigma^2 / alpha) dD / dx: on a flow the divergence of the velocity, up to a constant. Its diagonal
    is exact, and the sum over nine levels of noise is the score.
    """

    name: str = "divergence (posterior covariance)"
    kind: ClassVar[MethodKind] = "aleatoric"

    def score(self, problem: Problem) -> Scored:
        """Return the sum of the variances over the levels."""
        denoiser = problem.build()(problem.base)
        found = [
            data_posterior(denoiser, problem.schedule, x, u).var for u, x, _ in problem.noised_pictures(RENOISED_SHARES)
        ]
        return Scored(torch.stack(found).sum(0))


class VarianceHead(nn.Module):
    """The base network's residuals: a second head on its features gives the logarithm of their variance."""

    def __init__(self, base: SmallNetwork):
        super().__init__()
        self.base = base
        outputs, features = base.get_parameter("out.1.weight").shape
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        features = self.base.backbone(x, t, label)
        mean = self.base.out(features)
        return torch.stack([mean, self.head(nn.functional.silu(features))], -1).reshape(*x.shape, 2)


def gaussian_loss(outputs: Tensor, noises: Tensor) -> Tensor:
    """Return the negative log-likelihood [M] of noises under outputs [M, B, D, 2], mean and log-variance."""
    mean, logvar = outputs.unbind(-1)
    return 0.5 * ((noises - mean).square() * (-logvar).exp() + logvar).mean((1, 2))


@dataclass(frozen=True)
class Heteroscedastic:
    """A head that predicts the variance of the regression, trained on the frozen features (UA-Flow's idea).

    x_0 = alpha x - sigma v, so the variance of clean data is sigma^2 times that of v; summed over nine levels.
    """

    name: str = "heteroscedastic head"
    kind: ClassVar[MethodKind] = "aleatoric"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the predicted variance of clean data, summed over the levels."""
        network = self.load(problem)
        total = torch.zeros(())
        for u, x, _ in problem.noised_pictures(RENOISED_SHARES):
            time = torch.full((len(x),), u)
            logvar = network(x, time, problem.labels)[..., 1]
            total = total + float(problem.schedule.sigma(u)) ** 2 * logvar.exp()
        return Scored(total)

    def load(self, problem: Problem) -> VarianceHead:
        """Return the base network with its trained head."""
        network = VarianceHead(problem.base)
        names = ("head.weight", "head.bias")
        start = {name: torch.zeros_like(network.get_parameter(name))[None] for name in names}
        images, labels = problem.data
        chosen = torch.arange(len(images))[None]
        source = generator("training", "variance head", problem.world.seed)

        def train() -> dict[str, Tensor]:
            return problem.trained.head_recipe.fit(network, start, images, labels, chosen, source, gaussian_loss)

        found = problem.trained.artefacts.get("variance_head", train)
        network.load_state_dict({**network.state_dict(), **{name: value[0] for name, value in found.items()}})
        return network.requires_grad_(False)


@dataclass(frozen=True)
class Perturbation:
    """Variance of the predicted picture when the picture is noised again with other noises (AU's idea)."""

    name: str = "perturbation variance"
    kind: ClassVar[MethodKind] = "aleatoric"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the variance over eight noises, summed over the levels."""
        denoiser, pictures = problem.build()(problem.base), problem.pictures
        total = torch.zeros(())
        for number, share in enumerate(RENOISED_SHARES):
            u = float(problem.schedule.time_at(share / (1 - share)))
            noises = [problem.noise(1000 + NOISES * number + draw, pictures.shape) for draw in range(NOISES)]
            found = [denoiser(problem.schedule.noised(pictures, eps, u), u).x0 for eps in noises]
            total = total + torch.stack(found).var(0)
        return Scored(total)


@dataclass(frozen=True)
class OneModelSeeds:
    """One model, other seeds: variance of pictures of a sampler with noise, from half of the plain trajectory on."""

    name: str = "one model, other seeds"
    kind: ClassVar[MethodKind] = "aleatoric"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the variance over eight seeds."""
        denoiser = problem.build()(problem.base)
        half = problem.steps // 2
        state = next(step.x for step in problem.walk(denoiser) if step.index == half)

        def sample(seed: int) -> Iterator[Step]:
            noise = replace(problem.noise, seed=problem.world.seed + 1_000_003 * (1 + seed))
            return ddim(denoiser, problem.schedule, state, problem.times, eta=1.0, noise=noise, start=half)

        return Scored(seed_variance(sample, NOISES))


@dataclass(frozen=True)
class NearestNeighbour:
    """Distance of the picture to the nearest training image."""

    name: str = "nearest neighbour"
    kind: ClassVar[MethodKind] = "control"

    def score(self, problem: Problem) -> Scored:
        """Return the squared differences to the nearest image, and the distance."""
        pictures = problem.pictures.flatten(1)
        images = problem.data[0]
        distances = torch.cdist(pictures, images)
        nearest = images[distances.argmin(1)]
        squares = (pictures - nearest).square().reshape(-1, *problem.shape)
        return Scored(squares, distances.amin(1))


@dataclass(frozen=True)
class Edges:
    """Strength of the picture's edges."""

    name: str = "edges"
    kind: ClassVar[MethodKind] = "control"

    def score(self, problem: Problem) -> Scored:
        """Return squared gradients."""
        return Scored(edge_strength(problem.pictures))


@dataclass(frozen=True)
class FeatureEnergy:
    """Size of the last layer's features of the re-noised picture: predictive variance without data."""

    name: str = "feature energy"
    kind: ClassVar[MethodKind] = "control"

    def score(self, problem: Problem) -> Scored:
        """Return the sum over the levels."""
        denoiser = problem.predictive()
        features = [denoiser.features(x, u) for u, x, _ in problem.noised_pictures(RENOISED_SHARES)]
        maps = [energy_map(problem.trained.laplace(), one) for one in features]
        return Scored(torch.stack(maps).sum(0))


@dataclass(frozen=True)
class DenoisingLoss:
    """The network's own loss at the re-noised picture."""

    name: str = "denoising loss"
    kind: ClassVar[MethodKind] = "control"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return squared errors of the noise, summed over the levels."""
        denoiser = problem.build()(problem.base)
        errors = [(denoiser(x, u).eps - eps).square() for u, x, eps in problem.noised_pictures(RENOISED_SHARES)]
        return Scored(torch.stack(errors).sum(0))


@dataclass(frozen=True)
class ClassCounts:
    """One over the number of training images of the picture's class and one, whatever the picture."""

    name: str = "images per class alone"
    kind: ClassVar[MethodKind] = "control"

    def score(self, problem: Problem) -> Scored:
        """Return 1 / (1 + count)."""
        return Scored(value=1 / (1 + problem.trained.counts[problem.labels].double()))


@dataclass(frozen=True)
class RandomScores:
    """Random numbers: what a score is worth that knows nothing."""

    name: str = "random"
    kind: ClassVar[MethodKind] = "control"

    def score(self, problem: Problem) -> Scored:
        """Return uniform draws for pixels and pictures."""
        source = generator("random scores", problem.world.name)
        count = len(problem.labels)
        pixels = torch.rand(count, *problem.shape, generator=source)
        values = torch.rand(count, generator=source)
        return Scored(pixels, values)
