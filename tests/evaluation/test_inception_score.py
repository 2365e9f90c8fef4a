"""Inception Score against its limits, its definition written as a loop, and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from ldm.evaluation.inception_score import inception_score, measure_inception_scores, probabilities
from ldm.util import generator


def logits(*shape, key=0):
    return 2 * torch.randn(shape, generator=generator("is", key), dtype=torch.float64)


def test_limits_are_one_and_the_number_of_classes():
    assert inception_score(torch.full((12, 5), 0.2)).item() == pytest.approx(1, abs=1e-6)
    assert inception_score(torch.eye(7).repeat(3, 1)).item() == pytest.approx(7, rel=1e-12)
    one_class = torch.eye(7)[[2, 2, 2]]
    assert inception_score(one_class).item() == pytest.approx(1, abs=1e-12)


def test_score_is_its_definition():
    p = probabilities(logits(9, 4))
    marginal = p.mean(0)
    divergence = [sum(float(row[y]) * math.log(row[y] / marginal[y]) for y in range(4)) for row in p]
    assert inception_score(p).item() == pytest.approx(math.exp(sum(divergence) / 9), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`:UserWarning")
def test_score_is_torchmetrics():
    values = logits(200, 6)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(values)
    assert inception_score(probabilities(values)).item() == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_parts_are_scored_apart_and_a_seed_undoes_an_order_by_class():
    p = torch.eye(4, dtype=torch.float64).repeat_interleave(25, dim=0)  # sorted by class
    assert inception_score(p, splits=4).tolist() == pytest.approx([1] * 4)
    shuffled = inception_score(p, splits=4, seed=3)
    assert (shuffled > 3.5).all() and torch.equal(shuffled, inception_score(p, splits=4, seed=3))
    assert inception_score(p[:10], splits=3).shape == (3,)
    assert inception_score(p[:11], splits=10).shape == (10,)


def test_interval_covers_the_score_and_needs_resamples():
    p = probabilities(logits(300, 5))
    found = measure_inception_scores(p, resamples=100, seed=1).published
    assert found.estimate == pytest.approx(inception_score(p).item()) and found.low < found.estimate < found.high
    assert found == measure_inception_scores(p, resamples=100, seed=1).published
    assert math.isnan(measure_inception_scores(p).published.low)


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.ones(4, 3))
    with pytest.raises(ValueError, match="at least 5"):
        inception_score(torch.eye(3), splits=5)
