"""Points in the plane whose epistemic uncertainty is known: Gaussian classes with a conjugate prior.

A class is x_0 ~ N(mu, s^2 I) with both unknown. The exact posterior given N points, hence the exact denoiser of every
draw from it, the exact ensemble of any size, and the true mutual information I(z_s; mu, s^2 | z_u) of a stochastic step
need no training. A point is a state [2, 1, 1], so samplers, branching and measures take it as they take an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.interpolate import CubicSpline
from scipy.special import gammaincinv, lambertw
from torch import Tensor

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers import Transition
from ldm.diffusion.schedule import Schedule
from ldm.experiments.toy import GaussianDenoiser

DIMS = 2
# Nodes of the precision lie where its density is above e^-TAIL times its peak.
TAIL = 28.0


def as_states(points: Tensor) -> Tensor:
    """Points [..., 2] as states [..., 2, 1, 1]."""
    return points[..., None, None]


@dataclass(frozen=True)
class GaussianMembers:
    """M Gaussians N(mean_i, var_i I) as an ensemble: mean [M, 2], var [M]."""

    mean: Tensor
    var: Tensor

    def __post_init__(self):
        if self.mean.ndim != 2 or self.mean.shape[1] != DIMS or self.var.shape != self.mean.shape[:1]:
            raise ValueError(f"expected mean [M, 2] and var [M], got {tuple(self.mean.shape)}, {tuple(self.var.shape)}")

    def denoiser(self, schedule: Schedule) -> MemberDenoiser:
        """All members at once: x [B, 2, 1, 1] or [M, B, 2, 1, 1] -> [M, B, 2, 1, 1]."""
        return MemberDenoiser(schedule, as_states(self.mean)[:, None], self.var.reshape(-1, 1, 1, 1, 1))

    def single(self, schedule: Schedule, index: int) -> GaussianDenoiser:
        """Member `index` alone: x [B, 2, 1, 1] -> [B, 2, 1, 1]."""
        mean = as_states(self.mean[index])
        return GaussianDenoiser(schedule, mean, self.var[index].expand_as(mean))


@dataclass(frozen=True)
class MemberDenoiser:
    """Posterior means of isotropic Gaussian members; each alone is a `GaussianDenoiser`.

    Args:
        mean: [M, 1, 2, 1, 1].
        var: [M, 1, 1, 1, 1].
    """

    schedule: Schedule
    mean: Tensor
    var: Tensor

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        alpha, sigma = self.schedule.coefficients(u, x)
        mean, var = self.mean.to(x), self.var.to(x)
        residual = (x - alpha * mean) / (alpha**2 * var + sigma**2)
        return Prediction(mean + alpha * var * residual, sigma * residual)


@dataclass(frozen=True)
class NormalInverseGamma:
    """Conjugate belief about a class: mu | s^2 ~ N(mean, s^2 / kappa I), 1 / s^2 ~ Gamma(shape, rate).

    (Murphy 2007, "Conjugate Bayesian analysis of the Gaussian distribution", section 6, with s^2 shared by two axes.)

    Args:
        mean: [2].
        kappa: how many points the belief about mu is worth.
        shape, rate: of the precision 1 / s^2, in 1 and squared units.
    """

    mean: Tensor
    kappa: float
    shape: float
    rate: float

    def __post_init__(self):
        if self.mean.shape != (DIMS,) or min(self.kappa, self.shape, self.rate) <= 0:
            raise ValueError(
                f"expected mean [2] and kappa, shape, rate above 0; got {tuple(self.mean.shape)}, {self.kappa}, "
                f"{self.shape}, {self.rate}"
            )

    def posterior(self, points: Tensor) -> NormalInverseGamma:
        """The belief after points [N, 2]; N may be 0."""
        count = len(points)
        if count == 0:
            return self
        centre = points.mean(0)
        kappa = self.kappa + count
        spread = (points - centre).square().sum() + self.kappa * count / kappa * (centre - self.mean).square().sum()
        mean = (self.kappa * self.mean + count * centre) / kappa
        return NormalInverseGamma(mean, kappa, self.shape + 0.5 * DIMS * count, self.rate + 0.5 * float(spread))

    def draw(self, count: int, source: torch.Generator) -> GaussianMembers:
        """`count` independent draws of (mu, s^2): the exact ensemble."""
        uniform = torch.rand(count, generator=source, dtype=torch.float64)
        var = self.rate / torch.from_numpy(gammaincinv(self.shape, uniform.numpy()))
        normal = torch.randn(count, DIMS, generator=source, dtype=torch.float64)
        return GaussianMembers(self.mean + (var / self.kappa).sqrt()[:, None] * normal, var)

    def precisions(self, count: int) -> tuple[Tensor, Tensor]:
        """Nodes and weights [count] of the trapezoid rule over ln(1 / s^2), which converges exponentially."""
        level = -math.exp(-1 - TAIL / self.shape)
        left, right = (math.log(-lambertw(level, branch).real) for branch in (0, -1))
        offset = torch.linspace(left, right, count, dtype=torch.float64)
        weights = torch.softmax(self.shape * (offset - offset.exp()), 0)
        return self.shape / self.rate * offset.exp(), weights


def bootstrap_members(
    points: Tensor, prior: NormalInverseGamma, count: int, source: torch.Generator, anchored: bool = True
) -> GaussianMembers:
    """The practical ensemble: each member fits its own bootstrap of points [N, 2].

    Anchored (Pearce et al. 2020, "Uncertainty in neural networks: approximately Bayesian ensembling"): member i fits
    by maximum a posteriori around its own draw (mu_i, s_i^2) of the prior, which stands for kappa points at mu_i and
    2 shape squared residuals of mean s_i^2. So the ensemble is the prior at N = 0. Otherwise the fits are maximum
    likelihood. Given the points, with S^2 = sum_n |x_n - mean|^2 / (2 N), the members' mu has on each axis the variance

        (kappa E[s_i^2] + N S^2) / (kappa + N)^2

    which nears the posterior's for many points, but not for one: S^2 = 0, its bootstraps are all alike, and what is
    left is the anchors' part, or nothing. Members of one point agree too much, however little they know.

    Raises:
        ValueError: if there are no points and no anchors.
    """
    total = len(points)
    if not total and not anchored:
        raise ValueError("a maximum-likelihood fit needs at least one point; use anchored=True")
    anchors = prior.draw(count, source)
    kappa, shape = (prior.kappa, prior.shape) if anchored else (0.0, 0.0)
    chosen = torch.randint(max(total, 1), (count, total), generator=source)
    resampled = points[chosen].to(torch.float64)  # [M, N, 2]
    mean = (kappa * anchors.mean + resampled.sum(1)) / (kappa + total)
    squares = (resampled - mean[:, None]).square().sum((1, 2)) + kappa * (anchors.mean - mean).square().sum(1)
    return GaussianMembers(mean, (shape * anchors.var + 0.5 * squares) / (shape + 0.5 * DIMS * total))


def known_variance_information(kappa: float, var: float, schedule: Schedule, transition: Transition) -> float:
    """I(z_s; mu | z_u) in nats where s^2 = `var` is known and mu ~ N(., var / kappa I): the step is linear in mu.

        I = (2/2) ln( 1 + (B g)^2 var / (kappa w) ),    g = d x0_hat / d mu = sigma^2 / (alpha^2 var + sigma^2)

    with z_s = A z_u + B x0_hat + sqrt(w) noise. With the ancestral variance B^2 / w is the gain in signal-to-noise
    ratio, (alpha_s / sigma_s)^2 - (alpha_u / sigma_u)^2. The same at every z_u.
    """
    _, lever, noise = _step_line(schedule, transition)
    alpha, sigma = float(schedule.alpha(transition.u)), float(schedule.sigma(transition.u))
    gain = sigma**2 / (alpha**2 * var + sigma**2)
    return 0.5 * DIMS * math.log1p((lever * gain) ** 2 * var / (kappa * noise))


def step_information(
    belief: NormalInverseGamma,
    schedule: Schedule,
    transition: Transition,
    x: Tensor,
    nodes: int = 40,
    order: int = 12,
    knots: int | None = None,
) -> Tensor:
    """True epistemic uncertainty of a step: I(z_s; mu, s^2 | z_u = x) in nats, float64 [B].

    Given s^2 the state z_s is Gaussian in closed form; over s^2 it is a mixture, whose entropy is found by
    Gauss-Hermite quadrature about each of its parts. It depends on x only through |x - alpha mean|. Doubling both
    numbers of nodes changes the result of the defaults by less than 1e-6 nats (a test checks it).

    Args:
        belief: about the class, prior or posterior.
        transition: a stochastic step (w > 0) of `ldm.diffusion.samplers`.
        x: states [B, 2, 1, 1] at transition.u.
        nodes: of s^2.
        order: of each axis of the plane, even.
        knots: evaluate at so many radii only, with a cubic spline between them: for maps.

    Raises:
        ValueError: for a step without noise, whose information is infinite, or an odd order.
    """
    alpha = float(schedule.alpha(transition.u))
    radius = (x.double().flatten(1) - alpha * belief.mean).norm(dim=1).cpu()
    if knots is None or len(radius) <= knots:
        return _information(belief, schedule, transition, radius, nodes, order)
    places = torch.linspace(float(radius.min()), float(radius.max()), knots, dtype=torch.float64)
    values = _information(belief, schedule, transition, places, nodes, order)
    return torch.from_numpy(CubicSpline(places.numpy(), values.numpy())(radius.numpy()))


def _information(
    belief: NormalInverseGamma, schedule: Schedule, transition: Transition, radius: Tensor, nodes: int, order: int
) -> Tensor:
    """I(z_s; mu, s^2 | z_u) at distances `radius` [B] of z_u from alpha mean."""
    if order % 2:
        raise ValueError(f"order must be even, so that the half-plane can be mirrored; got {order}")
    _, lever, noise = _step_line(schedule, transition)
    alpha, sigma = float(schedule.alpha(transition.u)), float(schedule.sigma(transition.u))
    precision, weights = belief.precisions(nodes)
    var = 1 / precision
    total = alpha**2 * var + sigma**2
    place = lever * alpha * var / total  # [K], of the mean along the ray, for each unit of radius
    spread = noise + (lever * sigma**2 / total) ** 2 * var / belief.kappa  # [K], variance of z_s on each axis
    abscissae, masses = (torch.from_numpy(np.asarray(values)) for values in hermegauss(order))
    masses = masses / masses.sum()
    across, mirrored = abscissae[order // 2 :], 2 * masses[order // 2 :]
    share = weights[:, None, None] * masses[:, None] * mirrored  # [K, G, G / 2]
    tangent = (spread.sqrt()[:, None] * across).square()[:, None, :, None] / spread  # [K, 1, G / 2, K]
    log_part = weights.log() - 0.5 * DIMS * (2 * math.pi * spread).log()  # [K]
    entropies = []
    for distance in radius.tolist():
        along = distance * place[:, None] + spread.sqrt()[:, None] * abscissae  # [K, G]
        exponent = (along[..., None] - distance * place).square()[:, :, None] / spread + tangent  # [K, G, G / 2, K]
        entropies.append(-(share * (log_part - 0.5 * exponent).logsumexp(-1)).sum())
    return torch.stack(entropies) - 0.5 * DIMS * math.log(2 * math.pi * math.e * noise)


def _step_line(schedule: Schedule, transition: Transition) -> tuple[float, float, float]:
    """A, B and w of z_s = A z_u + B x0_hat + sqrt(w) noise, as the prediction's two parts rebuild z_u."""
    noise = float(transition.w)
    if noise <= 0:
        raise ValueError("the step has no noise, so its information is infinite: use eta > 0 and not the last step")
    direction = float((transition.sigma**2 - transition.v).clamp(min=0).sqrt())
    slope = direction / float(schedule.sigma(transition.u))
    return slope, float(transition.alpha) - slope * float(schedule.alpha(transition.u)), noise
