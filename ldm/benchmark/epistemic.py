"""Methods that ask what other weights would have made: ensembles, dropout, posteriors of the last layer, recursions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.benchmark.method import MethodKind, Scored
from ldm.benchmark.problem import Problem
from ldm.diffusion.transition import ddim
from ldm.ensembles.members import MemberNetwork, Members
from ldm.experiments.small_networks import draw_masks
from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.propagation import bayesdiff, trajectory_integral
from ldm.uncertainty.scores import feature_entropy
from ldm.util import generator

# Shares of noise sigma / (alpha + sigma) at which pictures are noised again.
RENOISED_SHARES = tuple(tenth / 10 for tenth in range(1, 10))


@dataclass(frozen=True)
class ClassTable:
    """DECU: members that train the class table alone; variance of their pictures from the same noise.

    Attributes:
        start: of a member's table, see `ldm.ensembles.heads.initialise`.
    """

    start: str = "perturbed"
    kind: ClassVar[MethodKind] = "epistemic"

    @property
    def name(self) -> str:
        """DECU class table, and how it begins."""
        return f"DECU class table, {self.start}"

    def score(self, problem: Problem) -> Scored:
        """Return the variance of the members' pictures."""
        return spread(problem.sample(problem.trained.heads("classes", self.start)))


@dataclass(frozen=True)
class ClassTableInformation:
    """DECU as published: mutual information of the first branched step and the member, in nats (PaiDE, KL)."""

    name: str = "DECU class table, information"
    kind: ClassVar[MethodKind] = "epistemic"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the information of each pixel of the step's end, and of the whole of it."""
        members = problem.trained.heads("classes", "perturbed")
        network = MemberNetwork(problem.base, members)
        steps = ddim(problem.build()(network), problem.schedule, problem.x, problem.times, eta=1.0, noise=problem.noise)
        law = next(iter(steps)).distribution
        gaussian = Gaussian(law.mean, law.var)
        return Scored(mutual_information(gaussian, "kl", "element"), mutual_information(gaussian, "kl"))


@dataclass(frozen=True)
class LowRankMembers:
    """Members that train low-rank corrections of the weights inside of the network (DECU with LoRA)."""

    name: str = "DECU LoRA"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the variance of the members' pictures."""
        return spread(problem.sample(problem.trained.low_rank(), problem.trained.low_rank_network))


@dataclass(frozen=True)
class OutputHeads:
    """Members that train the output layer alone."""

    name: str = "DECU output heads"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the variance of the members' pictures."""
        return spread(problem.sample(problem.trained.heads("output", "perturbed")))


@dataclass(frozen=True)
class DeepEnsemble:
    """Networks trained from scratch on bootstraps, none of which is the oracle's."""

    name: str = "deep ensemble"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the variance of the members' pictures."""
        return spread(problem.sample(problem.trained.ensemble))


@dataclass(frozen=True)
class FirstStep:
    """The variance of the deep ensemble's states after the first step from the same noise (EMoE's estimand)."""

    name: str = "deep ensemble, first step"
    kind: ClassVar[MethodKind] = "epistemic"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the variance of the members' data predictions at the pictures' noise."""
        network = MemberNetwork(problem.base, problem.trained.ensemble)
        return spread(next(iter(problem.walk(problem.build()(network)))).x_next, unit="")


@dataclass(frozen=True)
class Dropout:
    """MC dropout: a network trained with units dropped, masks held for the whole trajectory (Gal and Ghahramani)."""

    name: str = "MC dropout"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the variance over masks of the pictures of the network that was trained with dropout."""
        network = problem.trained.dropout_network
        size = (problem.settings.draws, *network.masks.shape)
        masks = draw_masks(size, problem.settings.dropout, generator("masks", problem.world.seed))
        return spread(problem.sample(Members({"masks": masks}), network))


@dataclass(frozen=True)
class Persistent:
    """A Laplace posterior of the last layer, its draws held for the whole trajectory.

    Attributes:
        curvature: full, diag or sandwich.
    """

    curvature: str = "full"
    kind: ClassVar[MethodKind] = "epistemic"

    @property
    def name(self) -> str:
        """The curvature of the posterior."""
        return f"Laplace {self.curvature}, persistent"

    def score(self, problem: Problem) -> Scored:
        """Return the variance over draws of the weights."""
        return spread(problem.sample(draw_weights(problem, self.curvature)))


@dataclass(frozen=True)
class BayesDiff:
    """The recursion of variances with weights drawn again at every step (Kou et al. 2024).

    Attributes:
        form: published, with its defects, or total, corrected.
    """

    form: str = "total"
    kind: ClassVar[MethodKind] = "epistemic"

    @property
    def name(self) -> str:
        """As published or corrected."""
        return f"BayesDiff, {'as published' if self.form == 'published' else 'corrected'}"

    def score(self, problem: Problem) -> Scored:
        """Return the variance at the end of the walk."""
        curvature = "published" if self.form == "published" else "full"
        walk = problem.walk(problem.build()(problem.base))
        particles = problem.settings.particles
        denoiser = problem.predictive(curvature)
        *_, last = bayesdiff(walk, denoiser, particles=particles, source=problem.noise, form=self.form)
        return Scored(last.var, unit="variance")


@dataclass(frozen=True)
class PathVariance:
    """gamma^2: the last layer's predictive variance, integrated along the plain trajectory."""

    name: str = "gamma^2 along the path"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the integral."""
        denoiser = problem.predictive("sandwich")
        return Scored(trajectory_integral(problem.walk(denoiser), denoiser))


@dataclass(frozen=True)
class RenoisedVariance:
    """gamma^2 of the picture, noised again to nine levels."""

    name: str = "gamma^2 of the re-noised picture"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return the sum over the levels."""
        denoiser = problem.predictive("sandwich")
        parts = [denoiser.law(x, u)[1] for u, x, _ in problem.noised_pictures(RENOISED_SHARES)]
        return Scored(torch.stack(parts).sum(0))


@dataclass(frozen=True)
class FeatureEntropy:
    """Entropy of a classifier's features of pictures by draws of the weights (Jazbec et al. 2025).

    The features are the hidden units of a small classifier of the world's own training images.
    """

    name: str = "feature entropy"
    kind: ClassVar[MethodKind] = "epistemic"

    def score(self, problem: Problem) -> Scored:
        """Return half the sum of the logarithms of the features' variances."""
        pictures = problem.sample(draw_weights(problem, "sandwich"))
        hidden = problem.trained.artefacts.get("features", lambda: fit_features(*problem.data))
        features = torch.relu(pictures.flatten(2) @ hidden["weight"] + hidden["bias"])
        return Scored(value=feature_entropy(features))


def draw_weights(problem: Problem, curvature: str) -> Members:
    """Return draws of a posterior, the same for every picture."""
    source = generator("draws", curvature, problem.world.seed)
    return problem.trained.laplace(curvature).sample(problem.settings.draws, source)


def fit_features(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the first layer of a small classifier: weight [D, 32], bias [32]."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier((32,), max_iter=200, random_state=0, early_stopping=False)
    model.fit(images.double().numpy(), labels.numpy())
    first, bias = model.coefs_[0], model.intercepts_[0]
    return {"weight": torch.tensor(first, dtype=torch.float32), "bias": torch.tensor(bias, dtype=torch.float32)}


def spread(pictures: Tensor, unit: str = "variance") -> Scored:
    """Return the unbiased variance over members of pictures [M, B, C, H, W] as scores."""
    return Scored(pictures.double().var(0), unit=unit)
