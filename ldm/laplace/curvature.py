"""Curvatures: from a fitted state to a covariance of its parameters and to the spectrum of its data.

`CURVATURES` holds them by name: what the data say of the parameters, exactly or with something
left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.laplace.covariance import Covariance, DenseCovariance, DiagonalCovariance, LowRankCovariance
from ldm.laplace.state import LaplaceState

_log = logging.getLogger(__name__)


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


def _symmetric_root(matrices: Tensor) -> Tensor:
    """Return the symmetric root of matrices [C, K, K] that estimate covariances.

    A difference of sums may have negative eigenvalues. The nearest covariance of the same trace
    is taken then (all eigenvalues lowered alike, down to 0), so that no width is made.
    """
    values, vectors = torch.linalg.eigh(matrices)
    kept = torch.stack([_lower_to_positive(each) for each in values])
    return (vectors * kept.sqrt()[..., None, :]) @ vectors.mT


def _lower_to_positive(values: Tensor) -> Tensor:
    """Return max(values - shift, 0) of ascending values [K], with the shift that keeps their sum (above 0)."""
    if not bool(values[0] < 0):
        return values
    falling = values.flip(0)
    shifts = (falling.cumsum(0) - values.sum()) / torch.arange(1, len(values) + 1).to(values)
    kept = int((falling > shifts).sum())
    return (values - shifts[max(kept, 1) - 1]).clamp(min=0)


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
    """Return 1 / (precision (N / sigma^2 + 1)) for every parameter, with N observations.

    The reproduction of BayesDiff calls this "Hessian-free".
    """
    sums = state.fitted()
    draws = _weigh(state, sums.draws * sums.elements / sums.elements.sum())
    return DiagonalCovariance((1 / (state.prior_precision * (draws + 1))).expand_as(sums.cross[0]))


def _lowrank(state: LaplaceState) -> Covariance:
    values, vectors = _leading(state)
    return LowRankCovariance(vectors, values / (values + state.prior_precision), state.prior_precision)


def _sandwich(state: LaplaceState) -> Covariance:
    """Return P^-1 M P^-1 with P the full precision and M the gradients' sum of squares at R visits.

        M = sum_images (R^2 between + R within) / sigma^4
        P^-1 M P^-1 = between + within / R, in units of the parameters, where the prior is weak

    Roots are taken in the coordinates in which P is I, where they are symmetric: so equal noise in
    all channels makes equal draws, and `_correlate_channels` says how they go together.

    Sources: Huber 1967; White 1980; by clusters, Liang and Zeger 1986.
    """
    if state.fitted().meat is None:
        raise ValueError("the fit did not gather gradients by image: fit(also=['sandwich'])")
    bread = _root_of_precision(_add_prior(data_gram(state), state.prior_precision))
    weight = state.sigma_noise.to(bread.device) ** -2 / state.temperature
    inner = _symmetric_root(weight**2 * state.images_scale * _meat_at_visits(state, bread))
    return DenseCovariance(bread @ inner, _correlate_channels(state))


def _meat_at_visits(state: LaplaceState, bread: Tensor) -> Tensor:
    """Return bread^T M bread [C, K, K], M = sum_images g g^T of gradients over R = `visits` draws, from F draws.

        E meat = F^2 between + F within,    E draw_meat = F (between + within)
        M = R (R - 1) between + R (between + within)

    Two equations give both parts without bias; a channel whose images differ by less than nothing
    (a trace below 0, from few images) has no `between`.

    Raises:
        ValueError: if the fit did not gather what that takes.
    """
    sums = state.fitted()
    fitted = float(state.repeats)
    visits = state.visits
    assert sums.meat is not None  # `_sandwich` says so
    if visits == fitted:
        return bread.T @ sums.meat @ bread
    if fitted == 1:
        raise ValueError(
            f"one noise draw an image does not tell what differs between images from what differs within, and the "
            f"sandwich at {visits:g} visits needs both: fit with draws of 2 or more, or ask for visits 1"
        )
    if sums.draw_meat is None:
        raise ValueError(
            f"this fit is of a version that did not gather gradients by draw, so its sandwich is known at "
            f"{fitted:g} visits only: fit again, or ask for visits {fitted:g}"
        )
    single = bread.T @ sums.draw_meat @ bread / fitted
    between = (bread.T @ sums.meat @ bread / fitted - single) / (fitted - 1)
    found = between.diagonal(dim1=1, dim2=2).sum(1) > 0
    return visits * (visits - 1) * found[:, None, None] * between + visits * single


def _correlate_channels(state: LaplaceState) -> Tensor | None:
    """Return a root [C, C] of the correlation of the residuals of the channels; None where it is not known.

    A gradient is sum r_c a, with patches a that all channels share.
    """
    residuals = state.fitted().residuals
    if residuals is None:
        if len(state.mean) > 1:
            _log.warning(
                "this fit is of a version that did not gather the covariance of the residuals: draws of the sandwich "
                "take channels for independent, and decoded maps of colour are not right; fit again"
            )
        return None
    deviations = residuals.diagonal().sqrt().clamp(min=1e-300)
    values, vectors = torch.linalg.eigh(residuals / deviations / deviations[:, None])
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


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
