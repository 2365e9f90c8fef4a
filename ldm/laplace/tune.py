"""Evidence of a last-layer posterior, and the hyperparameters that are best by it or by held-out data.

Each function returns a number or tensor; `dataclasses.replace(state, prior_precision=...)` takes
it up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.laplace.curvature import data_spectrum, make_covariance
from ldm.laplace.fit import Observation
from ldm.laplace.layer import LastLayer
from ldm.laplace.split import LayerFeatures
from ldm.laplace.state import LaplaceState

TUNERS = ("marglik", "gridsearch")
_WARMEST = math.log(1e15)  # greatest |ln temperature| of a search
_CLOSE = 1e-7  # of ln variance, at which a search ends
_HELD = 2**26  # values of features that the search by held-out likelihood holds at once
_log = logging.getLogger(__name__)


def evidence(state: LaplaceState, precisions: Tensor) -> Tensor:
    """Return the Laplace evidence in nats at several prior precisions [N], from one spectrum.

        ln p(targets | W) - precision |W - prior_mean|^2 / 2 - (1/2) sum_k ln(1 + l_k / precision)

    It is exact for the full curvature where the trained weights W are the regression's optimum.
    Source: MacKay 1992, eq. 4.8; the sum runs over all parameters of all channels.

    Raises:
        ValueError: if the state is not fitted, or its curvature has no spectrum.
    """
    return _make_evidence(state)(precisions)


def _make_evidence(state: LaplaceState) -> Callable[[Tensor], Tensor]:
    """Return `evidence` as a function of the prior precisions [N] alone; the spectrum is found once."""
    spectrum = data_spectrum(state).flatten().cpu()
    scatter = float((state.mean - state.prior_mean.to(state.mean.device)).square().sum())
    likelihood = _log_likelihood(state)

    def evaluate(precisions: Tensor) -> Tensor:
        complexity = torch.stack([torch.log1p(spectrum / precision).sum() for precision in precisions])
        return likelihood - 0.5 * (precisions * scatter + complexity)

    return evaluate


def _log_likelihood(state: LaplaceState) -> float:
    """Return ln p(targets | W) of `data_size` images in nats; the temperature divides its misfit."""
    sums = state.fitted()
    variance = state.sigma_noise.square()
    misfit = (sums.squares.cpu() / variance).sum() / state.temperature
    norm = (sums.elements.cpu() * torch.log(2 * math.pi * variance)).sum()
    return -0.5 * state.scale * float(misfit + norm)


def find_precision_by_evidence(state: LaplaceState, low: float = 1e-8, high: float = 1e10) -> float:
    """Return the prior precision in [low, high] of the greatest evidence.

    A logarithmic grid is narrowed around its best point.

    Raises:
        ValueError: if the evidence has no maximum there.
    """
    return _find_maximum(_make_evidence(state), low, high)


@torch.no_grad()
def find_precision_by_held_out(
    state: LaplaceState,
    features: LayerFeatures,
    layer: LastLayer,
    batches: Iterable[Observation],
    *,
    low: float = 1e-4,
    high: float = 1e4,
    steps: int = 21,
    chunk: int = 4,
) -> float:
    """Return the prior precision of the greatest held-out likelihood, on a logarithmic grid.

        mean over values of ln N(target; output, variance + sigma^2)

    The trained weights stay the mean, so this asks which predictive variance fits the errors on
    new images. One covariance is held at a time, beside a bounded number of features.

    Args:
        features: gives the input of `layer`, the last one.
        batches: observations that the fit did not see.
        low: the least precision of the grid, and `high` the greatest, in `steps` points.
        chunk: images whose patches are held at once.

    Raises:
        ValueError: if there are no batches.
    """
    grid = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)
    totals = torch.zeros(steps, dtype=torch.float64)
    for block in _gather_blocks(state, features, layer, batches):
        for number, precision in enumerate(grid.tolist()):
            covariance = make_covariance(replace(state, prior_precision=precision))
            for held in block:
                variance = covariance.variance(layer, held.inputs, chunk).double() + held.noise
                totals[number] -= 0.5 * (held.squares / variance + variance.log()).sum().cpu()
    if not bool(totals.any()):
        raise ValueError("gridsearch needs held-out batches, got none")
    best = int(totals.argmax())
    if best in (0, steps - 1):
        _log.warning(
            "the held-out likelihood is greatest at an end of the grid, prior precision %g: where the data "
            "decide all parameters it hardly matters, else move low or high",
            float(grid[best]),
        )
    return float(grid[best])


class _HeldOut(NamedTuple):
    """A held-out batch: the layer's input, squared errors of its outputs, and variances of the noise."""

    inputs: Tensor
    squares: Tensor
    noise: Tensor


