"""Covariance of clean data given a state, against closed forms and against actual errors."""

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, VPSchedule, make_betas
from ldm.experiments.toy import MixtureDenoiser, correlated_gaussian
from ldm.uncertainty.aleatoric import data_covariance, data_posterior
from tests.models.test_density import COVARIANCE, MEAN, X

F64 = torch.float64
PATHS = {"flow": FlowSchedule(), "vp": VPSchedule(make_betas("linear", 1000)), "edm": EDMSchedule()}


@pytest.mark.parametrize("name", PATHS)
def test_covariance_of_a_gaussian_posterior(name):
    """(S^-1 + (alpha / sigma)^2 I)^-1, whatever the state and the schedule."""
    schedule = PATHS[name]
    denoiser, u = correlated_gaussian(schedule, MEAN, COVARIANCE), 0.02 * schedule.end
    ratio = float(schedule.ratio(u))
    exact = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + torch.eye(6, dtype=F64) / ratio**2)
    found = data_covariance(denoiser, schedule, X, u)
    torch.testing.assert_close(found, exact.expand(3, -1, -1))
    posterior = data_posterior(denoiser, schedule, X, u, chunk=4)
    torch.testing.assert_close(posterior.var.flatten(1), exact.diagonal().expand(3, -1))
    torch.testing.assert_close(posterior.total, exact.trace().expand(3))
    assert posterior.negative == 0


def test_covariance_of_points_is_their_spread_under_the_responsibilities():
    """Times of each image its own."""
    schedule, points = FlowSchedule(), torch.stack([MEAN - 1, MEAN + 0.5, 0.3 * MEAN])
    denoiser, u = MixtureDenoiser(schedule, points), torch.tensor([0.3, 0.6, 0.9], dtype=F64)
    shares = denoiser.responsibilities(X, u)  # [B, K]
    mean = torch.einsum("bk,kd->bd", shares, points.flatten(1))
    away = points.flatten(1) - mean[:, None]  # [B, K, D]
    exact = torch.einsum("bk,bki,bkj->bij", shares, away, away)
    torch.testing.assert_close(data_covariance(denoiser, schedule, X, u), exact, rtol=1e-8, atol=1e-10)
    found = data_posterior(denoiser, schedule, X, u)
    torch.testing.assert_close(found.mean.flatten(1), mean)
    torch.testing.assert_close(found.var.flatten(1), exact.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-10)


def test_on_a_straight_path_it_is_the_formula_of_the_velocity():
    """((1 - t)^2 / t) (I + (1 - t) J) for a velocity from noise to data, t = 1 - u, J dense by autograd."""

    def network(x, t, cond):
        return torch.tanh(x.roll(1, -1)) - 0.9 * x * t[0]

    t, x = 0.7, X[:1]
    denoiser = NetworkDenoiser(network, FlowSchedule(), Target("velocity"))
    towards_data = lambda state: -network(state, torch.tensor([1 - t]), None)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(towards_data, x).reshape(6, 6)
    exact = (1 - t) ** 2 / t * (torch.eye(6, dtype=F64) + (1 - t) * jacobian)
    # The network is told its time in float32.
    found = data_covariance(denoiser, FlowSchedule(), x, 1 - t)[0]
    torch.testing.assert_close(found, (exact + exact.T) / 2, rtol=1e-6, atol=1e-7)
    var = data_posterior(denoiser, FlowSchedule(), x, 1 - t)
    torch.testing.assert_close(var.var.flatten(), exact.diagonal().clamp(min=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_the_trace_is_the_expected_squared_error(name):
    schedule, count, u = PATHS[name], 20000, float(PATHS[name].time_at(2.0))
    points = torch.stack([MEAN - 1, MEAN + 0.5, 0.3 * MEAN])
    source = torch.Generator().manual_seed(4)
    x0 = points[torch.randint(0, 3, (count,), generator=source)]
    state = schedule.noised(x0, torch.randn(x0.shape, generator=source, dtype=F64), u)
    denoiser = MixtureDenoiser(schedule, points)
    posterior = data_posterior(denoiser, schedule, state, u)
    errors = (posterior.mean - x0).square().flatten(1).sum(1)
    spread = float((errors - posterior.total).std()) / count**0.5
    assert abs(float((errors - posterior.total).mean())) < 4 * spread


def test_estimates_come_to_the_exact_diagonal():
    denoiser = correlated_gaussian(FlowSchedule(), MEAN, COVARIANCE)
    exact = data_posterior(denoiser, FlowSchedule(), X, 0.4)
    found = data_posterior(denoiser, FlowSchedule(), X, 0.4, probes=20000, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found.var, exact.var, rtol=0, atol=0.01)


def test_errors():
    denoiser = correlated_gaussian(FlowSchedule(), MEAN, COVARIANCE)
    with pytest.raises(ValueError, match="pure noise"):
        data_posterior(denoiser, FlowSchedule(), X, 1.0)
    with pytest.raises(ValueError, match="go together"):
        data_posterior(denoiser, FlowSchedule(), X, 0.5, probes=3)
