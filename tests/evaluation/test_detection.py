"""Detection statistics against closed forms, counting, and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, pearsonr, t
from sklearn.metrics import roc_auc_score

from ldm.evaluation.detection import (
    against_class_sizes,
    auroc,
    bootstrap_interval,
    mean_interval,
    risk_coverage,
    spearman,
    spearman_ceiling,
)
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("detection", key), dtype=torch.float64).numpy()


def test_spearman_equals_the_textbook_formula():
    """Without ties rho = 1 - 6 sum d^2 / (n (n^2 - 1)); here d = (-1, 1, 0, -1, 1), so rho = 1 - 24/120."""
    assert spearman([1, 2, 3, 4, 5], [20, 10, 30, 50, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], np.exp([1, 2, 3])) == pytest.approx(1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_spearman_ceiling_of_the_digits_bins():
    """1 - (24 + 6 + 6 + 24)/990 = 0.93939, and its root is 0.969."""
    class_sizes = [1] * 3 + [10] * 2 + [100] * 2 + [1300] * 3
    assert spearman_ceiling(class_sizes) == pytest.approx(math.sqrt(1 - 60 / 990), abs=1e-12)
    assert spearman_ceiling(range(7)) == pytest.approx(1)


def test_no_ranking_exceeds_the_ceiling():
    class_sizes = [1, 1, 5, 5, 5, 9]
    best = max(abs(spearman(class_sizes, order)) for order in itertools.permutations(range(6)))
    assert best == pytest.approx(spearman_ceiling(class_sizes), abs=1e-12)


def test_auroc_counts_pairs():
    scores, positives = np.round(draw(60), 1), draw(60, key=1) > 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positives] for b in scores[~positives]]
    assert auroc(scores, positives) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(scores, positives) == pytest.approx(roc_auc_score(positives, scores), abs=1e-12)
    assert auroc(-scores, positives) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    assert math.isnan(auroc(scores, np.zeros(60, bool)))


def test_bootstrap_interval_of_a_mean_is_the_normal_interval():
    """At n = 400 the percentile interval is mean -+ 1.96 s/sqrt(n), up to quantile noise of about 3 % of its width."""
    data = draw(400, key=2)
    result = bootstrap_interval(np.mean, data, seed=1, resamples=4000)
    half = norm.ppf(0.975) * data.std() / 20
    assert result.estimate == data.mean()
    np.testing.assert_allclose([result.low, result.high], [data.mean() - half, data.mean() + half], atol=0.08 * half)


def test_bootstrap_covers_a_known_correlation_and_repeats_by_seed():
    x = draw(300, key=3)
    y = 0.6 * x + 0.8 * draw(300, key=4)

    def correlation(a, b):
        return pearsonr(a, b).statistic

    result = bootstrap_interval(correlation, x, y, seed=2, resamples=300)
    assert result.low < 0.6 < result.high
    assert result == bootstrap_interval(correlation, x, y, seed=2, resamples=300)
    assert result != bootstrap_interval(correlation, x, y, seed=3, resamples=300)


def test_bootstrap_in_one_call_is_the_bootstrap_call_by_call():
    data, weights = draw(30, key=9), draw(30, key=10)
    single = bootstrap_interval(lambda a, b: (a * b).sum(), data, weights, seed=4, resamples=50)
    batched = bootstrap_interval(lambda a, b: (a * b).sum(-1), data, weights, seed=4, resamples=50, batched=True)
    assert batched == pytest.approx(single)


def test_bootstrap_strata_keep_the_class_sizes():
    """With two positives in 40, plain resamples lose all of them in e^-2 = 13.5 % of the cases; strata never do."""
    positives = np.arange(40) < 2
    scores = draw(40, key=5)
    plain = bootstrap_interval(auroc, scores, positives, seed=3, resamples=1000)
    # Binomial(1000, 1 - (38/40)^40 = 0.8715): mean 871, standard deviation 11.
    assert 830 < plain.resamples < 910
    assert bootstrap_interval(auroc, scores, positives, seed=3, resamples=1000, strata=positives).resamples == 1000


def test_mean_interval_is_students():
    values = draw(7, key=6)
    found = mean_interval(values)
    low, high = t.interval(0.95, 6, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(7))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.width == pytest.approx(high - low) and found.n == 7
    one = mean_interval([0.3])
    assert one.mean == 0.3 and math.isnan(one.sd) and one.width == math.inf


def test_mean_interval_covers_as_often_as_it_says():
    """Binomial(2000, 0.95): mean 1900, standard deviation 9.7; normal quantiles would cover 1757 of 2000 at n = 4."""
    covered = sum(interval.low < 0 < interval.high for interval in map(mean_interval, draw(2000, 4, key=7)))
    assert 1860 < covered < 1940


def test_perfect_order_of_the_bins_stays_perfect_in_every_resample():
    class_sizes = [1] * 3 + [10] * 2 + [50] * 2 + [math.inf] * 3
    found = against_class_sizes(np.linspace(1, 0.1, 10), class_sizes)
    assert found.spearman[:3] == pytest.approx((-found.ceiling,) * 3)
    assert found.ceiling == pytest.approx(math.sqrt(1 - 60 / 990))
    assert found.auroc[:3] == (1, 1, 1) and found.few == [1, 10]


def test_equal_scores_order_nothing():
    """Identical members have 0 nats everywhere: a report of it must not fail."""
    found = against_class_sizes(np.zeros(6), [1, 1, 10, 10, math.inf, math.inf])
    assert found.spearman[:3] == (0, 0, 0) and found.auroc[:3] == (0.5, 0.5, 0.5)


def test_budgets_without_few_images_take_the_smallest():
    scores, class_sizes = draw(90, key=8), np.repeat([20, 50, math.inf], 30)
    found = against_class_sizes(scores, class_sizes)
    assert found.few == [20]
    assert found.auroc.estimate == pytest.approx(auroc(np.r_[scores[:30], scores[60:]], np.arange(60) < 30))
    assert found.auroc.low < 0.5 < found.auroc.high, "scores that know nothing"
    assert found.spearman.low < 0 < found.spearman.high
    assert found == against_class_sizes(scores, class_sizes), "the resamples are seeded"
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
        (lambda: spearman([1, 2], [1, 2, 3]), "one length"),
        (lambda: spearman([1, 2, float("nan")], [1, 2, 3]), "x has 1 values that are not finite, the first at index 2"),
        (lambda: auroc([1, 2], [0, 2]), "booleans or 0/1"),
        (lambda: bootstrap_interval(np.mean, [1, 2], [1], seed=0), "one length"),
        (lambda: bootstrap_interval(np.mean, [1, 2], seed=0, strata=[1]), "one label for each"),
        (lambda: bootstrap_interval(auroc, [1, 2], [0, 0], seed=0, resamples=9), "undefined on 9 of 9"),
        (lambda: risk_coverage([], []), "at least 1"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
