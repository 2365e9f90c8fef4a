"""Curvatures: from a fitted state to a covariance of its parameters and to the spectrum of its data.

`CURVATURES` holds them by name: what the data say of the parameters, exactly or with something
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.laplace.covariance import Covariance, DenseCovariance, DiagonalCovariance, LowRankCovariance
from ldm.laplace.state import LaplaceState


def make_covariance(state: LaplaceState) -> Covariance:
    """Factorise the posterior covariance of a row of parameters, by the state's curvature.

    Raises:
        ValueError: if the state is not fitted, its fit did not gather what the curvature needs,
            or the precision is not positive definite.
    """
    return CURVATURES[state.curvature].covariance(state)


def data_spectrum(state: LaplaceState) -> Tensor:
    """Return the eigenvalues [C, K] of the precision that the data add, by the state's curvature.

    They depend on sigma_noise and the temperature, and not on the prior.

    Raises:
        ValueError: as `make_covariance`, and for the isotropic curvature, which holds no data.
    """
    return CURVATURES[state.curvature].spectrum(state)


def data_gram(state: LaplaceState) -> Tensor:
    """Return the precision [K, K] that the data add to the prior's."""
    return _weigh(state, state.fitted().gram)


def empirical_fisher(state: LaplaceState) -> Tensor:
    """Return the diagonal empirical Fisher [C, K], as published where the state says so."""
    fisher = state.fitted().fisher
    return 2 * _weigh(state, fisher) if state.published_ef else _weigh(state, fisher, power=4)


def _weigh(state: LaplaceState, sums: Tensor | None, power: int = 2) -> Tensor:
    """Return scale sum_b sums[b] / (sigma_b^power temperature) for sums [b, ...]."""
    if sums is None:
        raise ValueError("the fit did not gather what this curvature needs: fit with it, or with fit(also=[...])")
    sigma = state.sigma_noise.to(sums.device)
    return torch.tensordot(state.scale * sigma**-power / state.temperature, sums, 1)


def _gram_in_blocks(state: LaplaceState) -> Tensor:
    """Return `data_gram` without what couples weights and biases."""
    gram = data_gram(state)
    if state.bias:
        gram[-1, :-1] = 0
        gram[:-1, -1] = 0
    return gram


def _leading(state: LaplaceState) -> tuple[Tensor, Tensor]:
    """Return the largest `rank` eigenvalues [r] of `data_gram` and their vectors [K, r]."""
    values, vectors = torch.linalg.eigh(data_gram(state))
    return values[-state.rank :].clamp(min=0), vectors[:, -state.rank :]


def _for_all(state: LaplaceState, row: Tensor) -> Tensor:
    """Return [K] as [C, K]."""
    return row.expand(len(state.mean), -1)


def _add_prior(matrix: Tensor, precision: float) -> Tensor:
    return matrix + precision * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _root_of_precision(precision: Tensor) -> Tensor:
    """Return root with root root^T = precision^-1 [K, K], from one Cholesky L L^T: root = L^-T."""
    lower, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed):
        raise ValueError(
            "the posterior precision is not positive definite in float64: raise prior_precision (the features "
            "are collinear or hold values that are not finite)"
        )
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).T


def _root_of_semidefinite(matrices: Tensor) -> Tensor:
    """Return root with root root^T = matrices [C, K, K], which may be singular (few images)."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def _full(state: LaplaceState) -> Covariance:
    return DenseCovariance(_root_of_precision(_add_prior(data_gram(state), state.prior_precision))[None])


def _kron(state: LaplaceState) -> Covariance:
    return DenseCovariance(_root_of_precision(_add_prior(_gram_in_blocks(state), state.prior_precision))[None])


def _diag(state: LaplaceState) -> Covariance:
    data = _weigh(state, state.fitted().diagonal)
    return DiagonalCovariance(_for_all(state, 1 / (data + state.prior_precision)))


def _ef(state: LaplaceState) -> Covariance:
    return DiagonalCovariance(1 / (empirical_fisher(state) + state.prior_precision))


def _isotropic(state: LaplaceState) -> Covariance:
    """Return 1 / (precision (N / sigma^2 + 1)) for every parameter, with N draws.

    The reproduction of BayesDiff calls this "Hessian-free".
    """
    sums = state.fitted()
    draws = _weigh(state, sums.draws * sums.elements / sums.elements.sum())
    return DiagonalCovariance((1 / (state.prior_precision * (draws + 1))).expand_as(sums.cross[0]))


def _lowrank(state: LaplaceState) -> Covariance:
    values, vectors = _leading(state)
    return LowRankCovariance(vectors, values / (values + state.prior_precision), state.prior_precision)


def _sandwich(state: LaplaceState) -> Covariance:
    """Return P^-1 (sum_images g g^T) P^-1 with g an image's gradient and P the full precision.

    Sources: Huber 1967; White 1980.
    """
    meat = state.fitted().meat
    if meat is None:
        raise ValueError("the fit did not gather gradients by image: fit(also=['sandwich'])")
    bread = _root_of_precision(_add_prior(data_gram(state), state.prior_precision))
    sigma = state.sigma_noise.to(meat.device)
    gradients = _root_of_semidefinite(state.scale * meat) / (sigma**2 * state.temperature)
    return DenseCovariance(bread @ (bread.T @ gradients))


def _full_spectrum(state: LaplaceState) -> Tensor:
    return _for_all(state, torch.linalg.eigvalsh(data_gram(state)).clamp(min=0))


def _kron_spectrum(state: LaplaceState) -> Tensor:
    return _for_all(state, torch.linalg.eigvalsh(_gram_in_blocks(state)).clamp(min=0))


def _diag_spectrum(state: LaplaceState) -> Tensor:
    return _for_all(state, _weigh(state, state.fitted().diagonal))


def _lowrank_spectrum(state: LaplaceState) -> Tensor:
    return _for_all(state, _leading(state)[0])


def _no_spectrum(state: LaplaceState) -> Tensor:
    raise ValueError("isotropic curvature holds no data, so it has no evidence: tune it by gridsearch")


@dataclass(frozen=True)
class CurvatureRule:
    """How a curvature makes a covariance [C, K, K] and a data spectrum [C, K] of a fitted state."""

    covariance: Callable[[LaplaceState], Covariance]
    spectrum: Callable[[LaplaceState], Tensor]


CURVATURES: dict[str, CurvatureRule] = {
    "full": CurvatureRule(_full, _full_spectrum),
    "diag": CurvatureRule(_diag, _diag_spectrum),
    "kron": CurvatureRule(_kron, _kron_spectrum),
    "lowrank": CurvatureRule(_lowrank, _lowrank_spectrum),
    "ef": CurvatureRule(_ef, empirical_fisher),
    "isotropic": CurvatureRule(_isotropic, _no_spectrum),
    "sandwich": CurvatureRule(_sandwich, _full_spectrum),
}
