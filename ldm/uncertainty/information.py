"""How far the members of an ensemble disagree: pairwise distances, PaiDE mutual information, variances.

Everything maps a `Gaussian` with mean [M, B, ...] to float64 numbers for each sample, pixel or element:

    dims="sample"    all trailing axes are one event              [M, M, B]           ->  [B]
    dims="pixel"     the channels of a pixel are one event        [M, M, B, H, W]     ->  [B, H, W]
    dims="element"   every number is its own event                [M, M, B, C, H, W]  ->  [B, C, H, W]

The name of the published code (nwaftp23/DECU) is given as an alias where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.modules.distributions.gaussian import Gaussian, check_members

Dims = Literal["sample", "pixel", "element"]
Scale = Literal["sum", "mean"] | float

# Elements of one float64 temporary, 64 MiB; pairs of members are handled in chunks of at most this many elements.
CHUNK_ELEMENTS = 2**23


def kl(gaussian: Gaussian, dims: Dims = "sample", scale: Scale = "sum") -> Tensor:
    """Kullback-Leibler divergences D[i, j] = KL(N_i || N_j) in nats; PaiDE with it is an upper bound of the MI.

        KL = 1/2 sum_d [ v_i/v_j - 1 - ln(v_i/v_j) + (mu_i - mu_j)^2 / v_j ]

    Args:
        gaussian: mean [M, B, ...], positive variance.
        dims: which axes form one event, see the module's docstring.
        scale: "sum" over the event's dimensions; under another one PaiDE is no bound, so that it is refused.

    Returns:
        [M, M, B], [M, M, B, H, W] or [M, M, B, C, H, W], float64, zero diagonal. Alias: KL.

    Raises:
        ValueError: at zero covariance, where the divergence is infinite, or for another scale.
    """
    check_bound("kl", scale)
    _require_positive_variance(gaussian, "KL divergence")
    return _pairwise(gaussian, _kl_terms, dims, scale, symmetric=False)


def bhattacharyya(gaussian: Gaussian, dims: Dims = "sample", scale: Scale = "sum") -> Tensor:
    """Bhattacharyya distances -ln integral sqrt(N_i N_j) in nats; PaiDE with them is a lower bound of the MI.

        B = sum_d [ (mu_i - mu_j)^2 / (8 v) + 1/2 ln(v / sqrt(v_i v_j)) ],    v = (v_i + v_j) / 2

    Arguments, shapes and errors as for `kl`; symmetric. Alias: Bhatt.
    """
    check_bound("bhattacharyya", scale)
    _require_positive_variance(gaussian, "Bhattacharyya distance")
    return _pairwise(gaussian, _bhattacharyya_terms, dims, scale, symmetric=True)


def wasserstein2_squared(gaussian: Gaussian, dims: Dims = "sample", scale: Scale = "sum") -> Tensor:
    """Squared 2-Wasserstein distances in latent units squared, defined at zero covariance too.

        W2^2 = sum_d [ (mu_i - mu_j)^2 + (sqrt(v_i) - sqrt(v_j))^2 ]

    PaiDE with it depends on the scale of the latents (DECU eq. 7-8 by secondary sources; their code uses the square,
    summed). It is no bound of the information in the state itself: where all variances are equal, D = |mu_i - mu_j|^2
    is the KL divergence of the means seen through noise of variance 1/2, and four times the Bhattacharyya distance of
    variance 1/2: see `ldm.uncertainty.channel`.

    Args:
        gaussian, dims: as for `kl`; symmetric. Aliases: Wass, and Wass_0 for var = 0.
        scale: "sum" over the event's dimensions (as published), "mean" over them, or a number that multiplies the sum;
            f times the sum belongs to noise of variance 1 / (2 f).

    Raises:
        ValueError: if a variance is negative.
    """
    if bool((gaussian.var < 0).any()):
        raise ValueError(f"variances must be at least 0, the smallest is {gaussian.var.min().item():g}")
    return _pairwise(gaussian, _wasserstein_terms, dims, scale, symmetric=True)


# PaiDE with these bounds the mutual information, from above and from below.
BOUNDS = ("kl", "bhattacharyya")
DISTANCES: dict[str, Callable[[Gaussian, Dims, Scale], Tensor]] = {
    "wasserstein": wasserstein2_squared,
    "kl": kl,
    "bhattacharyya": bhattacharyya,
}


def check_bound(distance: str, scale: Scale) -> None:
    """Refuse a scale under which PaiDE with a divergence would bound nothing.

    Raises:
        ValueError: for kl or bhattacharyya under another scale than "sum" (or 1).
    """
    if distance in BOUNDS and scale != 1 and (scale == "mean" or not isinstance(scale, str)):
        raise ValueError(
            f"{distance} bounds mutual information when it is summed over the dimensions, and under the scale {scale} "
            "it bounds nothing: leave the scale at sum, or take the distance wasserstein"
        )


def paide(distances: Tensor, members: Sequence[int] | None = None, weights: Tensor | None = None) -> Tensor:
    """Mutual information between output and member, estimated from pairwise distances, in nats.

        I = - sum_i w_i ln( sum_j w_j exp(-D_ij) ),    w = 1/M,    0 <= I <= ln M

    (Kolchinsky & Tracey, arXiv 1706.02419, eq. 10; Berry & Meger, arXiv 2308.13498.) Written with expm1 and log1p it
    keeps its relative precision when members nearly coincide, and any distance from 0 to infinity is allowed.

    Args:
        distances: [M, M, ...], zero on the diagonal.
        members: use this group only, weighted 1/len(members). A group of one gives 0, since one member cannot disagree
            (the published code gives None).
        weights: [M] (or one for each of `members`), non-negative with sum 1; the limit becomes their entropy.

    Returns:
        [...], float64. Alias: PaiDE.

    Raises:
        ValueError: if the first two axes differ, a member does not exist, or the weights do not sum to 1.
    """
    distances = _check_square(distances, members).double()
    count = distances.shape[0]
    if weights is None:
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
    weights = weights.to(distances)
    total = weights.sum().item()
    if weights.shape != (count,) or bool((weights < 0).any()) or abs(total - 1) > 1e-6:
        raise ValueError(
            f"weights must be [{count}], non-negative, with sum 1; got shape {tuple(weights.shape)} and sum {total:g}"
        )
    overlap = torch.tensordot(weights, torch.expm1(-distances), dims=([0], [1]))
    return 0.0 - torch.tensordot(weights, torch.log1p(overlap), dims=([0], [0]))


def mutual_information(
    gaussian: Gaussian,
    distance: str = "wasserstein",
    dims: Dims = "sample",
    scale: Scale = "sum",
    members: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """PaiDE of a Gaussian [M, B, ...] in nats: `paide(DISTANCES[distance](gaussian, dims, scale), members, weights)`.

    Returns:
        [B] for dims="sample", [B, H, W] for "pixel", [B, C, H, W] for "element", float64.

    Raises:
        ValueError: if the distance is unknown or undefined here, or the members or weights do not fit.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {sorted(DISTANCES)}, got '{distance}'")
    return paide(DISTANCES[distance](gaussian, dims, scale), members, weights)


