"""The plane's true uncertainty against integrals, closed forms, scipy's distributions and limits."""

import math

import pytest
import torch
from scipy.special import digamma
from scipy.stats import invgamma

from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import FlowSchedule, VPSchedule, make_betas
from ldm.diffusion.transition import ddim_transition
from ldm.experiments.toy import GaussianDenoiser
from ldm.experiments.toy_posterior import (
    GaussianMembers,
    NormalInverseGamma,
    as_states,
    bootstrap_members,
    known_variance_information,
    step_information,
)
from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.util import generator

F64 = torch.float64
PATH = VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))
STEP = ddim_transition(PATH, 200.0, 100.0, eta=1.0)
PRIOR = NormalInverseGamma(torch.tensor([0.3, -0.2], dtype=F64), 0.5, 4.0, 1.0)


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("toy posterior", key), dtype=F64)


def silent(index, shape):
    return torch.zeros(tuple(shape), dtype=F64)


def first_step(members, x):
    return next(ddim(members.denoiser(PATH), PATH, x, torch.tensor([200.0, 100.0]), eta=1.0, noise=silent))


def test_posterior_equals_prior_times_likelihood_on_a_grid():
    """E[mu], Var[mu] and E[1/s^2] by a Riemann sum over (mu_1, mu_2, ln s^2) of the unnormalised product."""
    points = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.5, -0.3]], dtype=F64)
    line, log_var = torch.linspace(-2.5, 3.0, 90, dtype=F64), torch.linspace(-4.5, 3.0, 90, dtype=F64)
    first, second, log_var = torch.meshgrid(line, line, log_var, indexing="ij")
    mu, var = torch.stack([first, second], -1), log_var.exp()
    log_density = -PRIOR.shape * log_var - PRIOR.rate / var  # with the Jacobian of ln s^2
    log_density += -log_var - PRIOR.kappa * (mu - PRIOR.mean).square().sum(-1) / (2 * var)
    for point in points:
        log_density += -log_var - (point - mu).square().sum(-1) / (2 * var)
    mass = torch.softmax(log_density.flatten(), 0).reshape(var.shape)
    posterior = PRIOR.posterior(points)
    mean = (mass[..., None] * mu).sum((0, 1, 2))
    torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=0)
    spread = (mass * (first - mean[0]).square()).sum().item()
    assert posterior.rate / (posterior.shape - 1) / posterior.kappa == pytest.approx(spread, rel=2e-3)
    assert posterior.shape / posterior.rate == pytest.approx((mass / var).sum().item(), rel=1e-4)


def test_posterior_does_not_depend_on_the_order_of_learning():
    points = draw(7, 2, key=1)
    together, stepwise = PRIOR.posterior(points), PRIOR.posterior(points[:3]).posterior(points[3:])
    torch.testing.assert_close(stepwise.mean, together.mean)
    assert (stepwise.kappa, stepwise.shape) == (together.kappa, together.shape) == (7.5, 11.0)
    assert stepwise.rate == pytest.approx(together.rate)
    assert PRIOR.posterior(points[:0]) is PRIOR


def test_draws_have_the_moments_of_the_belief():
    """mu is Student-t with variance E[s^2] / kappa on each axis, s^2 inverse gamma (200,000 draws, 5 errors)."""
    members = PRIOR.draw(200_000, generator(2))
    var = invgamma(PRIOR.shape, scale=PRIOR.rate)
    assert members.var.mean().item() == pytest.approx(var.mean(), abs=5 * var.std() / 447)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    assert members.var.quantile(quantiles).tolist() == pytest.approx(var.ppf(quantiles).tolist(), rel=0.01)
    spread = math.sqrt(var.mean() / PRIOR.kappa)
    torch.testing.assert_close(members.mean.mean(0), PRIOR.mean, atol=5 * spread / 447, rtol=0)
    assert members.mean.std(0).tolist() == pytest.approx([spread] * 2, rel=0.02)


@pytest.mark.parametrize(("shape", "error"), [(1.5, 1e-4), (4.0, 1e-8), (1000.0, 1e-8)])
def test_precision_nodes_integrate_the_gamma(shape, error):
    belief = NormalInverseGamma(torch.zeros(2), 1.0, shape, 0.7)
    nodes, weights = belief.precisions(40)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights * nodes).sum().item() == pytest.approx(shape / 0.7, rel=error)
    assert (weights * nodes.log()).sum().item() == pytest.approx(digamma(shape) - math.log(0.7), abs=error)
    assert (weights / nodes).sum().item() == pytest.approx(0.7 / (shape - 1), rel=1e-3)


