"""Epistemic uncertainty where it is known: Gaussian classes in the plane, exact posteriors, no training.

At states that the sampler visits, the true mutual information of the branched step is compared with what ensembles say:
pairwise distances between members with KL, Bhattacharyya and squared W2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step, ddim, vp_times
from ldm.diffusion.schedule import VPSchedule, make_betas
from ldm.experiments.toy_posterior import (
    GaussianMembers,
    NormalInverseGamma,
    as_states,
    bootstrap_members,
    step_information,
)
from ldm.experiments.toy_settings import ToySettings
from ldm.records import Row
from ldm.stats import spearman
from ldm.uncertainty.branch import branch, branch_index
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.util import generator

# Columns of the table that estimate the truth, and how they are named in words.
ESTIMATES = {
    "kl": "PaiDE, KL",
    "monte_carlo": "the members' own (Monte Carlo)",
    "bhattacharyya": "PaiDE, Bhattacharyya",
    "wasserstein": "PaiDE, squared W2, eta = 0",
    "plain_kl": "PaiDE, KL, bootstrap without prior",
    "exact_kl": "PaiDE, KL, exact posterior draws",
}
# The disc of a plane's Gaussian that holds 95 %: chi-squared with two degrees of freedom.
RADIUS_95 = math.sqrt(-2 * math.log(0.05))
# Knots of the quadrature of a map's truth, which has many states.
_MAP_KNOTS = 60


class PlaneMap(NamedTuple):
    """Two maps [H, W] in nats over states z_u, the points the class was learned from, and where its states lie.

    `extent` is (left, right, bottom, top), row 0 of the maps at the bottom; `points` [N, 2] are alpha x_0; `centre` [2]
    and `radius` give the disc that holds 95 % of the class's true z_u. All in latent units.
    """

    title: str
    truth: NDArray[np.float64]
    estimate: NDArray[np.float64]
    extent: tuple[float, float, float, float]
    points: NDArray[np.float64]
    centre: tuple[float, float]
    radius: float


class Growth(NamedTuple):
    """Mutual information [K] of ensembles of `members` [K] exact draws, and the `truth` it grows to, in nats."""

    members: ArrayLike
    information: ArrayLike
    truth: float


class KnownClass(NamedTuple):
    """A class's true Gaussian, as an ensemble of one, and the points [N, 2] that were observed of it."""

    truth: GaussianMembers
    points: Tensor


@dataclass(frozen=True)
class Toy:
    """The classes, their sampler, and the step at which members branch.

    Raises:
        ValueError: if members branch at a step that ends in clean data, where there is no noise.
    """

    settings: ToySettings

    def __post_init__(self) -> None:
        if self.at == len(self.times) - 2:
            where = f"step {self.at} of {self.settings.steps}"
            raise ValueError(f"{where} ends in clean data without noise: branch at an earlier one")

    @cached_property
    def schedule(self) -> VPSchedule:
        """Latent diffusion's linear schedule."""
        return VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))

    @cached_property
    def times(self) -> Tensor:
        """Times of the sampler's steps [S + 1]."""
        return vp_times(self.schedule, self.settings.steps, "trailing")

    @cached_property
    def at(self) -> int:
        """The step at which members branch."""
        settings = self.settings
        if (settings.step, settings.at, settings.time) == (None, None, None):
            return branch_index(self.times, time=200.0)
        return branch_index(self.times, step=settings.step, at=settings.at, time=settings.time)

    @cached_property
    def prior(self) -> NormalInverseGamma:
        """What classes are drawn from, and what members believe before they have seen any."""
        settings = self.settings
        mean = torch.zeros(2, dtype=torch.float64)
        return NormalInverseGamma(mean, settings.prior_kappa, settings.prior_shape, settings.prior_rate)

    def observe(self, label: int, count: int) -> KnownClass:
        """Return a class and its first `count` points, nested over counts."""
        settings = self.settings
        source = generator("toy", settings.seed, label)
        truth = self.prior.draw(1, source)
        total = max(*settings.observations, *settings.map_observations, *settings.size_observations)
        drawn = torch.randn(total, 2, generator=source, dtype=torch.float64)
        return KnownClass(truth, truth.mean + truth.var.sqrt() * drawn[:count])

    def source(self, purpose: str, label: int, count: int) -> torch.Generator:
        """Return draws for one purpose, class and number of observations, whatever else is measured."""
        return generator("toy", self.settings.seed, purpose, label, count)

    def branch_states(self, members: GaussianMembers, label: int) -> Tensor:
        """Return the states [B, 2, 1, 1] at which members branch, to which member 0 has sampled from noise."""
        count = self.settings.states
        noise = ImageNoise(self.settings.seed, tuple(label * count + number for number in range(count)))
        start = noise.initial((count, 2, 1, 1)).double()
        base = members.single(self.schedule, 0)
        together = members.denoiser(self.schedule)
        own: dict[str, Any] = {"only_first": True, "eta": self.settings.eta, "noise": noise}
        return branch(ddim, base, together, self.schedule, start, self.times, self.at, **own).state

    def first_step(self, members: GaussianMembers, state: Tensor, eta: float) -> Step:
        """Return the branched step of all members from one state."""

        def silent(index: int, shape: Any) -> Tensor:
            return torch.zeros(tuple(shape), dtype=torch.float64)

        denoiser = members.denoiser(self.schedule)
        return next(ddim(denoiser, self.schedule, state, self.times, eta=eta, noise=silent, start=self.at))

    def bootstrap(self, points: Tensor, label: int) -> GaussianMembers:
        """Return the practical ensemble of a class: bootstraps of its points, anchored at draws of the prior."""
        source = self.source("bootstrap", label, len(points))
        return bootstrap_members(points, self.prior, self.settings.members, source)


