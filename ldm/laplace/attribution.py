"""Which training pictures carry an output, and which carry its certainty: a last layer refitted without some of them.

The posterior of a last layer (`ldm.laplace.fit`) has precision P and the regression's optimum W. Without image i, whose
weighted patches are B_i and whose weighted residuals at W are R_i, both have a closed form, a downdate of low rank:

    P_i = P - B_i^T B_i
    W_i - W = -P_i^-1 B_i^T R_i
    a^T P_i^-1 a - a^T P^-1 a = |(I - V V^T)^-1/2 V L^-1 a|^2,    V = B_i L^-T,    P = L L^T

The first is what the image carries of the mean, the second what it carries of the certainty. It is never negative: what
was seen never makes an output less certain. Groups, a class for example, are removed together.

Sources: Cook 1977 (deletion in linear regression); Woodbury 1950; Koh and Liang 2017 (influence, of which the mean's
first-order form is the last layer's). Attribution of the variance follows from the same downdate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.laplace.curvature import data_gram
from ldm.laplace.fit import Observation
from ldm.laplace.posterior import LastLayerLaplace

_IMAGES_AT_ONCE = 8  # images whose matrices are held at once
# How far the sums of the images may be from those of the fit, relatively: rounding of the backbone's passes.
_TOLERANCE = 1e-4
_OTHERS = "they are not those that the posterior was fitted to; name the same data, split and draws, or fit again"


@dataclass(frozen=True)
class Refit:
    """The regression that a fitted state describes, in coordinates in which its precision is I.

    Attributes:
        laplace: the posterior, of curvature `full`.
        root: L^-T [K, K], float64, with P^-1 = root root^T.
        change: the optimum minus the trained weights [C, K].
    """

    laplace: LastLayerLaplace
    root: Tensor
    change: Tensor

    @classmethod
    def of(cls, laplace: LastLayerLaplace) -> Refit:
        """Return the regression of a fitted posterior.

        Raises:
            ValueError: for another curvature than `full`, which alone is the regression's own.
        """
        if laplace.curvature != "full":
            raise ValueError(
                f"images are removed and added in the exact posterior, and this one's curvature is "
                f"{laplace.curvature}: see it through --curvature full"
            )
        state = laplace.state
        mean = state.mean
        precision = data_gram(state) + state.prior_precision * torch.eye(mean.shape[1]).to(mean)
        lower = torch.linalg.cholesky(precision)
        sigma = state.sigma_noise.to(mean.device)
        gradient = torch.tensordot(state.scale * sigma**-2 / state.temperature, state.fitted().cross, 1)
        gradient = gradient + state.prior_precision * (state.prior_mean.to(mean) - mean)
        identity = torch.eye(len(lower)).to(mean)
        root = torch.linalg.solve_triangular(lower, identity, upper=False).T
        return cls(laplace, root, torch.cholesky_solve(gradient.T, lower).T)


@dataclass(frozen=True)
class Question:
    """Outputs that are asked about together, of one sample for example.

    Attributes:
        patches: what the outputs multiply with the parameters, each times the root of its weight [P, K].
    """

    patches: Tensor

    def gram(self, refit: Refit) -> Tensor:
        """Return sum q q^T [K, K] of the patches in the refit's coordinates."""
        q = self.patches @ refit.root
        return q.T @ q


