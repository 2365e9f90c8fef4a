"""Covariances of the last layer's parameters: predictive variance of an output and draws, in bounded memory.

Every covariance is over the K entries of one output channel's row of parameters; rows are independent of one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.laplace.layer import LastLayer


class Covariance(Protocol):
    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        """Var f_c(p) = a_p^T S_c a_p in the output's shape [B, C, H, W] (or [B, ..., C])."""

    def correlate(self, noise: Tensor) -> Tensor:
        """Draws [M, C, K] of N(0, S_c) from standard normal `noise` [M, C, K]."""


@dataclass(frozen=True)
class DenseCovariance:
    """S_c = root_c root_c^T: root [1, K, K] shared by all channels, or [C, K, K].

    Source: Bayesian linear regression on patches; the GGN of a convolution under a Gaussian likelihood is I_C (x) A.
    """

    root: Tensor

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        root, pieces = self.root.to(features), []
        for part in features.split(chunk):
            patches = layer.patches(part)  # [n, P, K]
            gamma = torch.stack([(patches @ each).square().sum(-1) for each in root], -1)  # [n, P, 1 or C]
            gamma = layer.as_output(gamma, part)
            pieces.append(gamma if len(root) > 1 else layer.for_all_outputs(gamma))
        return torch.cat(pieces)

    def correlate(self, noise: Tensor) -> Tensor:
        return torch.einsum("gkl,mgl->mgk", self.root.expand(noise.shape[1], -1, -1), noise)


@dataclass(frozen=True)
class DiagonalCovariance:
    """S_c = diag(var_c), var [C, K]: the variance is one more convolution, of squared features."""

    var: Tensor

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        shared = bool((self.var == self.var[:1]).all())
        gamma = layer.apply(self.var[:1] if shared else self.var, features.square())
        return layer.for_all_outputs(gamma) if shared else gamma

    def correlate(self, noise: Tensor) -> Tensor:
        return self.var.sqrt() * noise


@dataclass(frozen=True)
class LowRankCovariance:
    """S = (I - Q diag(shrink) Q^T) / precision, the posterior that knows only the leading r eigenvectors of the data.

        Var f(p) = (|a_p|^2 - sum_k shrink_k (q_k^T a_p)^2) / precision,   shrink_k = l_k / (l_k + precision)

    Never below the full posterior's. `vectors` Q [K, r], `shrink` [r] in [0, 1).
    """

    vectors: Tensor
    shrink: Tensor
    precision: float

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        everywhere = torch.ones_like(self.vectors[:, 0])[None]
        filters = (self.vectors * self.shrink.sqrt()).T  # [r, K]
        pieces = []
        for part in features.split(chunk):
            energy = layer.apply(everywhere, part.square())  # [n, 1, H, W]
            known = layer.apply(filters, part).square().sum(layer.channel_axis, keepdim=True)
            pieces.append(layer.for_all_outputs(((energy - known) / self.precision).clamp(min=0)))
        return torch.cat(pieces)

    def correlate(self, noise: Tensor) -> Tensor:
        inside = noise @ self.vectors  # [M, C, r]
        return (noise + (inside * ((1 - self.shrink).sqrt() - 1)) @ self.vectors.T) / self.precision**0.5


def root_of_precision(precision: Tensor) -> Tensor:
    """root with root root^T = precision^-1, from one Cholesky L L^T: root = L^-T; precision [K, K].

    Raises:
        ValueError: if the precision is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed):
        raise ValueError(
            "the posterior precision is not positive definite in float64: raise prior_precision (the features are "
            "collinear or hold values that are not finite)"
        )
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).T


def root_of_semidefinite(matrices: Tensor) -> Tensor:
    """root with root root^T = matrices [C, K, K], which may be singular (fewer images than entries)."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