def test_members_are_exact_denoisers():
    members = PRIOR.draw(3, generator(3))
    together, x = members.denoiser(PATH), draw(4, 2, 1, 1, key=3)
    prediction = together(x, 300.0)
    own = together(prediction.x0, 300.0)
    for index in range(3):
        mean = as_states(members.mean[index])
        alone = GaussianDenoiser(PATH, mean, members.var[index].expand(2, 1, 1))
        torch.testing.assert_close(prediction.x0[index], alone(x, 300.0).x0)
        torch.testing.assert_close(prediction.eps[index], alone(x, 300.0).eps)
        torch.testing.assert_close(own.x0[index], members.single(PATH, index)(prediction.x0[index], 300.0).x0)
    torch.testing.assert_close(PATH.noised(prediction.x0, prediction.eps, 300.0), x.expand(3, -1, -1, -1, -1))


@pytest.mark.parametrize("schedule", [PATH, FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_known_variance_is_the_linear_gaussian_channel(schedule, eta):
    """1/2 ln det(I + J Sigma J' / w), with J = d mean / d mu by autograd through the sampler's own step."""
    u, s, var, kappa = 0.5 * schedule.end, 0.3 * schedule.end, 0.4, 3.0
    x, times = draw(1, 2, 1, 1, key=4), torch.tensor([u, s], dtype=F64)

    def mean_of(mu):
        members = GaussianMembers(mu[None], torch.tensor([var], dtype=F64))
        step = next(ddim(members.denoiser(schedule), schedule, x, times, eta=eta, noise=silent))
        return step.distribution.mean.flatten()

    step = ddim_transition(schedule, u, s, eta)
    jacobian = torch.autograd.functional.jacobian(mean_of, draw(2, key=5))
    inside = torch.eye(2, dtype=F64) + jacobian @ jacobian.T * var / kappa / step.w
    ours = known_variance_information(kappa, var, schedule, step)
    assert ours == pytest.approx(0.5 * torch.logdet(inside).item(), rel=1e-9)


def test_known_variance_is_a_gain_in_signal_to_noise_ratio():
    gain = float(PATH.ratio(100.0) ** -2 - PATH.ratio(200.0) ** -2)
    slope = 1 / (0.4 * float(PATH.ratio(200.0)) ** -2 + 1)
    expected = math.log1p(gain * slope**2 * 0.4 / 3.0)
    assert known_variance_information(3.0, 0.4, PATH, STEP) == pytest.approx(expected, rel=1e-9)


def test_information_where_the_variance_becomes_known():
    """With 1e8 pseudo-observations of s^2 only mu is unknown: the closed form, the same at every state."""
    belief = NormalInverseGamma(torch.zeros(2, dtype=F64), 3.0, 1e8, 0.4e8)
    ours = step_information(belief, PATH, STEP, draw(5, 2, 1, 1, key=6))
    torch.testing.assert_close(ours, torch.full((5,), known_variance_information(3.0, 0.4, PATH, STEP), dtype=F64))


@pytest.mark.parametrize("count", [0, 3])
def test_information_equals_the_entropy_of_the_plane(count):
    """-sum p ln p over a fine times, p averaged over 400 equally likely s^2 of scipy's inverse gamma."""
    belief = PRIOR.posterior(draw(count, 2, key=7))
    x = as_states(torch.tensor([[1.5, 0.4]], dtype=F64))
    levels = (torch.arange(400, dtype=F64) + 0.5) / 400
    var = torch.from_numpy(invgamma(belief.shape, scale=belief.rate).ppf(levels.numpy()))
    alone = GaussianMembers(belief.mean.expand(400, 2), var)
    shifted = GaussianMembers(alone.mean + torch.tensor([1.0, 0.0], dtype=F64), var)
    centre = first_step(alone, x).distribution.mean.flatten(1)  # [K, 2], at mu = the belief's mean
    slope = (first_step(shifted, x).distribution.mean.flatten(1) - centre)[:, 0]
    spread = STEP.w + slope.square() * var / belief.kappa
    side = 9 * spread.mean().sqrt()
    line = torch.linspace(-1, 1, 161, dtype=F64) * side
    squares = [(line[:, None] + centre[:, axis].mean() - centre[:, axis]).square() / spread for axis in (0, 1)]
    exponent = squares[0][:, None] + squares[1][None]  # [161, 161, K]
    density = ((-0.5 * exponent).exp() / (2 * math.pi * spread)).mean(-1)
    entropy = -torch.xlogy(density, density).sum() * (line[1] - line[0]) ** 2
    expected = entropy - math.log(2 * math.pi * math.e * STEP.w)
    assert step_information(belief, PATH, STEP, x).item() == pytest.approx(expected.item(), abs=3e-3)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_quadrature_has_converged(count):
    belief, x = PRIOR.posterior(draw(count, 2, key=8)), 2 * draw(3, 2, 1, 1, key=9)
    default = step_information(belief, PATH, STEP, x)
    torch.testing.assert_close(step_information(belief, PATH, STEP, x, 80, 24), default, atol=1e-6, rtol=0)
    many = 2 * draw(100, 2, 1, 1, key=9)
    through_knots = step_information(belief, PATH, STEP, many, knots=40)
    torch.testing.assert_close(through_knots, step_information(belief, PATH, STEP, many), atol=1e-5, rtol=0)


def test_exact_ensembles_grow_to_the_truth_below_ln_members():
    """4,000 exact draws as ensembles of M: the mean information rises with M (entropy is concave) towards the truth."""
    x = as_states(torch.tensor([[0.5, 0.5]], dtype=F64))
    truth = step_information(PRIOR, PATH, STEP, x).item()
    law = first_step(PRIOR.draw(4000, generator(10)), x).distribution
    means = []
    for size in (2, 4, 20, 100):
        grouped = Gaussian(law.mean.reshape(-1, size, 2).transpose(0, 1), law.var)  # ensembles on the batch axis
        estimate, error = monte_carlo_information(grouped, 200 // size, generator(size))
        assert (estimate - 5 * error <= math.log(size)).all()
        means.append(estimate.mean().item())
    assert means[0] < means[1] < means[2] < means[3]
    assert means[0] < 0.7 * truth
    assert means[3] == pytest.approx(truth, rel=0.05)


def test_bootstrap_of_nothing_is_the_prior():
    ours = bootstrap_members(torch.zeros(0, 2), PRIOR, 6, generator(11))
    prior = PRIOR.draw(6, generator(11))
    torch.testing.assert_close(ours.mean, prior.mean)
    torch.testing.assert_close(ours.var, prior.var)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_bootstrap_means_spread_as_stated(count):
    """(kappa E[s^2] + N S^2) / (kappa + N)^2, by 100,000 members: nothing of the data's part at one point."""
    points = draw(count, 2, key=12)
    members = bootstrap_members(points, PRIOR, 100_000, generator(13))
    biased = (points - points.mean(0)).square().sum().item() / (2 * count)
    expected = (PRIOR.kappa * PRIOR.rate / (PRIOR.shape - 1) + count * biased) / (PRIOR.kappa + count) ** 2
    assert members.mean.var(0).mean().item() == pytest.approx(expected, rel=0.02)


def test_bootstraps_of_one_point_agree_and_of_many_near_the_posterior():
    plain = bootstrap_members(draw(1, 2, key=14), PRIOR, 5, generator(14), anchored=False)
    step = first_step(plain, draw(3, 2, 1, 1, key=15))
    assert mutual_information(step.distribution, "kl").tolist() == [0, 0, 0]
    points = draw(500, 2, key=16)
    belief = PRIOR.posterior(points)
    for anchored in (True, False):
        members = bootstrap_members(points, PRIOR, 4000, generator(17), anchored)
        torch.testing.assert_close(members.mean.mean(0), belief.mean, atol=5e-3, rtol=0)
        exact = belief.rate / belief.shape / belief.kappa
        assert members.mean.var(0).mean().item() == pytest.approx(exact, rel=0.08)
        assert members.var.mean().item() == pytest.approx(belief.rate / belief.shape, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMembers(torch.zeros(3), torch.ones(3)), r"mean \[M, 2\]"),
        (lambda: NormalInverseGamma(torch.zeros(2), 0.0, 1.0, 1.0), "above 0"),
        (lambda: bootstrap_members(torch.zeros(0, 2), PRIOR, 2, generator(0), anchored=False), "anchored=True"),
        (lambda: step_information(PRIOR, PATH, ddim_transition(PATH, 2.0, 1.0), torch.zeros(1, 2, 1, 1)), "eta > 0"),
        (lambda: step_information(PRIOR, PATH, STEP, torch.zeros(1, 2, 1, 1), order=7), "even"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
