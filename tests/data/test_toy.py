"""Exact denoisers against sampling, dense linear algebra and limits."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser, MixtureDenoiser, correlated_gaussian

F64 = torch.float64
PATHS = [VPSchedule(make_betas("linear", 1000)), LinearVPSchedule(), EDMSchedule(), FlowSchedule()]
SHAPE = (1, 2, 2)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def toy(schedule, seed=3):
    factor = draw(4, 4, seed=seed)
    return correlated_gaussian(
        schedule, draw(*SHAPE, seed=seed + 1), factor @ factor.T + 0.1 * torch.eye(4, dtype=F64)
    ), (factor @ factor.T + 0.1 * torch.eye(4, dtype=F64))


@pytest.mark.parametrize("schedule", PATHS, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gaussian_matches_dense_conditioning(schedule, share):
    """Condition the joint Gaussian of (x_0, x) with a dense solve."""
    denoiser, covariance = toy(schedule)
    u, x = share * schedule.end, draw(5, *SHAPE, seed=9)
    alpha, sigma = float(schedule.alpha(u)), float(schedule.sigma(u))
    total = alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=F64)
    solved = torch.linalg.solve(total, (x - alpha * denoiser.mean).flatten(1).T)
    prediction = denoiser(x, u)
    torch.testing.assert_close(prediction.x0.flatten(1), denoiser.mean.flatten() + (alpha * covariance @ solved).T)
    torch.testing.assert_close(prediction.eps.flatten(1), (sigma * solved).T)
    torch.testing.assert_close(schedule.noised(prediction.x0, prediction.eps, u), x)


def test_gaussian_is_the_best_predictor():
    """The error of the posterior mean is orthogonal to any function of x (Monte Carlo, 4 standard errors)."""
    schedule, count = LinearVPSchedule(), 40_000
    denoiser, covariance = toy(schedule)
    x0 = denoiser.mean + (draw(count, 4, seed=1) @ torch.linalg.cholesky(covariance).T).reshape(count, *SHAPE)
    eps = draw(count, *SHAPE, seed=2)
    x = schedule.noised(x0, eps, 0.4)
    prediction = denoiser(x, 0.4)
    for error in (prediction.x0 - x0, prediction.eps - eps):
        for function in (torch.ones_like(x), x, torch.tanh(x)):
            product = error * function
            assert bool((product.mean(0).abs() < 4 * product.std(0) / math.sqrt(count)).all())


@pytest.mark.parametrize("schedule", PATHS[1:], ids=lambda schedule: type(schedule).__name__)
def test_flow_solves_the_probability_flow_equation(schedule):
    """Along the flow, d(x / alpha) = eps d(sigma / alpha), here by central differences."""
    denoiser, _ = toy(schedule)
    x, u, step = draw(3, *SHAPE), 0.5 * schedule.end, 1e-4 * schedule.end
    ahead, behind = denoiser.flow(x, u, u + step), denoiser.flow(x, u, u - step)
    change = ahead / schedule.alpha(u + step) - behind / schedule.alpha(u - step)
    slope = change / (schedule.ratio(u + step) - schedule.ratio(u - step))
    torch.testing.assert_close(slope, denoiser(x, u).eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser.flow(ahead, u + step, u), x)


def test_gaussian_takes_times_per_image_and_members():
    denoiser, _ = toy(PATHS[0])
    x, u = draw(3, 2, *SHAPE), torch.tensor([100.0, 700.0], dtype=F64)
    together = denoiser(x, u)
    for image, time in enumerate(u):
        torch.testing.assert_close(together.x0[:, image], denoiser(x[:, image], time).x0)
    spread = denoiser.marginal_var(700.0).flatten().sort().values
    alpha, sigma = PATHS[0].alpha(700.0), PATHS[0].sigma(700.0)
    dense = torch.linalg.eigvalsh(alpha**2 * toy(PATHS[0])[1] + sigma**2 * torch.eye(4, dtype=F64))
    torch.testing.assert_close(spread, dense)


@pytest.mark.parametrize("schedule", PATHS, ids=lambda schedule: type(schedule).__name__)
def test_mixture_of_one_is_the_gaussian(schedule):
    mean, var = draw(*SHAPE), draw(*SHAPE, seed=1).square()
    one, gaussian = MixtureDenoiser(schedule, mean[None], var), GaussianDenoiser(schedule, mean, var)
    x, u = draw(2, 3, *SHAPE, seed=2), torch.tensor([0.1, 0.5, 0.9], dtype=F64) * schedule.end
    torch.testing.assert_close(one(x, u).x0, gaussian(x, u).x0)
    torch.testing.assert_close(one(x, u).eps, gaussian(x, u).eps)


def test_mixture_matches_the_score_of_its_density():
    """eps = -sigma grad log p(x), by autograd of torch.distributions."""
    schedule, u = EDMSchedule(), 0.8
    means, weights = draw(3, *SHAPE, seed=4), torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    denoiser = MixtureDenoiser(schedule, means, 0.3, weights)
    x = draw(4, *SHAPE, seed=5).requires_grad_()
    components = torch.distributions.Independent(
        torch.distributions.Normal(means, torch.tensor((0.3 + u**2) ** 0.5, dtype=F64)), 3
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), components)
    score = torch.autograd.grad(mixture.log_prob(x).sum(), x)[0]
    prediction = denoiser(x.detach(), u)
    torch.testing.assert_close(prediction.eps, -u * score)
    torch.testing.assert_close(schedule.noised(prediction.x0, prediction.eps, u), x.detach())


def test_points_are_found_at_low_noise_and_averaged_at_high_noise():
    points = torch.tensor([-1.0, 0.0, 2.0], dtype=F64).reshape(3, 1, 1, 1).expand(3, *SHAPE)
    denoiser = MixtureDenoiser(EDMSchedule(), points)
    x = points + 0.01 * draw(3, *SHAPE)
    torch.testing.assert_close(denoiser(x, 0.01).x0, points)
    torch.testing.assert_close(denoiser(x, 1e4).x0, points.mean(0).expand(3, *SHAPE), rtol=0, atol=1e-6)
    assert denoiser.responsibilities(x, 0.01).argmax(-1).tolist() == [0, 1, 2]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[C, H, W\]"):
        GaussianDenoiser(PATHS[0], torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE))
    with pytest.raises(ValueError, match="covariance must be"):
        correlated_gaussian(PATHS[0], torch.zeros(SHAPE), torch.eye(3))
    with pytest.raises(ValueError, match=r"\[K, C, H, W\]"):
        MixtureDenoiser(PATHS[0], torch.zeros(SHAPE))
