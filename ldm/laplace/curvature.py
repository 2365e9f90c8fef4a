"""Curvatures: from statistics and hyperparameters to a covariance, and to the spectrum that the evidence needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.laplace.covariance import (
    Covariance,
    DenseCovariance,
    DiagonalCovariance,
    LowRankCovariance,
    root_of_precision,
    root_of_semidefinite,
)
from ldm.laplace.statistics import Statistics


@dataclass(frozen=True)
class Curvature:
    """What the likelihood and the prior say about a row of K parameters; all matrices float64."""

    statistics: Statistics
    scale: float
    sigma: Tensor
    precision: float
    temperature: float
    bias: bool
    rank: int
    published_ef: bool

    @property
    def channels(self) -> int:
        return self.statistics.cross.shape[1]

    def weighted(self, sums: Tensor | None, power: int = 2) -> Tensor:
        """scale sum_b sums[b] / (sigma_b^power temperature); sums [b, ...].

        Raises:
            ValueError: if these sums were not gathered.
        """
        if sums is None:
            raise ValueError("the fit did not gather what this curvature needs: fit with it, or with fit(also=[...])")
        return torch.tensordot(self.scale * self.sigma**-power / self.temperature, sums, 1)

    def gram(self) -> Tensor:
        """Precision [K, K] that the data add to the prior's."""
        return self.weighted(self.statistics.gram)

    def blocks(self) -> Tensor:
        """`gram` without what couples weights and biases."""
        gram = self.gram()
        if self.bias:
            gram[-1, :-1] = gram[:-1, -1] = 0
        return gram

    def fisher(self) -> Tensor:
        """Diagonal empirical Fisher [C, K]."""
        if self.published_ef:
            return 2 * self.weighted(self.statistics.fisher)
        return self.weighted(self.statistics.fisher, power=4)

    def leading(self) -> tuple[Tensor, Tensor]:
        """The largest `rank` eigenvalues [r] of `gram` and their vectors [K, r]."""
        values, vectors = torch.linalg.eigh(self.gram())
        return values[-self.rank :].clamp(min=0), vectors[:, -self.rank :]

    def for_all(self, row: Tensor) -> Tensor:
        """[K] as [C, K]."""
        return row.expand(self.channels, -1)


@dataclass(frozen=True)
class Kind:
    """A curvature by name: its covariance, its data spectrum [C, K], and whether it needs the two large sums."""

    covariance: Callable[[Curvature], Covariance]
    spectrum: Callable[[Curvature], Tensor]
    gram: bool = False
    meat: bool = False


def _with_prior(matrix: Tensor, precision: float) -> Tensor:
    return matrix + precision * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _full(it: Curvature) -> DenseCovariance:
    return DenseCovariance(root_of_precision(_with_prior(it.gram(), it.precision))[None])


def _kron(it: Curvature) -> DenseCovariance:
    return DenseCovariance(root_of_precision(_with_prior(it.blocks(), it.precision))[None])


def _diag(it: Curvature) -> DiagonalCovariance:
    return DiagonalCovariance(it.for_all(1 / (it.weighted(it.statistics.diagonal) + it.precision)))


def _ef(it: Curvature) -> DiagonalCovariance:
    return DiagonalCovariance(1 / (it.fisher() + it.precision))


def _isotropic(it: Curvature) -> DiagonalCovariance:
    """1 / (precision (N / sigma^2 + 1)) for every parameter, N draws: the reproduction of BayesDiff calls it
    "Hessian-free"."""
    elements = it.statistics.elements
    draws = it.weighted(it.statistics.draws * elements / elements.sum())
    return DiagonalCovariance((1 / (it.precision * (draws + 1))).expand_as(it.statistics.cross[0]))


def _lowrank(it: Curvature) -> LowRankCovariance:
    values, vectors = it.leading()
    return LowRankCovariance(vectors, values / (values + it.precision), it.precision)


def _sandwich(it: Curvature) -> DenseCovariance:
    """P^-1 (sum_images g g^T) P^-1 with g the image's gradient and P the full precision (Huber 1967; White 1980)."""
    meat = it.statistics.meat
    if meat is None:
        raise ValueError("the fit did not gather gradients by image: fit(also=['sandwich'])")
    bread = root_of_precision(_with_prior(it.gram(), it.precision))
    gradients = root_of_semidefinite(it.scale * meat) / (it.sigma**2 * it.temperature)
    return DenseCovariance(bread @ (bread.T @ gradients))


def _no_spectrum(it: Curvature) -> Tensor:
    raise ValueError("isotropic curvature holds no data, so it has no evidence: tune it by gridsearch")


def _full_spectrum(it: Curvature) -> Tensor:
    return it.for_all(torch.linalg.eigvalsh(it.gram()).clamp(min=0))


CURVATURES = {
    "full": Kind(_full, _full_spectrum, gram=True),
    "diag": Kind(_diag, lambda it: it.for_all(it.weighted(it.statistics.diagonal))),
    "kron": Kind(_kron, lambda it: it.for_all(torch.linalg.eigvalsh(it.blocks()).clamp(min=0)), gram=True),
    "lowrank": Kind(_lowrank, lambda it: it.for_all(it.leading()[0]), gram=True),
    "ef": Kind(_ef, lambda it: it.fisher()),
    "isotropic": Kind(_isotropic, _no_spectrum),
    "sandwich": Kind(_sandwich, _full_spectrum, gram=True, meat=True),
}


def check_curvature(name: str, levels: int) -> None:
    """Raise a ValueError unless there is such a curvature and it can do with so many noise levels."""
    if name not in CURVATURES:
        raise ValueError(f"curvature must be one of {sorted(CURVATURES)}, got '{name}'")
    if name == "sandwich" and levels > 1:
        raise ValueError("the sandwich sums an image's gradients over all its draws: it takes no time_edges")
