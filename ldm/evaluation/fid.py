"""Frechet distance between Gaussians fitted to features: FID (Heusel et al. 2017, arXiv 1706.08500, Equation 6).

sFID (Nash et al. 2021, arXiv 2103.03841) is the same distance on spatial features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.evaluation.resampling import LEAST_SAMPLES, HalfSampling, draw_halves
from ldm.evaluation.statistics import FeatureArray, FeatureStatistics, moments
from ldm.stats import Interval


def square_root(covariance: Tensor) -> Tensor:
    """R [D, D] with R^T R = covariance, by its eigenvalues; those that rounding made negative count as 0.

    Raises:
        ValueError: if the matrix is not symmetric within 1e-6 of its largest entry.
    """
    scale = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > 1e-6 * scale:
        raise ValueError("a covariance must be symmetric; is this file another matrix?")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of N(mu_a, S_a) and N(mu_b, S_b), in squared units of the features.

        d = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^(1/2) S_b S_a^(1/2))^(1/2)

    The last trace is the sum of the singular values of S_a^(1/2) S_b^(1/2): their squares are the eigenvalues of the
    symmetric product, and no small one is lost to a square root of rounding, also where covariances are singular.

    Raises:
        ValueError: if the dimensions differ.
    """
    check_dimensions(a, b)
    return _distance(a, b, square_root(a.covariance))


def check_dimensions(a: FeatureStatistics, b: FeatureStatistics) -> None:
    """Raise ValueError unless both are of features of one dimension."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared: both sides must come from one "
            "extractor"
        )


def _distance(a: FeatureStatistics, b: FeatureStatistics, root_a: Tensor) -> float:
    return _parts(a, b) - 2 * float(torch.linalg.svdvals(root_a @ square_root(b.covariance).T).sum())


def _parts(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The distance without its last term."""
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())


def _resampled_distance(a: FeatureStatistics, b: FeatureStatistics, root_a: Tensor) -> float:
    """`_distance` by eigenvalues alone: a quarter of the time at D = 2,048, and rounding of small ones is kept."""
    product = root_a @ b.covariance @ root_a.T
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return _parts(a, b) - 2 * float(shared)


def fid(
    reference: FeatureStatistics,
    samples: FeatureArray,
    resamples: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Interval:
    """FID of samples [N, D] against a reference, with an interval for the draw of the samples.

    The interval covers what repeated draws of N samples give on average, the reference held fixed, also where the two
    laws are nearly equal: see `ldm.evaluation.resampling`. It says nothing about the bias: FID falls as N grows, so
    compare values of equal N only (arXiv 1801.01401).

    Args:
        resamples: halves of the samples that are measured; 0: no interval.
    """
    reference = FeatureStatistics(reference.mean.to(device), reference.covariance.to(device))
    own = moments(samples, device=device).statistics()
    check_dimensions(reference, own)
    root = square_root(reference.covariance)
    value = _distance(reference, own, root)
    if not resamples or len(samples) < LEAST_SAMPLES:
        return Interval(value)
    halves = [
        _resampled_distance(reference, moments(samples, weights, device).statistics(), root)
        for weights in draw_halves(len(samples), resamples, "fid", seed)
    ]
    return HalfSampling.from_halves(value, torch.tensor(halves, dtype=torch.float64)).interval(value)


def extrapolated(counts: Tensor, values: Tensor) -> tuple[float, float]:
    """FID without its leading bias: intercept and slope of value = intercept + slope / N by least squares.

    (Chong & Forsyth 2020, arXiv 1911.07023.) counts: [P] images of each value, of at least two sizes; values: [P].

    Raises:
        ValueError: if there are fewer than two different counts.
    """
    if len(counts.unique()) < 2:
        raise ValueError(f"extrapolation needs at least two sample sizes, got {counts.unique().tolist()}")
    inverse = 1 / counts.double()
    design = torch.stack((torch.ones_like(inverse), inverse), dim=1)
    intercept, slope = torch.linalg.lstsq(design, values.double()[:, None]).solution[:, 0]
    return float(intercept), float(slope)