@dataclass(frozen=True)
class Removed:
    """What the removal of something does to the regression, in coordinates in which its precision was I.

    Attributes:
        change: of the optimum [K, C].
        rise: of the covariance of a row of the parameters [K, K].
    """

    change: Tensor
    rise: Tensor

    def maps(self, refit: Refit, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change of each output's mean [P, C] and the rise of its variance [P], for patches [P, K]."""
        q = patches @ refit.root
        return q @ self.change, ((q @ self.rise) * q).sum(-1)


@dataclass(frozen=True)
class Attribution:
    """What removals do to each of Q questions.

    Attributes:
        names: of what is removed [G]: positions of images, or names of groups.
        mean: sum over a question's outputs of the squared change of their mean [G, Q].
        certainty: sum over a question's outputs, of one channel, of the rise of their variance [G, Q].
        variance: the same sum of the variance itself, before any removal [Q].
    """

    names: Sequence[int | str]
    mean: Tensor
    certainty: Tensor
    variance: Tensor

    @property
    def share(self) -> Tensor:
        """The rise of the variance over the variance [G, Q]."""
        return self.certainty / self.variance


@torch.no_grad()
def attribute_images(
    refit: Refit,
    batches: Iterable[Observation],
    questions: Sequence[Question],
    groups: Mapping[str, Sequence[int]] | None = None,
    positions: Sequence[int] = (),
) -> tuple[Attribution, Attribution]:
    """Remove every image, and every group of images, and say what that does to the questions.

    Args:
        batches: those that the posterior was fitted to, in any order of whole images.
        groups: {name: positions in the data set}, removed together.
        positions: of the images in `batches`, in their order; 0, 1, ... where empty.

    Returns:
        Attribution to images, whose names are their positions, and to groups.

    Raises:
        ValueError: if the batches are not those that the posterior was fitted to.
    """
    grams = torch.stack([question.gram(refit) for question in questions])  # [Q, K, K]
    count = int(refit.laplace.fitted().images)
    # Small tensors that are kept one by one would hold the memory of the large ones that were made between them.
    mean, certainty = grams.new_zeros(2, count, len(grams))
    width = len(refit.root)
    total = grams.new_zeros(width, width)
    sums = {name: (torch.zeros_like(total), grams.new_zeros(width, len(refit.change))) for name in groups or {}}
    places = {name: set(own) for name, own in (groups or {}).items()}
    names: list[int] = []
    for rows, errors in image_rows(refit, batches):
        if len(names) == count:
            raise ValueError(f"there are more images than the {count} of the fit: {_OTHERS}")
        place = positions[len(names)] if len(positions) else len(names)
        own = rows.T @ rows
        gradient = rows.T @ errors
        total += own
        for name, (gram, pull) in sums.items():
            if place in places[name]:
                gram += own
                pull += gradient
        mean[len(names)], certainty[len(names)] = _answer(remove_rows(rows, errors), grams)
        names.append(place)
    _check_whole(refit, total)
    variance = grams.diagonal(dim1=1, dim2=2).sum(1)
    images = Attribution(names, mean, certainty, variance)
    whole = [_answer(remove_sums(gram, pull), grams) for gram, pull in sums.values()]
    empty = (grams.new_zeros(0, len(grams)), grams.new_zeros(0, len(grams)))
    return images, Attribution(list(sums), *(_stack(whole) if whole else empty), variance)


def image_rows(refit: Refit, batches: Iterable[Observation]) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield V [R P, K] and the weighted residuals at the optimum [R P, C] of each image of the fit's batches."""
    laplace = refit.laplace
    layer = laplace.layer
    state = laplace.state
    draws = state.repeats
    for batch in batches:
        features = laplace.features(batch.x, batch.t, batch.cond)
        residual = layer.by_position(batch.target.double() - layer.output(features).double())
        weight = (state.scale / (state.noise_variance(batch.t) * state.temperature)).sqrt()[:, None, None]
        for rows in torch.arange(len(features), device=features.device).split(draws * _IMAGES_AT_ONCE):
            patches = layer.patches(features[rows]).double()  # [I R, P, K]
            errors = (residual[rows] - patches @ refit.change.T) * weight[rows]
            whitened = patches @ refit.root * weight[rows]
            yield from zip(_by_image(whitened, draws), _by_image(errors, draws), strict=True)


def _by_image(rows: Tensor, draws: int) -> Tensor:
    """Return rows [I R, P, K] of R draws an image as [I, R P, K]."""
    return rows.unflatten(0, (-1, draws)).flatten(1, 2)


def remove_rows(rows: Tensor, errors: Tensor) -> Removed:
    """Remove an image of whitened rows V [n, K] and residuals [n, C], on the shorter side of V."""
    if len(rows) >= rows.shape[1]:
        return remove_sums(rows.T @ rows, rows.T @ errors)
    left = torch.eye(len(rows)).to(rows) - rows @ rows.T
    lower = _factor(left)
    half = torch.linalg.solve_triangular(lower, rows, upper=False)
    gradient = rows.T @ errors
    rise = half.T @ half
    return Removed(-(gradient + rise @ gradient), rise)


def remove_sums(gram: Tensor, gradient: Tensor) -> Removed:
    """Remove what has whitened sums V^T V [K, K] and V^T errors [K, C]."""
    identity = torch.eye(len(gram)).to(gram)
    lower = _factor(identity - gram)
    return Removed(-torch.cholesky_solve(gradient, lower), torch.cholesky_solve(gram, lower))


def _factor(left: Tensor) -> Tensor:
    """Return the Cholesky factor of what stays of the precision, which the prior keeps positive."""
    lower, failed = torch.linalg.cholesky_ex(left)
    if bool(failed):
        raise ValueError(f"an image holds more than the whole fit: {_OTHERS}")
    return lower


def _answer(removed: Removed, grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squared changes and of rises of the variance, for each question [Q]."""
    moved = torch.einsum("kc,qkl,lc->q", removed.change, grams, removed.change)
    return moved, torch.einsum("qkl,lk->q", grams, removed.rise)


def _stack(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([mean for mean, _ in found]), torch.stack([rise for _, rise in found])


def _check_whole(refit: Refit, total: Tensor) -> None:
    """Raise a ValueError unless whitened sums are those of the fit: P minus the prior's part."""
    precision = refit.laplace.prior_precision
    expected = torch.eye(len(total)).to(total) - precision * refit.root.T @ refit.root
    away = float((total - expected).norm() / expected.norm())
    if not away < _TOLERANCE:
        raise ValueError(f"the sums of these images differ by {away:.2g} of the fit's own: {_OTHERS}")