def mean_pairwise_distance(distances: Tensor, members: Sequence[int] | None = None) -> Tensor:
    """Mean of D_ij over the M (M - 1) ordered pairs of different members, in the distance's units; 0 for one member.

    Args:
        distances: [M, M, ...]. For the baseline "mean pairwise L2" pass `wasserstein2_squared(...).sqrt()`.
        members: use this group only.

    Returns:
        [...], float64.
    """
    distances = _check_square(distances, members).double()
    count = distances.shape[0]
    off_diagonal = distances.sum((0, 1)) - distances.diagonal().sum(-1)
    return off_diagonal / max(count * (count - 1), 1)


class VarianceParts(NamedTuple):
    """The two parts of a mixture's variance, units squared, each [B], [B, H, W] or [B, C, H, W]."""

    epistemic: Tensor
    aleatoric: Tensor

    @property
    def total(self) -> Tensor:
        """epistemic + aleatoric, the trace of the mixture's covariance."""
        return self.epistemic + self.aleatoric


def total_variance(gaussian: Gaussian, dims: Dims = "sample", scale: Scale = "sum") -> VarianceParts:
    """Split the mixture's variance by the law of total variance, float64, latent units squared.

        epistemic = sum_d Var_i(mu_id)   (divided by M),        aleatoric = sum_d (1/M) sum_i v_id

    With equal variances the epistemic part is (M - 1) / (2 M) times the mean pairwise W2^2.
    """
    matched = Gaussian(gaussian.mean.double(), gaussian.var.double())
    aleatoric = matched.var.expand_as(matched.mean).mean(0, keepdim=True)
    epistemic = matched.mean.var(0, correction=0, keepdim=True)
    return VarianceParts(_reduce(epistemic, dims, scale)[0], _reduce(aleatoric, dims, scale)[0])