def measure_states(toy: Toy, label: int, count: int) -> list[Row]:
    """Return a row a state of a class seen `count` times: the truth and what each ensemble says of it, in nats."""
    settings = toy.settings
    points = toy.observe(label, count).points
    belief = toy.prior.posterior(points)
    members = toy.bootstrap(points, label)
    states = toy.branch_states(members, label)
    step = toy.first_step(members, states, settings.eta)
    sampled = monte_carlo_information(step.distribution, settings.draws, toy.source("draws", label, count))
    exact = belief.draw(settings.members, toy.source("exact", label, count))
    columns = {
        "truth": step_information(belief, toy.schedule, step.transition, states),
        "kl": mutual_information(step.distribution, "kl"),
        "monte_carlo": sampled.estimate,
        "monte_carlo_se": sampled.error,
        "bhattacharyya": mutual_information(step.distribution, "bhattacharyya"),
        "wasserstein": mutual_information(toy.first_step(members, states, 0.0).distribution, "wasserstein"),
        "exact_kl": mutual_information(toy.first_step(exact, states, settings.eta).distribution, "kl"),
    }
    if count:
        source = toy.source("plain", label, count)
        plain = bootstrap_members(points, toy.prior, settings.members, source, anchored=False)
        columns["plain_kl"] = mutual_information(toy.first_step(plain, states, settings.eta).distribution, "kl")
    values: dict[str, list[Any]] = {name: value.tolist() for name, value in columns.items()}
    values.setdefault("plain_kl", [None] * settings.states)
    rows = []
    for number, (z1, z2) in enumerate(states.flatten(1).tolist()):
        where = {"class": label, "observations": count, "state": number, "z1": z1, "z2": z2}
        rows.append({**where, **{name: value[number] for name, value in values.items()}})
    return rows


def measure_growth(toy: Toy, count: int) -> Growth:
    """Return the information of ensembles of exact draws, mean over classes and states, and its truth."""
    settings = toy.settings
    informations, truths = [], []
    for label in range(settings.classes):
        belief = toy.prior.posterior(toy.observe(label, count).points)
        source = toy.source("growth", label, count)
        members = belief.draw(max(settings.sizes), source)
        states = toy.branch_states(members, label)
        row = []
        for size in settings.sizes:
            some = GaussianMembers(members.mean[:size], members.var[:size])
            step = toy.first_step(some, states, settings.eta)
            pairs = max(8, 2 * settings.draws // size)
            row.append(monte_carlo_information(step.distribution, pairs, source).estimate.mean().item())
        informations.append(row)
        truths.append(step_information(belief, toy.schedule, step.transition, states).mean().item())
    return Growth(list(settings.sizes), np.mean(informations, axis=0), float(np.mean(truths)))


def map_plane(toy: Toy, count: int) -> PlaneMap:
    """Return truth and estimate of the practical ensemble over the plane around one class."""
    settings = toy.settings
    u = float(toy.times[toy.at])
    alpha, sigma = float(toy.schedule.alpha(u)), float(toy.schedule.sigma(u))
    truth, points = toy.observe(settings.map_class, count)
    centre = alpha * truth.mean[0]
    radius = RADIUS_95 * math.sqrt(alpha**2 * truth.var.item() + sigma**2)
    ramp = torch.linspace(-2, 2, settings.map_size, dtype=torch.float64) * radius
    x, y = torch.meshgrid(ramp + centre[0], ramp + centre[1], indexing="xy")
    states = as_states(torch.stack([x, y], -1).flatten(0, 1))
    step = toy.first_step(toy.bootstrap(points, settings.map_class), states, settings.eta)
    belief = toy.prior.posterior(points)
    known = step_information(belief, toy.schedule, step.transition, states, knots=_MAP_KNOTS)
    guess = mutual_information(step.distribution, settings.map_distance)
    left, right = (centre[0] + ramp[[0, -1]]).tolist()
    bottom, top = (centre[1] + ramp[[0, -1]]).tolist()
    return PlaneMap(
        f"{count} observation{'s' * (count != 1)}",
        known.numpy().reshape(settings.map_size, -1),
        guess.numpy().reshape(settings.map_size, -1),
        (left, right, bottom, top),
        (alpha * points).numpy(),
        (float(centre[0]), float(centre[1])),
        radius,
    )


def summarise_estimates(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return for each estimate how it follows the truth.

    Returns:
        By the estimate's words: `spearman` with the truth over all states, `spearman_within`, its mean over states of
        classes with equal observations, and `ratio`, the mean ratio to the truth in logarithms.
    """
    result = {}
    for name, words in ESTIMATES.items():
        known = [row for row in rows if row[name] is not None]
        observed = np.array([row["observations"] for row in known])
        truth = np.array([row["truth"] for row in known])
        values = np.array([row[name] for row in known])
        within = [spearman(truth[observed == n], values[observed == n]) for n in sorted(set(observed.tolist()))]
        positive = values > 0
        ratio = float(np.exp(np.mean(np.log(values[positive] / truth[positive]))))
        figures = {"spearman": spearman(truth, values), "spearman_within": float(np.nanmean(within)), "ratio": ratio}
        result[words] = {key: round(value, 4) for key, value in figures.items()}
    return result


def share_bracketed(rows: Sequence[Mapping[str, Any]], errors: float = 4.0) -> float:
    """Return the share of states whose Monte-Carlo information lies between the closed forms, within `errors` s.e."""
    low = np.array([row["bhattacharyya"] for row in rows])
    middle = np.array([row["monte_carlo"] for row in rows])
    high = np.array([row["kl"] for row in rows])
    error = np.array([row["monte_carlo_se"] for row in rows])
    return float(np.mean((low - errors * error <= middle) & (middle <= high + errors * error)))
