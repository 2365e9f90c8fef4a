"""Evidence of a last-layer posterior and the choice of its hyperparameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.laplace.statistics import Observation

if TYPE_CHECKING:
    from ldm.laplace.posterior import LastLayerLaplace

log = logging.getLogger(__name__)

LOW, HIGH = 1e-8, 1e10  # bounds of prior precisions
HELD = 2**26  # values of features that the search by held-out likelihood holds at once


def log_likelihood(laplace: LastLayerLaplace) -> float:
    """ln p(targets | trained weights) of `data_size` images in nats; the temperature divides its misfit."""
    statistics, variance = laplace.fitted(), laplace.sigma_noise.square()
    misfit = (statistics.squares.cpu() / variance).sum() / laplace.temperature
    norm = (statistics.elements.cpu() * torch.log(2 * math.pi * variance)).sum()
    return -0.5 * laplace.scale * float(misfit + norm)


def evidence(laplace: LastLayerLaplace, precisions: Tensor) -> Tensor:
    """Laplace evidence in nats for several prior precisions [N], from one spectrum.

    ln p(targets | W) - precision |W - prior_mean|^2 / 2 - (1/2) sum_k ln(1 + l_k / precision)

    Source: MacKay 1992, eq. 4.8; the sum runs over all parameters of all channels.
    """
    spectrum = laplace.spectrum().flatten().cpu()
    scatter = float((laplace.mean - laplace.prior_mean.to(laplace.mean.device)).square().sum())
    complexity = torch.stack([torch.log1p(spectrum / precision).sum() for precision in precisions])
    return log_likelihood(laplace) - 0.5 * (precisions * scatter + complexity)


def by_evidence(laplace: LastLayerLaplace, low: float = LOW, high: float = HIGH) -> float:
    """The prior precision in [low, high] of the greatest evidence: a logarithmic grid, narrowed around its best."""
    return _maximum(lambda precisions: evidence(laplace, precisions), low, high)


@torch.no_grad()
def by_held_out(
    laplace: LastLayerLaplace,
    batches: Iterable[Observation],
    low: float = 1e-4,
    high: float = 1e4,
    steps: int = 21,
) -> float:
    """The prior precision on a logarithmic grid with the greatest held-out likelihood, a value at a time.

        mean over values of ln N(target; output, variance + sigma^2)

    The trained weights stay the mean, so this asks which predictive variance fits the errors on new images. One
    covariance is held at a time, beside at most `HELD` values of features.
    """
    grid = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)
    totals = torch.zeros(steps, dtype=torch.float64)
    for block in _blocks(laplace, batches):
        for number, precision in enumerate(grid.tolist()):
            candidate = laplace.with_curvature(laplace.curvature)
            candidate.prior_precision = precision
            covariance = candidate.covariance()
            for features, squares, noise in block:
                variance = covariance.variance(laplace.layer, features, laplace.chunk).double() + noise
                totals[number] -= 0.5 * (squares / variance + variance.log()).sum().cpu()
    if not bool(totals.any()):
        raise ValueError("gridsearch needs held-out batches, got none")
    best = int(totals.argmax())
    if best in (0, steps - 1):
        log.warning(
            "the held-out likelihood is greatest at an end of the grid, prior precision %g: where the data decide all "
            "parameters it hardly matters, else move low or high",
            float(grid[best]),
        )
    return float(grid[best])


def _blocks(laplace: LastLayerLaplace, batches: Iterable[Observation]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """(features, squared errors, noise variance) of batches, so many at once that their features pass `HELD` values."""
    block, held = [], 0
    for batch in batches:
        features = laplace.features(batch.x, batch.t, batch.cond)
        squares = (batch.target.double() - laplace.output(features).double()).square()
        block.append((features, squares, laplace.noise_variance(batch.t).reshape(-1, *[1] * (squares.ndim - 1))))
        held += features.numel()
        if held >= HELD:
            yield block
            block, held = [], 0
    if block:
        yield block


def residual_sigma(laplace: LastLayerLaplace, degrees_of_freedom: bool = False) -> Tensor:
    """Standard deviation of the residuals [levels], the maximum likelihood of sigma_noise.

    With `degrees_of_freedom` the parameters that the data determine, sum_k l_k / (l_k + precision), leave the count
    (MacKay 1992, eq. 4.10), in equal parts for each value.

    Raises:
        ValueError: if a noise level saw no data, or the network fits its targets exactly.
    """
    elements = laplace.fitted().elements.cpu()
    if bool((elements == 0).any()):
        raise ValueError(f"a noise level saw no data (values in each: {elements.tolist()}): move time_edges")
    share = 1.0
    if degrees_of_freedom:
        spectrum = laplace.spectrum()
        share -= float((spectrum / (spectrum + laplace.prior_precision)).sum() / (laplace.scale * elements.sum()))
    return (laplace.fitted().squares.cpu() / (elements * share)).sqrt()


TUNERS: dict[str, Callable[..., float]] = {"marglik": by_evidence, "gridsearch": by_held_out}


def _maximum(function: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Where a function of [N] positive numbers is greatest, to a relative 1e-9.

    Raises:
        ValueError: if that is at a bound.
    """
    left, right, points = math.log(low), math.log(high), 61
    first = True
    while right - left > 1e-9:
        grid = torch.linspace(left, right, points, dtype=torch.float64)
        best = int(function(grid.exp()).argmax())
        if first and best in (0, points - 1):
            raise ValueError(
                f"the evidence has no maximum between prior precisions {low:g} and {high:g} (it grows towards "
                f"{float(grid[best].exp()):g}): weights equal to prior_mean ask for an infinite one"
            )
        first = False
        left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
    return math.exp((left + right) / 2)
