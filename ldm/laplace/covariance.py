"""Covariances of a last layer's parameters, and what they say of an output, in bounded memory.

Every covariance is over the K entries of one output channel's row of parameters; rows are
independent of one another but where a dense one correlates them. What it says of an output has a
closed form without Jacobians.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.laplace.layer import LastLayer


class Covariance(Protocol):
    """The covariance S_c of row c of the parameters, [K, K] for each of C channels."""

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        """Return Var f_c(p) = a_p^T S_c a_p in the output's shape, [B, C, H, W] or [B, ..., C]."""

    def correlate(self, noise: Tensor) -> Tensor:
        """Return draws [M, C, K] of N(0, S_c) made from standard normal `noise` [M, C, K]."""

    def total(self, gram: Tensor) -> Tensor:
        """Return tr(S_c gram) [1 or C]: the sum of a^T S_c a over the patches a of gram = sum a a^T."""


@dataclass(frozen=True)
class DenseCovariance:
    """S_c = root_c root_c^T, where `root` is [1, K, K'] shared by all channels, or [C, K, K'].

    With `channels` [C, C], a root of a correlation, rows are drawn together,

        Cov(row_c, row_d) = (channels channels^T)_cd root_c root_d^T

    Source: Bayesian linear regression on patches; the GGN of a convolution under a Gaussian
    likelihood is I_C (x) A.
    """

    root: Tensor
    channels: Tensor | None = None

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        """Return the variance of the output, `chunk` images at a time; see `Covariance`."""
        root = self.root.to(features)
        pieces = []
        for part in features.split(chunk):
            patches = layer.patches(part)  # [n, P, K]
            gamma = torch.stack([(patches @ each).square().sum(-1) for each in root], -1)  # [n, P, 1 or C]
            pieces.append(layer.as_output(gamma, part))
        return torch.cat(pieces)

    def correlate(self, noise: Tensor) -> Tensor:
        """Return draws of the parameters; see `Covariance`."""
        if self.channels is not None:
            noise = torch.einsum("cd,mdl->mcl", self.channels, noise)
        return torch.einsum("gkl,mgl->mgk", self.root.expand(noise.shape[1], -1, -1), noise)

    def total(self, gram: Tensor) -> Tensor:
        """Return the sum of variances over patches; see `Covariance`."""
        return ((gram @ self.root) * self.root).sum((1, 2))


@dataclass(frozen=True)
class DiagonalCovariance:
    """S_c = diag(var_c) with `var` [C, K]: the variance is one more convolution, of squared features."""

    var: Tensor

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        """Return the variance of the output, of all images at once; see `Covariance`."""
        shared = bool((self.var == self.var[:1]).all())
        gamma = layer.apply(self.var[:1] if shared else self.var, features.square())
        return layer.for_all_outputs(gamma)

    def correlate(self, noise: Tensor) -> Tensor:
        """Return draws of the parameters; see `Covariance`."""
        return self.var.sqrt() * noise

    def total(self, gram: Tensor) -> Tensor:
        """Return the sum of variances over patches; see `Covariance`."""
        return self.var @ gram.diagonal()


@dataclass(frozen=True)
class LowRankCovariance:
    """The posterior that knows only the leading r eigenvectors of the data.

        S = (I - Q diag(shrink) Q^T) / precision
        Var f(p) = (|a_p|^2 - sum_k shrink_k (q_k^T a_p)^2) / precision
        shrink_k = l_k / (l_k + precision)

    It is never below the full posterior's. `vectors` is Q [K, r], `shrink` is [r] in [0, 1).
    """

    vectors: Tensor
    shrink: Tensor
    precision: float

    def variance(self, layer: LastLayer, features: Tensor, chunk: int) -> Tensor:
        """Return the variance of the output, `chunk` images at a time; see `Covariance`."""
        everywhere = torch.ones_like(self.vectors[:, 0])[None]
        filters = (self.vectors * self.shrink.sqrt()).T  # [r, K]
        pieces = []
        for part in features.split(chunk):
            energy = layer.apply(everywhere, part.square())  # [n, 1, H, W]
            known = layer.apply(filters, part).square().sum(layer.channel_axis, keepdim=True)
            pieces.append(layer.for_all_outputs(((energy - known) / self.precision).clamp(min=0)))
        return torch.cat(pieces)

    def correlate(self, noise: Tensor) -> Tensor:
        """Return draws of the parameters; see `Covariance`."""
        inside = noise @ self.vectors  # [M, C, r]
        return (noise + (inside * ((1 - self.shrink).sqrt() - 1)) @ self.vectors.T) / self.precision**0.5

    def total(self, gram: Tensor) -> Tensor:
        """Return the sum of variances over patches; see `Covariance`."""
        known = self.shrink @ ((gram @ self.vectors) * self.vectors).sum(0)
        return ((gram.trace() - known) / self.precision)[None]


class OutputLaw(NamedTuple):
    """What a posterior says of a network's output, without the noise of targets.

    `mean` [B, C, H, W] is in the output's units, `variance` [B, C, H, W] in their square.
    """

    mean: Tensor
    variance: Tensor


def predict_output(layer: LastLayer, covariance: Covariance, features: Tensor, chunk: int = 4) -> OutputLaw:
    """Return the law of the output f_p = W a_p for the layer's input `features` [B, F, H, W].

        mean f_p = W_0 a_p,   Var f_c(p) = a_p^T S_c a_p

    Args:
        covariance: of the parameters, from `make_covariance(state)`.
        chunk: images whose patches are held at once.
    """
    return OutputLaw(layer.output(features), covariance.variance(layer, features, chunk))


def sample_parameters(
    mean: Tensor,
    covariance: Covariance,
    count: int,
    generator: torch.Generator,
    antithetic: bool = False,
) -> Tensor:
    """Return draws [count, C, K] of N(mean, S_c) for the parameters' `mean` [C, K], float64.

    With `antithetic`, they come in pairs mean + d, mean - d, whose mean is the trained weights.

    Raises:
        ValueError: for no draws, or an odd number of antithetic ones.
    """
    if count < 1 or (antithetic and count % 2):
        raise ValueError(f"expected at least one member, an even number if antithetic, got {count}")
    shape = (count // 2 if antithetic else count, *mean.shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(mean)
    change = covariance.correlate(noise)
    if antithetic:
        change = torch.stack([change, -change], 1).flatten(0, 1)
    return mean + change
