"""Promises against closed forms: exact p values, the numbers needed, and what they hold over many calibration sets."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from ldm.evaluation.promises import SHARES, RiskLevel, count_needed, promise_risk


def draw(count, seed, slope=0.4):
    """Scores uniform in (0, 1), bad with probability slope * score: R(t) = slope t / 2 in closed form."""
    source = np.random.default_rng(seed)
    scores = source.random(count)
    return scores, (source.random(count) < slope * scores).astype(int)


def test_p_value_and_bound_are_those_of_the_binomial_test():
    level = RiskLevel(0.1, 0.9, tests=4)
    assert level.error == pytest.approx(0.025)
    found = level.p_value([0, 3, 12], [30, 60, 100])
    expected = [binomtest(bad, n, 0.1, "less").pvalue for bad, n in ((0, 30), (3, 60), (12, 100))]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    exact = binomtest(3, 60, alternative="less").proportion_ci(1 - level.error, "exact").high
    assert level.bound(3, 60) == pytest.approx(exact, rel=1e-9) and level.bound(5, 5) == 1


def test_fewest_is_the_first_number_that_can_pass():
    for risk, confidence, tests in ((0.05, 0.95, 1), (0.05, 0.95, 10), (0.2, 0.9, 30)):
        level = RiskLevel(risk, confidence, tests)
        assert (1 - risk) ** level.fewest <= level.error < (1 - risk) ** (level.fewest - 1)
    assert RiskLevel(0.05, 0.95, 1).fewest == 59  # the "rule of 59" of tolerance limits


def test_needed_number_passes_and_few_less_do_not():
    level = RiskLevel(0.1, 0.95, 10)
    needed = count_needed(0.05, level)
    assert level.p_value(math.ceil(0.05 * needed), needed) <= level.error
    assert level.p_value(math.ceil(0.05 * (needed // 2)), needed // 2) > level.error
    assert count_needed(0.1, level) is None and count_needed(0, level) == level.fewest


def test_threshold_accepts_what_the_table_says():
    scores, bad = draw(1000, 0)
    found = promise_risk(scores, bad, RiskLevel(0.1, 0.95))
    below = scores < found.threshold
    assert found.holds and found.accepted == below.sum() and found.bad == bad[below].sum()
    assert found.share in SHARES and found.bound <= 0.1
    assert found.accepts(scores).sum() == found.accepted
    everything = promise_risk(scores, 0 * bad, RiskLevel(0.1, 0.95))
    assert everything.threshold == math.inf and everything.accepted == 1000


def test_promises_hold_as_often_as_they_say():
    """R(t) = 0.2 t is known: over many calibration sets a wrong promise is as rare as promised, and not by silence."""
    level = RiskLevel(0.1, 0.8, tests=len(SHARES))
    promised, wrong = 0, 0
    for seed in range(200):
        found = promise_risk(*draw(800, seed), level)
        risk = 0.2 * min(found.threshold, 1) if found.holds else 0.0
        promised += found.holds
        wrong += risk > level.risk
    assert promised > 150  # a method that says nothing would never be wrong
    assert binomtest(wrong, 200, 1 - level.confidence, "greater").pvalue > 0.01


def test_without_an_error_for_many_thresholds_promises_break():
    """The control of the test above: the grid tested at the full error breaks more promises than confidence allows."""
    honest, greedy = RiskLevel(0.1, 0.9, tests=len(SHARES)), RiskLevel(0.1, 0.9, tests=1)
    wrong = {honest: 0, greedy: 0}
    for seed in range(150):
        source = np.random.default_rng(seed)
        scores, bad = source.random(400), (source.random(400) < 0.1001).astype(int)
        for level in wrong:
            wrong[level] += promise_risk(scores, bad, level).holds
    assert wrong[honest] <= 0.1 * 150 < wrong[greedy]


def test_tied_scores_are_accepted_together_or_not():
    scores = np.repeat([0.0, 1.0, 2.0], 200)
    bad = np.concatenate([np.zeros(400), np.ones(200)])
    found = promise_risk(scores, bad, RiskLevel(0.05, 0.95))
    assert found.threshold == 2.0 and found.accepted == 400


def test_too_few_are_refused_with_the_number():
    level = RiskLevel(0.05, 0.95, 10)
    with pytest.raises(ValueError, match=f"needs at least {level.fewest}"):
        promise_risk(*draw(50, 0), level)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        promise_risk([0.1, 0.2], [0, 2], RiskLevel(0.5, 0.5, 1))


def test_no_promise_says_what_it_would_take():
    scores = np.arange(200.0)
    bad = (np.arange(200) % 25 == 24).astype(int)  # 4 % everywhere: 5 % can be promised, of more samples
    level = RiskLevel(0.05, 0.95)
    found = promise_risk(scores, bad, level)
    assert not found.holds and found.accepted == 0 and not found.accepts(scores).any()
    assert found.needed > 200 and found.bound > 0.05
    many = promise_risk(np.arange(found.needed * 3.0), (np.arange(found.needed * 3) % 25 == 24).astype(int), level)
    assert many.holds
    hopeless = promise_risk(scores, np.ones(200), level)
    assert hopeless.needed is None
