"""The bound of learned variance against torch's distributions, and what each loss trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.denoiser import Target
from ldm.diffusion.learned_variance import LearnedVariance, bound_terms, discretised_log_likelihood
from ldm.diffusion.schedule import VPSchedule, make_betas

F64 = torch.float64
SCHEDULES = [("cosine", 50), ("sqrt_linear", 1000)]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_the_bound_is_the_divergence_from_the_posterior(schedule, steps):
    """q(x_{t-1} | x_t, x_0) from Bayes' rule on the forward chain, p its mean at x0_hat with eq. 15's variance."""
    betas = make_betas(schedule, steps)
    abar = torch.cumprod(1 - betas, 0)
    x_start, x0, v = draw(3, 1, 2, 4), draw(3, 1, 2, 4, seed=1), draw(3, 1, 2, 4, seed=2).tanh()
    t = torch.tensor([1, steps // 2, steps - 1])
    beta, before = (value.reshape(-1, 1, 1, 1) for value in (betas[t], abar[t - 1]))
    # Precisions of q(x_{t-1} | x_0) and of q(x_t | x_{t-1}) add up; x_t is any state, its share cancels in KL.
    precision = 1 / (1 - before) + (1 - beta) / beta
    x = draw(3, 1, 2, 4, seed=3)
    means = [(before.sqrt() * at / (1 - before) + (1 - beta).sqrt() * x / beta) / precision for at in (x_start, x0)]
    variance = torch.exp((1 + v) / 2 * beta.log() - (1 - v) / 2 * precision.log())
    expected = kl_divergence(Normal(means[0], precision**-0.5), Normal(means[1], variance.sqrt()))
    found = bound_terms(VPSchedule(betas), x_start, x0, v, t)
    torch.testing.assert_close(found, expected.mean((1, 2, 3)) / math.log(2), rtol=1e-7, atol=1e-10)


def test_the_first_term_is_the_likelihood_of_8_bit_images():
    values = torch.linspace(-1, 1, 256, dtype=F64)
    for mean, std in ((0.2, 0.05), (-0.99, 0.3), (0.0, 4.0)):
        chances = discretised_log_likelihood(values, torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64).log())
        assert float(chances.exp().sum()) == pytest.approx(1, abs=1e-8)
        edges = (values[:-1] + values[1:]) / 2
        inside = Normal(torch.tensor(mean, dtype=F64), std).cdf(edges).diff()
        torch.testing.assert_close(chances[1:-1].exp(), inside.clamp(min=1e-12), rtol=1e-6, atol=1e-12)
    schedule = VPSchedule(make_betas("cosine", 50))
    pixels = values[:8].reshape(1, 1, 2, 4)
    x0, v = pixels + 0.01, torch.zeros_like(pixels)
    log_std = 0.25 * (
        schedule.betas[0].log() + (schedule.betas[1] * schedule.sigma(1.0) ** 2 / schedule.sigma(2.0) ** 2).log()
    )
    expected = -discretised_log_likelihood(pixels, x0, log_std).mean() / math.log(2)
    torch.testing.assert_close(bound_terms(schedule, pixels, x0, v, torch.tensor([0]))[0], expected)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_hybrid_leaves_the_mean_alone(name):
    """At the true output the bound is smallest where the step's variance is the posterior's: v = -1, whatever t > 0."""
    schedule, t = VPSchedule(make_betas("cosine", 50)), torch.tensor([3, 30])
    x_start, noise = draw(2, 1, 2, 4), draw(2, 1, 2, 4, seed=1)
    output = Target(name).of(x_start, noise, *schedule.per_image(t.double() + 1)).requires_grad_()
    v = torch.full_like(output, -1.0, requires_grad=True)
    exact = LearnedVariance("vlb").bound(schedule, Target(name), output, v, x_start, t, noise)
    torch.testing.assert_close(exact, torch.zeros(2, dtype=F64), rtol=0, atol=1e-9)
    for loss, trained in (("hybrid", False), ("vlb", True)):
        away = (output + 0.1).detach().requires_grad_()
        bound = LearnedVariance(loss).bound(schedule, Target(name), away, v, x_start, t, noise)
        found = torch.autograd.grad(bound.sum(), (away, v), allow_unused=True)
        assert (found[0] is not None) == trained and bool((found[1] < 0).all()), "a wrong mean asks for more variance"
    simple = torch.tensor(2.0)
    assert LearnedVariance("hybrid", 0.1).combine(simple, torch.tensor(5.0)) == 2.5
    assert LearnedVariance("vlb").combine(simple, torch.tensor(5.0)) == 5


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="hybrid"):
        LearnedVariance("simple")
    with pytest.raises(ValueError, match="negative"):
        LearnedVariance(weight=-1.0)
