"""Sampled mutual information against a numerical integral, its closed-form bounds, and limits."""

import math

import pytest
import torch
from torch.distributions import Normal

from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("monte carlo", key), dtype=torch.float64)


def test_equals_the_numerical_integral():
    """H(mixture) - mean H(member) on a fine line; 4 standard errors."""
    mean, std = draw(3, 2), (0.4 * draw(3, 2, key=1)).exp()
    line = torch.linspace(-25, 25, 200_001, dtype=torch.float64)
    density = Normal(mean[..., None], std[..., None]).log_prob(line).exp()  # [M, B, L]
    mixture = density.mean(0)
    entropy = -torch.trapezoid(torch.xlogy(mixture, mixture), line)
    exact = entropy - Normal(mean, std).entropy().mean(0)
    estimate, error = monte_carlo_information(Gaussian(mean[..., None], std[..., None].square()), 20_000, generator(2))
    assert error.max() < 3e-3
    assert ((estimate - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("dims", [1, 4, 100])
@pytest.mark.parametrize("members", [2, 6])
@pytest.mark.parametrize("gap", [0.05, 0.5, 3.0])
def test_bhattacharyya_and_kl_bracket_it(dims, members, gap):
    """The theorem of Kolchinsky & Tracey on random Gaussians of unequal variances, five at a time."""
    mean, log_var = draw(members, 5, dims, key=3), draw(members, 5, dims, key=4)
    gaussian = Gaussian(gap * mean, (0.3 * gap * log_var).exp())
    estimate, error = monte_carlo_information(gaussian, 200, generator(5))
    error = 4 * error + 1e-12
    assert (mutual_information(gaussian, "bhattacharyya") <= estimate + error).all()
    assert (estimate - error <= mutual_information(gaussian, "kl")).all()
    assert (estimate - error <= math.log(members)).all()


def test_small_disagreement_lies_at_half_of_kl_and_twice_bhattacharyya():
    """Equal variances v and D_KL = |gap|^2 / (2 v) -> 0: I = mean of D_KL over all M^2 pairs / 2 = half of PaiDE's."""
    gaussian = Gaussian(0.02 * draw(4, 3, 5, key=6), 1.0)
    estimate, error = monte_carlo_information(gaussian, 20_000, generator(7))
    assert (error < 0.02 * estimate).all()
    torch.testing.assert_close(estimate, 0.5 * mutual_information(gaussian, "kl"), rtol=0.03, atol=0)
    torch.testing.assert_close(estimate, 2 * mutual_information(gaussian, "bhattacharyya"), rtol=0.03, atol=0)


def test_limits_are_zero_and_ln_members():
    same = Gaussian(draw(1, 2, 2, 1, 1).expand(3, -1, -1, -1, -1), 0.1)
    torch.testing.assert_close(monte_carlo_information(same, 5, generator(8)).estimate, torch.zeros(2).double())
    far = Gaussian(100 * torch.arange(3.0, dtype=torch.float64).reshape(3, 1, 1).expand(-1, 2, 4), 0.1)
    estimate, error = monte_carlo_information(far, 5, generator(8))
    torch.testing.assert_close(estimate, torch.full((2,), math.log(3), dtype=torch.float64))
    assert (error < 1e-9).all()


def test_shared_and_own_variances_agree():
    mean = draw(3, 2, 2, 1, 1, key=9)
    shared = monte_carlo_information(Gaussian(mean, 0.5), 10, generator(10))
    own = monte_carlo_information(Gaussian(mean, torch.full_like(mean, 0.5)), 10, generator(10))
    torch.testing.assert_close(shared.estimate, own.estimate)


@pytest.mark.parametrize(("var", "pairs", "message"), [(0.0, 10, "eta > 0"), (1.0, 1, "at least 2 pairs")])
def test_errors_say_what_was_expected(var, pairs, message):
    with pytest.raises(ValueError, match=message):
        monte_carlo_information(Gaussian(torch.zeros(2, 1, 3), var), pairs, generator(0))
