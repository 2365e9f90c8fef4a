"""Intervals, rank correlation and AUROC against closed forms, counting, and simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import norm, t, ttest_1samp
from sklearn.metrics import roc_auc_score

from ldm.stats import (
    Interval,
    auroc,
    auroc_interval,
    holm,
    look_level,
    mean_interval,
    percentile_interval,
    rank_correlation,
    ratio_interval,
    skewed_mean_interval,
    spearman,
    spearman_interval,
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


def test_ends_beyond_what_a_quantity_can_be_are_moved_there():
    wide = Interval(0.7, -0.4, 1.8, n=3)
    assert wide.within(0, 1) == Interval(0.7, 0, 1, n=3)
    assert wide.within() == wide and wide.within(-1, 2) == wide
    assert wide.within(most=0.6) == Interval(0.7, -0.4, 0.7, n=3)  # the estimate stays inside
    unknown = Interval(0.7).within(0, 1)
    assert math.isnan(unknown.low) and math.isnan(unknown.high) and not unknown.known


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


def test_rank_correlation_is_spearman_row_by_row():
    scores, others = np.round(draw(5, 30), 1), np.round(draw(5, 30, key=1), 1)
    single = [spearman(row, other) for row, other in zip(scores, others, strict=True)]
    np.testing.assert_allclose(rank_correlation(scores, others), single, atol=1e-12)


def test_a_constant_has_no_spearman_and_counts_0_in_averages():
    constant, values = np.ones(5), np.arange(5)
    assert math.isnan(spearman(constant, values)) and rank_correlation(constant, values) == 0


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


def test_hall_s_transformation_is_students_without_skewness():
    symmetric = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert skewed_mean_interval(symmetric) == mean_interval(symmetric)
    assert skewed_mean_interval([0.3, 0.4]) == mean_interval([0.3, 0.4])


def test_hall_s_interval_covers_the_mean_of_an_exponential_law():
    """Of 2,000 means of ten exponential values Student's interval holds about 1,810, this one 1,870: nominal 1,900."""
    values = -np.log(torch.rand((2000, 10), generator=generator("skewed", 0), dtype=torch.float64).numpy())
    plain = sum(found.low <= 1 <= found.high for found in map(mean_interval, values))
    skewed = sum(found.low <= 1 <= found.high for found in map(skewed_mean_interval, values))
    assert plain < 1840 < 1845 < skewed < 1940


def test_an_end_below_what_is_possible_is_cut_and_the_coverage_stays():
    """Means of four exponential values, truth 1: intervals that reach below 0 cover as often when cut there."""
    values = -np.log(torch.rand((500, 4), generator=generator("cut", 0), dtype=torch.float64).numpy())
    pairs = [(skewed_mean_interval(row), skewed_mean_interval(row, least=0.0)) for row in values]
    assert any(free.low < 0 for free, _ in pairs)
    assert all(cut.low == max(free.low, 0) and cut.high == free.high for free, cut in pairs)
    assert [free.low <= 1 <= free.high for free, _ in pairs] == [cut.low <= 1 <= cut.high for _, cut in pairs]
    rounded = skewed_mean_interval([-1e-18, 0.0, 0.0], least=0.0)
    assert rounded.low == rounded.estimate < 0, "a mean that rounding left below 0 lies inside its interval"
    assert math.isnan(skewed_mean_interval([0.3], least=0.0).low)


def test_errors_of_all_looks_add_up_to_the_nominal_one():
    assert look_level(1) == pytest.approx(0.975)
    assert sum(1 - look_level(look) for look in range(1, 100_000)) == pytest.approx(0.05, abs=1e-6)


def test_a_perfect_order_keeps_a_width():
    perfect = spearman_interval(np.arange(8), np.arange(8))
    assert perfect.estimate == pytest.approx(1) and perfect.low < 0.95 and perfect.high == pytest.approx(1)
    assert spearman_interval(np.arange(8), -np.arange(8)).high == pytest.approx(-perfect.low)
    apart = auroc_interval([3.0, 4.0, 5.0, 0.0, 1.0], [1, 1, 1, 0, 0])
    assert (apart.estimate, apart.high) == (1, 1) and apart.low < 0.7
    assert not spearman_interval([1, 2, 3], [1, 2, 3]).known and not auroc_interval([1, 2, 3], [1, 0, 0]).known


def test_few_classes_have_intervals_that_cover():
    """Ten classes in bins of 3, 2, 2 and 3 with normal scores; the truth of an AUROC is Phi(difference / sqrt 2).

    Binomial(1000, 0.95) has standard deviation 7.
    """
    order = np.array([3.0, 3, 3, 2, 2, 1, 1, 0, 0, 0])
    chosen = (order >= 2) | (order == 0)
    positives = (order >= 2)[chosen]
    scores = 0.6 * order + draw(1000, 10, key=11)
    truth = np.mean([norm.cdf(0.6 * rank / 2**0.5) for rank in order[order >= 2]])
    areas = [auroc_interval(row[chosen], positives) for row in scores]
    assert 900 < sum(found.low <= truth <= found.high for found in areas) < 990
    ranks = [spearman_interval(order, row) for row in scores]
    mean = np.mean([found.estimate for found in ranks])
    assert 930 < sum(found.low <= mean <= found.high for found in ranks) < 1000


def test_a_ratio_s_interval_is_that_of_a_mean_of_logarithms():
    above, below = np.exp(draw(2, 9, key="ratio"))
    found = ratio_interval(above, below)
    ends = ttest_1samp(np.log(above) - np.log(below), 0).confidence_interval(0.95)
    assert found.estimate == pytest.approx(np.prod(above / below) ** (1 / 9)) and found.n == 9
    np.testing.assert_allclose((found.low, found.high), np.exp([ends.low, ends.high]))
    assert not ratio_interval([2.0], [1.0]).known
    with pytest.raises(ValueError, match="positive values"):
        ratio_interval([1.0, 2.0], [0.0, 1.0])


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spearman([1, 2], [1, 2, 3]), "one length"),
        (lambda: spearman([1, 2, float("nan")], [1, 2, 3]), "x has 1 values that are not finite, the first at index 2"),
        (lambda: auroc([1, 2], [0, 2]), "booleans or 0/1"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("count", [39, 60, 199])
def test_a_further_resample_lies_outside_percentiles_as_often_as_stated(count):
    # Of uniform draws, F(the r-th of R) has mean r / (R + 1): ranks p (R + 1) leave 5 % outside, interpolated ones too.
    found = percentile_interval(0.0, np.arange(1, count + 1))
    low, high = found.low / (count + 1), found.high / (count + 1)
    assert low == pytest.approx(0.025) and high == pytest.approx(0.975) and found.resamples == count
    default = np.quantile(np.arange(1, 61), 0.025) / 61
    assert 2 * default == pytest.approx(0.081, abs=1e-3), "what NumPy's own rule leaves outside, of 60"


def test_percentiles_of_equal_draws_are_no_interval():
    assert not percentile_interval(1.0, [1.0] * 20).known and not percentile_interval(1.0, [math.nan]).known
    assert percentile_interval(1.0, [math.nan, *range(39)]).resamples == 39
