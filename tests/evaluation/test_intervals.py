"""Calibrated intervals on laws whose coverage is known."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from ldm.evaluation.intervals import calibrate_factor, hold, largest_mean, mean_p_value
from ldm.util import generator


def draw(count, pixels, *keys):
    """Errors N(0, s^2) whose deviation s differs from pixel to pixel by a factor up to 9, and s itself."""
    source = generator("intervals", *keys)
    scales = 0.1 * 9 ** torch.rand(count, pixels, generator=source, dtype=torch.float64)
    errors = scales * torch.randn(count, pixels, generator=source, dtype=torch.float64)
    return errors.numpy(), scales.numpy()


def test_p_value_is_valid_for_losses_of_zero_and_one():
    """For 0/1 losses the exact binomial p value is known: the bound is never below it."""
    for bad in (0, 1, 5, 20):
        exact = binomtest(bad, 100, 0.1, "less").pvalue
        assert mean_p_value(bad / 100, 0.1, 100) >= exact * (1 - 1e-9)
    assert mean_p_value(0, 0.1, 100) == pytest.approx(0.9**100, rel=1e-9)


def test_largest_mean_is_where_the_p_value_crosses():
    found = largest_mean(0.1, 0.9, 500)
    assert mean_p_value(found, 0.1, 500) <= 0.1 < mean_p_value(found + 2 / 500, 0.1, 500)
    with pytest.raises(ValueError, match="needs at least 22"):
        largest_mean(0.1, 0.9, 21)
    assert largest_mean(0.1, 0.9, 22) >= 0


def test_factor_leaves_outside_what_is_allowed():
    errors, scales = draw(60, 40, 0)
    factor = calibrate_factor(errors, scales, 0.2, 0.9)
    allowed = largest_mean(0.2, 0.9, 60)
    outside = (np.abs(errors) > factor * scales).mean()
    assert allowed - 1 / errors.size <= outside <= allowed


def test_risk_is_kept_as_often_as_promised_and_scaled_intervals_are_shorter():
    """With the true deviation as map the coverage of a factor is 2 Phi(factor) - 1 in closed form."""
    broken, lengths = 0, []
    for repeat in range(60):
        errors, scales = draw(100, 16, 1, repeat)
        factor = calibrate_factor(errors, scales, 0.1, 0.8)
        broken += 2 * norm.sf(factor) > 0.1
        plain = calibrate_factor(errors, np.ones_like(scales), 0.1, 0.8)
        lengths.append((hold(errors, scales, factor).length, 2 * plain))
    assert binomtest(broken, 60, 0.2, "greater").pvalue > 0.01
    scaled, unscaled = np.mean(lengths, 0)
    assert scaled < 0.9 * unscaled
    assert calibrate_factor(*draw(2000, 16, 2), 0.1, 0.8) == pytest.approx(norm.ppf(0.95), rel=0.1)  # and not by far


def test_held_out_coverage_and_length_are_counts():
    held = hold([[0.1, -0.3], [0.2, 0.9]], [[0.1, 0.1], [0.5, 0.5]], 1.5)
    assert held.coverage.estimate == 0.5 and held.length == pytest.approx(2 * 1.5 * 0.3)
    assert math.isfinite(held.coverage.low)
    other = hold([[0.1, -0.1], [0.2, 0.9]], [[0.1, 0.1], [0.5, 0.5]], 1.5).coverage  # shares 1 and 0.5
    assert (other.estimate, other.low, other.high) == (0.75, 0, 1)  # Student's ends are 0.75 -+ 3.18
    with pytest.raises(ValueError, match="above 0 everywhere"):
        hold([[0.1]], [[0.0]], 1)
