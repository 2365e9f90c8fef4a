"""Intervals, rank correlation and AUROC against closed forms, counting, and simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import norm, pearsonr, t
from sklearn.metrics import roc_auc_score

from ldm.stats import (
    Interval,
    auroc,
    batched_auroc,
    bootstrap_interval,
    mean_interval,
    rank_correlation,
    spearman,
)
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("detection", key), dtype=torch.float64).numpy()


def test_stats_need_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, ldm.stats; assert 'torch' not in sys.modules"], check=True, timeout=60
    )


def test_what_is_written_names_what_the_interval_stands_on():
    written = Interval(1.0, 0.5, 1.5, n=4, resamples=20).as_dict()
    assert written == {"estimate": 1.0, "low": 0.5, "high": 1.5, "resamples": 20}
    assert list(mean_interval([1.0, 2.0]).as_dict()) == ["estimate", "low", "high", "n"]
    assert Interval(1.0).width == math.inf


def test_spearman_equals_the_textbook_formula():
    """Without ties rho = 1 - 6 sum d^2 / (n (n^2 - 1)); here d = (-1, 1, 0, -1, 1), so rho = 1 - 24/120."""
    assert spearman([1, 2, 3, 4, 5], [20, 10, 30, 50, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], np.exp([1, 2, 3])) == pytest.approx(1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_auroc_counts_pairs():
    scores, positives = np.round(draw(60), 1), draw(60, key=1) > 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positives] for b in scores[~positives]]
    assert auroc(scores, positives) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(scores, positives) == pytest.approx(roc_auc_score(positives, scores), abs=1e-12)
    assert auroc(-scores, positives) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    assert math.isnan(auroc(scores, np.zeros(60, bool)))


def test_batched_forms_are_the_single_ones_row_by_row():
    scores, others = np.round(draw(5, 30), 1), np.round(draw(5, 30, key=1), 1)
    positives = others > 0.3
    single = [auroc(row, good) for row, good in zip(scores, positives, strict=True)]
    np.testing.assert_allclose(batched_auroc(scores, positives), single, atol=1e-12)
    single = [spearman(row, other) for row, other in zip(scores, others, strict=True)]
    np.testing.assert_allclose(rank_correlation(scores, others), single, atol=1e-12)


def test_a_constant_has_no_spearman_and_counts_0_in_averages():
    constant, values = np.ones(5), np.arange(5)
    assert math.isnan(spearman(constant, values)) and rank_correlation(constant, values) == 0
    assert math.isnan(batched_auroc(values, constant))


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
    assert batched.resamples == single.resamples
    for name in ("estimate", "low", "high"):
        assert getattr(batched, name) == pytest.approx(getattr(single, name))


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
    assert one.estimate == 0.3 and math.isnan(one.sd) and one.width == math.inf


def test_mean_interval_covers_as_often_as_it_says():
    """Binomial(2000, 0.95): mean 1900, standard deviation 9.7; normal quantiles would cover 1757 of 2000 at n = 4."""
    covered = sum(interval.low < 0 < interval.high for interval in map(mean_interval, draw(2000, 4, key=7)))
    assert 1860 < covered < 1940


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spearman([1, 2], [1, 2, 3]), "one length"),
        (lambda: spearman([1, 2, float("nan")], [1, 2, 3]), "x has 1 values that are not finite, the first at index 2"),
        (lambda: auroc([1, 2], [0, 2]), "booleans or 0/1"),
        (lambda: bootstrap_interval(np.mean, [1, 2], [1], seed=0), "one length"),
        (lambda: bootstrap_interval(np.mean, [1, 2], seed=0, strata=[1]), "one label for each"),
        (lambda: bootstrap_interval(auroc, [1, 2], [0, 0], seed=0, resamples=9), "undefined on 9 of 9"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
