"""What a query loses without training images in a last layer's regression: by downdates, and by fits from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.attribution import Refit, Removed, image_rows, remove_rows, remove_sums


class Effects(NamedTuple):
    """What a removal does to each of Q queries, float64.

    Attributes:
        loss: rise of the mean squared error, mean over the query's draws [Q].
        mean: squared change of the outputs [Q].
        certainty: rise of an output's variance [Q].
    """

    loss: Tensor
    mean: Tensor
    certainty: Tensor


@dataclass(frozen=True)
class HeadRemovals:
    """A fitted last layer, the images of its fit, and queries.

    Attributes:
        refit: the regression.
        images: whitened rows and residuals of each image.
        rows, targets: of all images, each times the root of its weight [N R, K] and [N R, C], R draws to an image.
        patches, errors: of the queries' rows [n, K] and, at the optimum, [n, C].
        draws: rows of a query.
    """

    refit: Refit
    images: Sequence[tuple[Tensor, Tensor]]
    rows: Tensor
    targets: Tensor
    patches: Tensor
    errors: Tensor
    draws: int

    @classmethod
    def of(cls, laplace: LastLayerLaplace, seen: Observation, asked: Observation, draws: int) -> HeadRemovals:
        """Return the removals from a posterior of a network whose last layer sees one vector a row.

        Args:
            seen: what it was fitted to.
            asked: rows of the queries, `draws` to a query.
        """
        refit = Refit.of(laplace)
        state = laplace.state
        root = (state.scale / (state.noise_variance(seen.t) * state.temperature)).sqrt()[:, None]
        patches, asked_patches = (
            laplace.layer.patches(laplace.features(rows.x, rows.t, rows.cond)).flatten(0, 1).double()
            for rows in (seen, asked)
        )
        errors = asked_patches @ (laplace.mean + refit.change).T - asked.target.double()
        images = list(image_rows(refit, [seen]))
        return cls(refit, images, root * patches, root * seen.target.double(), asked_patches, errors, draws)

    def remove(self, positions: Sequence[int]) -> Effects:
        """Remove images together, by a downdate of the fit to all."""
        if len(positions) == 1:
            return self._effects(remove_rows(*self.images[positions[0]]))
        rows, errors = (torch.cat(part) for part in zip(*(self.images[place] for place in positions), strict=True))
        return self._effects(remove_sums(rows.T @ rows, rows.T @ errors))

    def fit_without(self, positions: Sequence[int]) -> Effects:
        """Fit the regression from nothing, by a QR decomposition of the other images' rows, and to all images."""
        before, after = self._regress(()), self._regress(positions)
        rises = after[1].square().sum(1) - before[1].square().sum(1)
        return self._means(self.patches @ (after[0] - before[0]), rises)

    def _regress(self, without: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the optimum [K, C], and rows [n, K] whose squares add up to the variances of the queries' outputs."""
        state = self.refit.laplace.state
        kept = torch.ones(len(self.images), dtype=torch.bool)
        kept[list(without)] = False
        kept = kept.repeat_interleave(state.repeats)
        prior = state.prior_precision**0.5 * torch.eye(self.rows.shape[1], dtype=torch.float64)
        above = torch.cat([self.rows[kept], prior])
        pull = prior.diagonal()[:, None] * state.prior_mean.expand_as(self.refit.change).T
        q, r = torch.linalg.qr(above)
        optimum = torch.linalg.solve_triangular(r, q.T @ torch.cat([self.targets[kept], pull]), upper=True)
        return optimum, torch.linalg.solve_triangular(r.T, self.patches.T, upper=False).T

    def _effects(self, removed: Removed) -> Effects:
        return self._means(*removed.maps(self.refit, self.patches))

    def _means(self, moved: Tensor, rises: Tensor) -> Effects:
        """Return the means over the draws of each query, of changes [n, C] and rises [n]."""
        loss = ((self.errors + moved).square() - self.errors.square()).mean(1)
        found = (loss, moved.square().mean(1), rises)
        return Effects(*(value.unflatten(0, (-1, self.draws)).mean(1) for value in found))
