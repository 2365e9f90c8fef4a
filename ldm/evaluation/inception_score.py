"""Inception Score: exp of the mean KL divergence of p(y|x) from p(y) (Salimans et al. 2016, arXiv 1606.03498)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.stats import t
from torch import Tensor

from ldm.evaluation.resampling import LEAST_SAMPLES, HalfSampling, draw_halves
from ldm.evaluation.statistics import FeatureArray, blocks, check_features
from ldm.stats import Interval
from ldm.util import generator


def probabilities(logits: FeatureArray) -> Tensor:
    """Softmax of logits [N, K] in float64."""
    check_features("logits", logits)
    return torch.cat([rows.softmax(dim=1) for _, rows in blocks(logits)])


def inception_score(predictions: Tensor, splits: int = 1, seed: int | None = None) -> Tensor:
    """Score of each of `splits` near-equal parts [splits], from 1 (all alike) to K (certain and balanced).

        IS = exp( mean_x sum_y p(y|x) ln( p(y|x) / p(y) ) ),    p(y) = mean_x p(y|x) within the part

    Args:
        predictions: p(y|x), [N, K], rows that sum to 1.
        splits: number of parts. The published score is the mean over 10, or over parts of 5,000.
        seed: shuffles the images first, so that an order by class does not make parts of one class; None keeps it.

    Raises:
        ValueError: if rows are no probabilities, or there are fewer images than parts.
    """
    check_features("predictions", predictions, least=max(splits, 1))
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    predictions = predictions.double()
    if float(predictions.min()) < 0 or float((predictions.sum(1) - 1).abs().max()) > 1e-5:
        raise ValueError("predictions must be probabilities: rows of values >= 0 that sum to 1 (take a softmax)")
    if seed is not None:
        order = torch.randperm(len(predictions), generator=generator("inception score", seed))
        predictions = predictions[order]
    return torch.stack([_score(part) for part in predictions.tensor_split(splits)])


def _score(predictions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Score of one part; weights [R, N] that sum to N give R scores."""
    weights = predictions.new_ones(1, len(predictions)) if weights is None else weights
    share = weights / weights.sum(1, keepdim=True)
    certain = torch.special.entr(predictions).sum(1)  # [N], entropy of p(y|x)
    spread = torch.special.entr(share @ predictions).sum(1)  # [R], entropy of p(y)
    return (spread - share @ certain).exp().squeeze(0)


# Up to this estimated bias of ln IS the first order in 1 / N is nearly all of it.
SMALL_BIAS = 0.02


class InceptionScores(NamedTuple):
    """The score of N images, with an interval for their draw, and the same without the bias of N.

    Attributes:
        published: the score as published. It grows with N, most where the classes K are many: its interval covers what
            other draws of N images give on average.
        corrected: without the bias of ln IS of first order in 1 / N, estimated by halves (as Miller's correction of an
            entropy). Without an interval where that bias is above `SMALL_BIAS`: N is too small for K classes.
    """

    published: Interval
    corrected: Interval


def measure_inception_scores(predictions: Tensor, resamples: int = 0, seed: int = 0) -> InceptionScores:
    """Score all images as one part, with 95 % intervals.

    ln IS is the mean of the images' KL divergences of p(y|x) from p(y), so that its linear part has the variance of
    these over N exactly; halves say what its quadratic part adds, and its bias.

    Args:
        predictions: p(y|x), [N, K], rows that sum to 1.
        resamples: halves of the images that are scored; 0: no interval and no correction.
        seed: of the halves.
    """
    value = float(inception_score(predictions))
    if not resamples or len(predictions) < LEAST_SAMPLES:
        return InceptionScores(Interval(value), Interval(math.nan))
    weights = draw_halves(len(predictions), resamples, "inception score", seed)
    predictions = predictions.double()
    found = HalfSampling.from_halves(math.log(value), _score(predictions, weights).log())
    deviation = math.hypot(float(_divergences(predictions).std()) / len(predictions) ** 0.5, found.quadratic)
    reach = float(t.ppf(0.975, len(predictions) - 1)) * deviation
    published, corrected = (
        _exponential(Interval(centre, centre - reach, centre + reach, len(predictions)))
        for centre in (math.log(value), math.log(value) - found.bias)
    )
    if abs(found.bias) > SMALL_BIAS:
        corrected = replace(corrected, low=math.nan, high=math.nan)
    return InceptionScores(published, corrected)


def _divergences(predictions: Tensor) -> Tensor:
    """KL divergence of each image's p(y|x) [N, K] from the mean over images, [N] in nats."""
    return torch.special.xlogy(predictions, predictions / predictions.mean(0).clamp_min(1e-300)).sum(1)


def _exponential(interval: Interval) -> Interval:
    """Return the interval of exp of a quantity; no score is below 1."""
    low, high = (max(1.0, math.exp(end)) for end in (interval.low, interval.high))
    return replace(interval, estimate=math.exp(interval.estimate), low=low, high=high)