def saturation(mutual_information: Tensor, members: int, threshold: float = 0.95) -> float:
    """Share (0 .. 1) of the entries, e.g. (class, noise) pairs, with mutual information above `threshold` ln M.

    Raises:
        ValueError: for fewer than two members, where ln M = 0, or if there are no entries.
    """
    if members < 2 or mutual_information.numel() == 0:
        raise ValueError(
            f"saturation needs at least 2 members and one entry, got {members} and {mutual_information.numel()}"
        )
    return (mutual_information.double() > threshold * math.log(members)).double().mean().item()


def _kl_terms(gap: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return 0.5 * ((left - right + gap.square()) / right - (left.log() - right.log()))


def _bhattacharyya_terms(gap: Tensor, left: Tensor, right: Tensor) -> Tensor:
    middle = 0.5 * (left + right)
    return gap.square() / (8 * middle) + 0.5 * middle.log() - 0.25 * (left.log() + right.log())


def _wasserstein_terms(gap: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return gap.square() + (left.sqrt() - right.sqrt()).square()


def _pairwise(
    gaussian: Gaussian, terms: Callable[[Tensor, Tensor, Tensor], Tensor], dims: Dims, scale: Scale, symmetric: bool
) -> Tensor:
    """Fill the matrix D from `terms(mu_i - mu_j, v_i, v_j)` of each pair, from direct differences in float64."""
    mean, var = gaussian.mean, gaussian.var.expand_as(gaussian.mean)
    count = gaussian.members
    blank = _reduce(torch.zeros_like(mean[:1], dtype=torch.float64), dims, scale)
    matrix = blank.new_zeros(count * count, *blank.shape[1:])
    pairs = torch.triu_indices(count, count, 1, device=mean.device)
    if not symmetric:
        pairs = torch.cat([pairs, pairs.flip(0)], dim=1)
    for i, j in (chunk.unbind() for chunk in pairs.split(max(1, CHUNK_ELEMENTS // max(1, mean[0].numel())), dim=1)):
        values = terms(mean[i].double() - mean[j].double(), var[i].double(), var[j].double())
        matrix[i * count + j] = _reduce(values, dims, scale)
        if symmetric:
            matrix[j * count + i] = matrix[i * count + j]
    return matrix.unflatten(0, (count, count))


def _reduce(values: Tensor, dims: Dims, scale: Scale) -> Tensor:
    """Sum [P, B, ...] over the axes of one event, times the scale."""
    if dims == "sample":
        values = values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)
    elif dims == "pixel" and values.ndim != 5:
        raise ValueError(f"dims='pixel' needs mean [M, B, C, H, W], got {values.ndim} axes; use 'sample' or 'element'")
    elif dims not in ("pixel", "element"):
        raise ValueError(f"dims must be 'sample', 'pixel' or 'element', got {dims!r}")
    if isinstance(scale, str) and scale not in ("sum", "mean"):
        raise ValueError(f"scale must be 'sum', 'mean' or a number, got '{scale}'")
    if dims == "element":
        return values if isinstance(scale, str) else values * scale
    if scale == "mean":
        return values.mean(2)
    return values.sum(2) if scale == "sum" else values.sum(2) * scale


def _require_positive_variance(gaussian: Gaussian, name: str) -> None:
    if not bool((gaussian.var > 0).all()):
        raise ValueError(
            f"the {name} needs every variance above 0, the smallest is {gaussian.var.min().item():g} (DDIM with "
            "eta = 0 has zero covariance): use distance='wasserstein', or sample with eta > 0"
        )


def _check_square(distances: Tensor, members: Sequence[int] | None) -> Tensor:
    """Check [M, M, ...] and keep the rows and columns of the group."""
    if distances.ndim < 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be [M, M, ...], got {tuple(distances.shape)}")
    if members is None:
        return distances
    group = torch.tensor(check_members(members, distances.shape[0]), device=distances.device)
    return distances[group][:, group]
