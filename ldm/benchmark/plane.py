"""Oracle 0: Gaussian classes in the plane, where both kinds of uncertainty have a closed form and need no training.

A class is x_0 ~ N(mu, s^2 I) with a conjugate belief after N points; a picture at noise z is mu + s z. So

    epistemic    Var(mu + s z | points) = E[s^2] / kappa + Var(s) z^2       on each axis, over the belief
    aleatoric    Cov(x_0 | x_u) = s^2 sigma^2 / (alpha^2 s^2 + sigma^2)     with the class's true s^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from ldm.diffusion.affine import CosineSchedule
from ldm.experiments.toy_posterior import (
    GaussianMembers,
    MemberDenoiser,
    NormalInverseGamma,
    as_states,
    bootstrap_members,
)
from ldm.records import Row
from ldm.stats import auroc, mean_interval, spearman
from ldm.uncertainty.aleatoric import data_posterior
from ldm.util import generator

PRIOR = NormalInverseGamma(torch.zeros(2, dtype=torch.float64), 0.05, 4.0, 1.0)
# Points of the classes in turn: one few, one some, one many.
BUDGETS = (2, 5, 10, 50, 200, 1000)
FEW_POINTS, MANY_POINTS = 5, 200
MEMBERS = 5
DRAWN_PICTURES = 8
RATIO_COLUMN = "over the epistemic truth"
DIVERGENCE = "divergence (posterior covariance)"
# The time at which what the data leave open is asked for.
TIME = 0.5


@dataclass(frozen=True)
class PlaneClass:
    """A class: its true variance s^2, its points [N, 2], and the belief after them."""

    var: float
    points: Tensor
    belief: NormalInverseGamma

    @property
    def fitted_var(self) -> float:
        """s^2 of the maximum-likelihood fit, what a network that was trained on the points has at best."""
        return float((self.points - self.points.mean(0)).square().mean())


def draw_class(points: int, seed: int, label: int) -> PlaneClass:
    """Draw a class from the prior, and its points; fewer are the first of the same."""
    true = PRIOR.draw(1, generator("plane class", seed, label))
    many = torch.randn(max(BUDGETS), 2, generator=generator("plane points", seed, label), dtype=torch.float64)
    own = true.mean[0] + true.var[0].sqrt() * many[:points]
    return PlaneClass(float(true.var[0]), own, PRIOR.posterior(own))


def epistemic_variance(belief: NormalInverseGamma, z: Tensor) -> Tensor:
    """Return the variance over the belief of a picture at noise z [B, 2], summed over axes [B]: closed form."""
    mean_var = belief.rate / (belief.shape - 1)
    mean_sd = belief.rate**0.5 * float(np.exp(gammaln(belief.shape - 0.5) - gammaln(belief.shape)))
    return 2 * mean_var / belief.kappa + (mean_var - mean_sd**2) * z.square().sum(1)


def aleatoric_trace(var: float) -> float:
    """Return the trace of Cov(x_0 | x) at `TIME` for a class of variance s^2."""
    alpha, sigma = (float(part) for part in CosineSchedule().per_image(TIME))
    return 2 * var * sigma**2 / (alpha**2 * var + sigma**2)


def spread_of(members: GaussianMembers, z: Tensor) -> Tensor:
    """Return the variance over members of their pictures at noise z [B, 2], summed over axes [B]."""
    pictures = members.mean[:, None] + members.var.sqrt()[:, None, None] * z
    return pictures.var(0).sum(1)


def score_class(own: PlaneClass, z: Tensor, seed: int, label: int) -> dict[str, Tensor]:
    """Return the scores [B] of a class's pictures by the methods that need no derivative."""
    count = len(z)
    exact = own.belief.draw(MEMBERS, generator("plane members", seed, label))
    boot = bootstrap_members(own.points, PRIOR, MEMBERS, generator("plane bootstrap", seed, label))
    plain = bootstrap_members(own.points, PRIOR, MEMBERS, generator("plane plain", seed, label), anchored=False)
    ones = torch.ones(count, dtype=torch.float64)
    return {
        "exact posterior, 5 draws": spread_of(exact, z),
        "5 bootstraps, anchored": spread_of(boot, z),
        "5 bootstraps": spread_of(plain, z),
        "heteroscedastic head, its limit": aleatoric_trace(own.fitted_var) * ones,
        "one model, other seeds": 2 * own.fitted_var * ones,
        "points per class alone": ones / len(own.points),
        "random": torch.rand(count, generator=generator("plane random", seed, label), dtype=torch.float64),
    }


