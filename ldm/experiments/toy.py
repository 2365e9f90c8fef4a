"""Exact denoisers of known data: Gaussians and mixtures. Every answer about them has a closed form, so they test
samplers, uncertainty and metrics without training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class GaussianDenoiser:
    """Posterior means for data x_0 ~ N(mean, S) and any schedule, exact at both ends (sigma = 0, alpha = 0).

        E[x_0 | x] = mean + alpha S r,   E[eps | x] = sigma r,   r = (alpha^2 S + sigma^2 I)^-1 (x - alpha mean)

    The deterministic flow and all moments of x_u are known too: every sampler step is affine in x.

    Args:
        mean: [C, H, W].
        var: eigenvalues of S [C, H, W]; with no `basis` the variance of each element.
        basis: eigenvectors of S as columns [C H W, C H W], or None for a diagonal S.
    """

    schedule: Schedule
    mean: Tensor
    var: Tensor
    basis: Tensor | None = None

    def __post_init__(self):
        if self.mean.ndim != 3 or self.var.shape != self.mean.shape or bool((self.var < 0).any()):
            raise ValueError(
                f"mean and var must be [C, H, W] with var >= 0, got {tuple(self.mean.shape)}, {tuple(self.var.shape)}"
            )

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        alpha, sigma = self.schedule.coefficients(u, x)
        var = self.var.to(x)
        residual = self._rotate(x - alpha * self.mean.to(x), inverse=True) / (alpha**2 * var + sigma**2)
        x0 = self.mean.to(x) + self._rotate(alpha * var * residual)
        return Prediction(x0, sigma * self._rotate(residual))

    def flow(self, x: Tensor, u: float, s: float) -> Tensor:
        """Where the deterministic flow takes x [..., C, H, W] from u to s: every eigendirection keeps its z-score."""
        (alpha, var), (alpha_s, var_s) = self._marginal(u, x), self._marginal(s, x)
        centred = self._rotate(x - alpha * self.mean.to(x), inverse=True)
        return alpha_s * self.mean.to(x) + self._rotate((var_s / var).sqrt() * centred)

    def marginal_var(self, u: float) -> Tensor:
        """Eigenvalues [C, H, W] of the covariance of x_u, alpha^2 S + sigma^2."""
        return self._marginal(u, self.var)[1]

    def _marginal(self, u: float, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(u, like)
        return alpha, alpha**2 * self.var.to(like) + sigma**2

    def _rotate(self, x: Tensor, inverse: bool = False) -> Tensor:
        if self.basis is None:
            return x
        basis = self.basis.to(x)
        return (x.flatten(-3) @ (basis if inverse else basis.T)).reshape(x.shape)


def correlated_gaussian(schedule: Schedule, mean: Tensor, covariance: Tensor) -> GaussianDenoiser:
    """The exact denoiser of N(mean [C, H, W], covariance [C H W, C H W])."""
    if covariance.shape != (mean.numel(), mean.numel()):
        raise ValueError(f"covariance must be {(mean.numel(),) * 2}, got {tuple(covariance.shape)}")
    values, vectors = torch.linalg.eigh(covariance)
    return GaussianDenoiser(schedule, mean, values.clamp(min=0).reshape(mean.shape), vectors)


@dataclass(frozen=True)
class MixtureDenoiser:
    """Posterior means for data from a mixture sum_k w_k N(mean_k, var_k); var 0 makes it a set of points.

    E[x_0 | x] is the mean of the components' posterior means under their responsibilities,
    r_k ~ w_k N(x; alpha mean_k, alpha^2 var_k + sigma^2).

    Args:
        means: [K, C, H, W].
        var: variance of each element, anything that broadcasts to `means`.
        weights: [K], positive; equal where None.
    """

    schedule: Schedule
    means: Tensor
    var: Tensor | float = 0.0
    weights: Tensor | None = None

    def __post_init__(self):
        if self.means.ndim != 4 or (self.weights is not None and self.weights.shape != self.means.shape[:1]):
            raise ValueError(f"means must be [K, C, H, W] and weights [K], got means {tuple(self.means.shape)}")

    def responsibilities(self, x: Tensor, u: Tensor | float) -> Tensor:
        """Probability [..., B, K] that x came from each component."""
        alpha, _, means, spread, _ = self._parts(x, u)
        distance = (x.unsqueeze(-4) - alpha * means) ** 2 / spread + spread.log()  # [..., B, K, C, H, W]
        log_weights = torch.zeros(len(means)) if self.weights is None else self.weights.log()
        return torch.softmax(log_weights.to(x) - 0.5 * distance.sum(dim=(-3, -2, -1)), dim=-1)

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        alpha, sigma, means, spread, var = self._parts(x, u)
        shares = self.responsibilities(x, u)[..., None, None, None]  # [..., B, K, 1, 1, 1]
        residual = (x.unsqueeze(-4) - alpha * means) / spread
        x0 = (shares * (means + alpha * var * residual)).sum(-4)
        return Prediction(x0, (shares * sigma * residual).sum(-4))

    def _parts(self, x: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma (per image, with a component axis), means, alpha^2 var + sigma^2, var."""
        alpha, sigma = self.schedule.coefficients(u, x)
        if alpha.ndim:
            alpha, sigma = alpha[..., None], sigma[..., None]
        means = self.means.to(x)
        var = torch.as_tensor(self.var).to(x).expand(means.shape)
        return alpha, sigma, means, alpha**2 * var + sigma**2, var