def _gather_blocks(
    state: LaplaceState, features: LayerFeatures, layer: LastLayer, batches: Iterable[Observation]
) -> Iterator[list[_HeldOut]]:
    """Yield batches, so many at once that their features pass `_HELD` values."""
    block: list[_HeldOut] = []
    count = 0
    for batch in batches:
        inputs = features(batch.x, batch.t, batch.cond)
        squares = (batch.target.double() - layer.output(inputs).double()).square()
        noise = state.noise_variance(batch.t).reshape(-1, *[1] * (squares.ndim - 1))
        block.append(_HeldOut(inputs, squares, noise))
        count += inputs.numel()
        if count >= _HELD:
            yield block
            block = []
            count = 0
    if block:
        yield block


def find_residual_sigma(state: LaplaceState, degrees_of_freedom: bool = False) -> Tensor:
    """Return the standard deviation of the residuals [levels], the maximum likelihood of sigma_noise.

    With `degrees_of_freedom` the parameters that the data determine, sum_k l_k / (l_k +
    precision), leave the count, in equal parts for each value (MacKay 1992, eq. 4.10).

    Raises:
        ValueError: if the state is not fitted, or a noise level saw no data.
    """
    sums = state.fitted()
    elements = sums.elements.cpu()
    if bool((elements == 0).any()):
        raise ValueError(f"a noise level saw no data (values in each: {elements.tolist()}): move time_edges")
    share = 1.0
    if degrees_of_freedom:
        spectrum = data_spectrum(state)
        determined = (spectrum / (spectrum + state.prior_precision)).sum()
        share -= float(determined / (state.scale * elements.sum()))
    return (sums.squares.cpu() / (elements * share)).sqrt()


def mean_variance(state: LaplaceState) -> float:
    """Return the mean predictive variance of an output on what was fitted to, in the output's units squared.

        mean over channels c, draws and positions of a^T S_c a = tr(S_c sum a a^T) / number

    It says of a posterior how wide it is, in one number.

    Raises:
        ValueError: as `make_covariance`, or if the fit gathered no sum a a^T.
    """
    sums = state.fitted()
    if sums.gram is None:
        raise ValueError("the fit gathered no gram matrix, which a mean variance takes: fit(also=['full'])")
    totals = make_covariance(state).total(sums.gram.sum(0))
    number = sums.elements.sum() / len(state.mean)
    return float(totals.mean() / number)


def find_temperature(state: LaplaceState) -> float:
    """Return the temperature at which the state's curvature has the mean variance of the sandwich.

    The sandwich is that at temperature 1, with the state's `visits`. The search follows
    ln variance in ln temperature, whose slope lies between 0 (the prior decides) and 1 (the data).

    Raises:
        ValueError: if the curvature is the sandwich itself, its sums were not gathered, or no
            temperature gives so large a variance because the prior does not.
    """
    if state.curvature == "sandwich":
        raise ValueError("the sandwich has the width of the fit's residuals by itself: tune full, kron, diag, lowrank")
    goal = math.log(mean_variance(replace(state, curvature="sandwich", temperature=1.0)))

    def excess(logarithm: float) -> float:
        """Return ln variance, over the goal's, at a temperature."""
        return math.log(mean_variance(replace(state, temperature=math.exp(logarithm)))) - goal

    low, high = -_WARMEST, _WARMEST
    for end, outside in ((low, excess(low) > 0), (high, excess(high) < 0)):
        if outside:
            raise ValueError(
                f"no temperature gives '{state.curvature}' the sandwich's mean variance {math.exp(goal):.3g}: the "
                f"prior's part does not let it pass {math.exp(goal + excess(end)):.3g}; choose another prior_precision "
                "or rank"
            )
    at = 0.0
    slope = 1.0
    over = excess(at)
    for _ in range(100):
        if abs(over) < _CLOSE:
            break
        low, high = (at, high) if over < 0 else (low, at)
        ahead = at - over / slope
        if not low < ahead < high:
            ahead = (low + high) / 2
        found = excess(ahead)
        slope = min(max((found - over) / (ahead - at), 1e-3), 1.0)
        at, over = ahead, found
    return math.exp(at)


def _find_maximum(function: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Return where a function of [N] positive numbers is greatest, to a relative 1e-9."""
    left = math.log(low)
    right = math.log(high)
    points = 61
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
        left = float(grid[max(best - 1, 0)])
        right = float(grid[min(best + 1, points - 1)])
    return math.exp((left + right) / 2)