def measure_divergence(classes: Sequence[PlaneClass], z: Tensor, seed: int) -> Tensor:
    """Return the trace of the posterior covariance [N] of each picture, noised again, by the derivative of the fit.

    Args:
        classes: of each picture [N].
        z: noises of the pictures [N, 2].
        seed: of the noises that are added.
    """
    schedule = CosineSchedule()
    mean = as_states(torch.stack([own.points.mean(0) for own in classes]))
    var = torch.tensor([max(own.fitted_var, 1e-9) for own in classes], dtype=torch.float64).reshape(-1, 1, 1, 1)
    noise = torch.randn(mean.shape, generator=generator("plane noise", seed), dtype=torch.float64)
    state = schedule.noised(mean + var.sqrt() * as_states(z), noise, TIME)
    return data_posterior(MemberDenoiser(schedule, mean, var), schedule, state, TIME).total


PLANE_KINDS = {
    "exact posterior, 5 draws": "epistemic",
    "5 bootstraps, anchored": "epistemic",
    "5 bootstraps": "epistemic",
    DIVERGENCE: "aleatoric",
    "heteroscedastic head, its limit": "aleatoric",
    "one model, other seeds": "aleatoric",
    "points per class alone": "control",
    "random": "control",
}


@dataclass(frozen=True)
class _Plane:
    """Scores of all pictures of a seed: {method: [N]}, truths [N], points of each picture's class [N]."""

    scores: dict[str, NDArray[np.float64]]
    epistemic: NDArray[np.float64]
    aleatoric: NDArray[np.float64]
    points: NDArray[np.float64]


def _score_plane(budgets: Sequence[int], seed: int) -> _Plane:
    found: dict[str, list[Tensor]] = {}
    classes: list[PlaneClass] = []
    noises, epistemic = [], []
    for label, budget in enumerate(budgets):
        own = draw_class(budget, seed, label)
        z = torch.randn(DRAWN_PICTURES, 2, generator=generator("plane z", seed, label), dtype=torch.float64)
        for name, values in score_class(own, z, seed, label).items():
            found.setdefault(name, []).append(values)
        classes += [own] * len(z)
        noises.append(z)
        epistemic.append(epistemic_variance(own.belief, z))
    scores = {name: torch.cat(values).numpy() for name, values in found.items()}
    scores[DIVERGENCE] = measure_divergence(classes, torch.cat(noises), seed).numpy()
    aleatoric = np.array([aleatoric_trace(own.var) for own in classes])
    points = np.array([float(len(own.points)) for own in classes])
    return _Plane(scores, torch.cat(epistemic).numpy(), aleatoric, points)


def measure_plane(seeds: int = 20, repeats: int = 3) -> list[Row]:
    """Return a row a method: how it follows both truths, and what it knows of the number of points.

    Args:
        seeds: worlds of classes.
        repeats: classes of each budget.
    """
    budgets = BUDGETS * repeats
    few = [_score_plane(budgets, seed) for seed in range(seeds)]
    control = [_score_plane([max(BUDGETS)] * len(budgets), seed) for seed in range(seeds)]
    rows = []
    for name, kind in PLANE_KINDS.items():
        columns: dict[str, list[float]] = {}
        for own, other in zip(few, control, strict=True):
            for column, value in _compare_plane(own, other, name).items():
                columns.setdefault(column, []).append(value)
        row: Row = {"method": name, "kind": kind}
        for column, values in columns.items():
            interval = mean_interval(values)
            found = {column: interval.estimate, f"{column}, low": interval.low, f"{column}, high": interval.high}
            is_no_variance = column == RATIO_COLUMN and kind != "epistemic"
            row |= dict.fromkeys(found) if is_no_variance else found
        rows.append(row)
    return rows


def _compare_plane(own: _Plane, control: _Plane, name: str) -> dict[str, float]:
    values, other = own.scores[name], control.scores[name]
    ends = (own.points <= FEW_POINTS) | (own.points >= MANY_POINTS)
    positives = own.points[ends] <= FEW_POINTS
    areas = [auroc(one[ends], positives) for one in (values, other)]
    return {
        "ranks, epistemic truth": spearman(values, own.epistemic),
        RATIO_COLUMN: float(values.sum() / own.epistemic.sum()),
        "ranks, Cov(x0 | x)": spearman(values, own.aleatoric),
        "few-point AUROC": areas[0],
        "the same of the control": areas[1],
    }
