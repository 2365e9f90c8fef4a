"""Detection statistics against closed forms, counting, and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch

from ldm.evaluation.detection import against_class_sizes, risk_coverage, spearman_ceiling
from ldm.stats import auroc, spearman
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("detection", key), dtype=torch.float64).numpy()


def ends(interval):
    return interval.estimate, interval.low, interval.high


def test_spearman_ceiling_of_the_digits_bins():
    """1 - (24 + 6 + 6 + 24)/990 = 0.93939, and its root is 0.969."""
    class_sizes = [1] * 3 + [10] * 2 + [100] * 2 + [1300] * 3
    assert spearman_ceiling(class_sizes) == pytest.approx(math.sqrt(1 - 60 / 990), abs=1e-12)
    assert spearman_ceiling(range(7)) == pytest.approx(1)


def test_no_ranking_exceeds_the_ceiling():
    class_sizes = [1, 1, 5, 5, 5, 9]
    best = max(abs(spearman(class_sizes, order)) for order in itertools.permutations(range(6)))
    assert best == pytest.approx(spearman_ceiling(class_sizes), abs=1e-12)


def test_perfect_order_of_the_bins_ends_at_the_ceiling_and_keeps_a_width():
    class_sizes = [1] * 3 + [10] * 2 + [50] * 2 + [math.inf] * 3
    found = against_class_sizes(np.linspace(1, 0.1, 10), class_sizes)
    assert ends(found.spearman)[:2] == pytest.approx((-found.ceiling,) * 2)
    assert -0.9 < found.spearman.high < -0.8
    assert found.ceiling == pytest.approx(math.sqrt(1 - 60 / 990))
    assert found.auroc.estimate == found.auroc.high == 1 and 0.4 < found.auroc.low < 0.8 and found.few == [1, 10]


def test_equal_scores_rank_nothing():
    """Identical members have 0 nats everywhere: a report of it must not fail."""
    found = against_class_sizes(np.zeros(6), [1, 1, 10, 10, math.inf, math.inf])
    assert all(math.isnan(end) for end in (*ends(found.spearman), *ends(found.auroc)))


def test_budgets_without_few_images_take_the_smallest():
    scores, class_sizes = draw(90, key=8), np.repeat([20, 50, math.inf], 30)
    found = against_class_sizes(scores, class_sizes)
    assert found.few == [20]
    assert found.auroc.estimate == pytest.approx(auroc(np.r_[scores[:30], scores[60:]], np.arange(60) < 30))
    assert found.auroc.low < 0.5 < found.auroc.high, "scores that know nothing"
    assert found.spearman.low < 0 < found.spearman.high
    with pytest.raises(ValueError, match="all 3 classes have one class_size"):
        against_class_sizes([1, 2, 3], [5, 5, 5])


def test_risk_coverage_by_hand():
    """Kept in the order 1, 2, 3: losses 0, 4, 2 give risks 0, 2, 2."""
    curve = risk_coverage([0.3, 0.1, 0.2], [2, 0, 4])
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.risk, [0, 2, 2])
    assert curve.aurc == pytest.approx(4 / 3)


def test_risk_coverage_ties_are_the_mean_over_orders():
    losses = np.array([1.0, 0.0, 5.0, 2.0])
    curves = [risk_coverage(order, losses).risk for order in itertools.permutations(range(4))]
    np.testing.assert_allclose(risk_coverage(np.ones(4), losses).risk, np.mean(curves, axis=0))


def test_best_ordering_is_by_the_loss():
    losses = np.array([1.0, 0.0, 5.0, 2.0])
    every = [risk_coverage(order, losses).aurc for order in itertools.permutations(range(4))]
    assert risk_coverage(losses, losses).aurc == pytest.approx(min(every))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: risk_coverage([], []), "at least 1"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
