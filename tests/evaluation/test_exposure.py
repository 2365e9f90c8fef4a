"""Exposure bias on exact Gaussians: every sampler step is affine and the draws are whitened, so answers are exact."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.epsilon_scaling import EpsilonScaling, scaled, tabulated
from ldm.diffusion.samplers import ddim, heun, make_times
from ldm.diffusion.schedule import LinearVPSchedule, VPSchedule, make_betas
from ldm.evaluation.exposure import (
    EpsilonWatch,
    Norms,
    Residuals,
    StateMoments,
    StepMoments,
    delta,
    each_step,
    observe,
    state_distance,
)
from ldm.evaluation.scaling_choice import estimated_factors, search_b
from ldm.experiments.toy import GaussianDenoiser

F64 = torch.float64
SHAPE, N = (1, 2, 2), 64
MEAN = torch.tensor([-0.5, 0.0, 0.3, 1.0], dtype=F64).reshape(SHAPE)
VAR = torch.tensor([0.05, 0.25, 0.6, 1.5], dtype=F64).reshape(SHAPE)
VP = VPSchedule(make_betas("sqrt_linear", 1000, 1e-4, 2e-2))


def whitened(columns=8, seed=0):
    """[N, columns] with mean 0, variance 1 (denominator N) and no correlation, exactly."""
    draws = torch.randn(N, columns, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draws - draws.mean(0)).Q * math.sqrt(N)


def data_and_noise(schedule, time):
    """x_0 and x_u [N, *SHAPE] whose sample moments are those of the distribution."""
    draws = whitened().reshape(N, 2, *SHAPE)
    x0 = MEAN + VAR.sqrt() * draws[:, 0]
    return x0, schedule.noised(x0, draws[:, 1], time)


class ThickDenoiser:
    """An exact denoiser whose eps is longer than it should be, as a network's in sampling."""

    def __init__(self, denoiser, schedule, factor):
        self.denoiser, self.schedule, self.factor = denoiser, schedule, factor

    def __call__(self, x, u):
        alpha, sigma = self.schedule.coefficients(u, x)
        eps = self.factor * self.denoiser(x, u).eps
        return Prediction((x - sigma * eps) / alpha, eps)


def test_moments_stream_and_merge_to_those_of_all():
    values = torch.randn(60, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1)) + 1e3
    parts = [StepMoments(2, SHAPE) for _ in range(3)]
    for part, rows in zip(parts, values.split((7, 13, 40)), strict=True):
        for piece in rows.split(5):
            part.add(1, piece)
    merged = parts[0].merge(parts[1]).merge(StepMoments.from_tensors(parts[2].tensors()))
    assert merged.count.tolist() == [0, 60] and parts[0].count.tolist() == [0, 7]
    torch.testing.assert_close(merged.mean[1], values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.var[1], values.var(0, unbiased=False), rtol=1e-9, atol=0)
    torch.testing.assert_close(merged.standard_error[1], values.std(0) / math.sqrt(60), rtol=1e-9, atol=0)
    torch.testing.assert_close(merged.root_mean_square[1], values.square().mean(0).sqrt())
    assert merged.var[0].isnan().all()
    with pytest.raises(ValueError, match=r"expected values \[\.\.\., 1, 2, 2\]"):
        merged.add(0, torch.zeros(3, 2, 2, 2))
    with pytest.raises(ValueError, match="cannot merge"):
        merged.merge(StepMoments(3, SHAPE))


def test_norms_in_training_have_a_closed_form():
    """E||eps||^2 = sum sigma^2 / (alpha^2 var + sigma^2), below the number of elements where data are known."""
    times = make_times(VP, "20")
    watch = EpsilonWatch(GaussianDenoiser(VP, MEAN, VAR))
    draws = whitened().reshape(N, 2, *SHAPE)
    norms = Norms(watch, 20)
    x0 = MEAN + VAR.sqrt() * draws[:, 0]
    for rows in torch.arange(N).split(24):  # batches
        observe(each_step(ddim, watch, VP, x0[rows], times, lambda index, shape, rows=rows: draws[rows, 1]), norms)
    alpha, sigma = VP.alpha(times[:-1])[:, None], VP.sigma(times[:-1])[:, None]
    expected = (sigma**2 / (alpha**2 * VAR.flatten() + sigma**2)).sum(1).sqrt()
    torch.testing.assert_close(norms.moments.root_mean_square, expected)
    assert norms.moments.count.tolist() == [N] * 20 and norms.corrections.count.sum() == 0
    assert float(expected[0]) == pytest.approx(2, abs=1e-3) and float(expected[-1]) < 0.2


def test_each_evaluation_is_counted_once_and_members_count_as_images():
    schedule, times = LinearVPSchedule(), torch.linspace(1, 0.1, 6, dtype=F64)
    watch = EpsilonWatch(GaussianDenoiser(schedule, MEAN, VAR))
    norms, states = Norms(watch, 5), StateMoments(5, SHAPE)
    x = torch.randn(3, 4, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(0))
    last = observe(heun(watch, schedule, x, times), norms, states)
    assert norms.moments.count.tolist() == norms.corrections.count.tolist() == [12] * 5
    torch.testing.assert_close(states.moments.mean[-1], last.flatten(0, 1).mean(0))
    assert watch.drain() == []
    with pytest.raises(ValueError, match="no step"):
        observe([])


def exposure(denoiser, schedule, times, sampler=ddim):
    """delta and the distance of states, of a deterministic sampler from x_T of true data."""
    steps = len(times) - 1
    x0, x = data_and_noise(schedule, float(times[0]))
    residuals, states = Residuals(schedule, steps, SHAPE), StateMoments(steps, SHAPE)
    residuals.follow(x0)
    observe(sampler(denoiser, schedule, x, times), residuals, states)
    assert torch.allclose(residuals.data.var[0], VAR)
    found = delta(schedule, times, residuals.moments, residuals.data.var[0])
    return found, state_distance(schedule, times, states.moments, residuals.data)


def test_delta_of_an_exact_sampler_is_its_floor():
    """The flow maps x_u's distribution onto x_s's; with alpha_T at 0.0064 little of x_0 is left in x_T."""
    schedule = LinearVPSchedule()
    times = torch.linspace(1, 0.02, 201, dtype=F64)
    exact = GaussianDenoiser(schedule, MEAN, VAR)
    found, distance = exposure(exact, schedule, times, heun)
    # Var(r) = V_s + alpha_s^2 v - 2 alpha_s alpha_T v sqrt(V_s / V_T), the last term is what x_T knows of x_0.
    alpha, alpha_end = schedule.alpha(times[1:]), schedule.alpha(1.0)
    after, start = (
        torch.stack([exact.marginal_var(u) for u in each_time]) for each_time in (times[1:].tolist(), [1.0])
    )
    a = alpha.reshape(-1, 1, 1, 1)
    var = after + a**2 * VAR - 2 * a * alpha_end * VAR * (after / start).sqrt()
    expected = (var.sqrt().flatten(1).mean(1) - schedule.sigma(times[1:])) ** 2
    torch.testing.assert_close(found.delta, expected, rtol=0, atol=1e-3)
    assert float(found.excess.abs().max()) < 0.01 and float(found.delta[-1]) > 0.5
    assert float(distance.max()) < 1e-4
    means = (2 * VAR).sqrt().mean()
    clean = delta(schedule, torch.tensor([1.0, 0.0]), StepMoments(1, SHAPE), VAR)
    assert float(clean.floor) == pytest.approx(float(means**2)), "2 v for data of one variance"


def test_scaling_lowers_the_bias_of_a_network_that_overshoots():
    """eps too long by 3 %: the excess falls with scaling, and lambda = 1.03 takes all of it away."""
    times = make_times(VP, "20")
    exact = GaussianDenoiser(VP, MEAN, VAR)
    thick = ThickDenoiser(exact, VP, 1.03)
    (_, plain), (_, half), (_, full), (_, ideal) = (
        exposure(denoiser, VP, times)
        for denoiser in (
            thick,
            scaled(thick, VP, EpsilonScaling(1.015), times),
            scaled(thick, VP, EpsilonScaling(1.03), times),
            exact,
        )
    )
    assert plain[-1] > half[-1] > full[-1]
    torch.testing.assert_close(full, ideal, rtol=0, atol=1e-12)


def test_estimated_factors_bring_norms_back_to_training():
    """An error of the state, not of the network: a first step that overshoots; lambda shortens the norms after it."""
    times = make_times(VP, "10")
    exact = GaussianDenoiser(VP, MEAN, VAR)
    _, x = data_and_noise(VP, float(times[0]))
    draws = whitened(seed=3).reshape(N, 2, *SHAPE)
    below = EpsilonWatch(exact)
    training = Norms(below, 10)
    observe(each_step(ddim, below, VP, MEAN + VAR.sqrt() * draws[:, 0], times, lambda i, shape: draws[:, 1]), training)

    def norms(scaling=None):
        record = Norms(below, 10)
        observe(ddim(below if scaling is None else scaled(below, VP, scaling, times), VP, 1.05 * x, times), record)
        return record.moments

    plain = norms()
    factors = estimated_factors(plain, training.moments)
    assert torch.allclose(factors, plain.mean / training.moments.mean) and float(factors[0]) > 1.03
    for _ in range(8):  # lambda at the first steps changes the norms of the later ones
        factors = estimated_factors(norms(tabulated(VP, times, factors)), training.moments)
    corrected = norms(tabulated(VP, times, factors)).mean / factors
    torch.testing.assert_close(corrected, training.moments.mean, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"norms in training lack steps \[0, 1"):
        estimated_factors(plain, StepMoments(10))


def test_search_finds_the_minimum_below_and_above_one():
    for target in (0.9985, 1.017):
        asked = []
        found = search_b(lambda b, target=target, asked=asked: asked.append(b) or (b - target) ** 2, rounds=4)
        assert found.best == pytest.approx(target, abs=5e-4) and found.score == found.tried[found.best]
        assert len(asked) == len(set(asked)) == len(found.tried) and 1.0 in found.tried and found.at_edge is None
    outside = search_b(lambda b: b, 1.0, 1.02, 3, 2)
    assert outside.best < 1.0 and outside.at_edge == "least", "a minimum at an end moves the interval"
    assert search_b(lambda b: -b, 1.0, 1.02, 3, 1).at_edge == "largest"
    assert search_b(lambda b: 0.0 if b == 1 else 1.0, 1.01, 1.02).best == 1.0, "no scaling may win"
    with pytest.raises(ValueError, match="not a number"):
        search_b(lambda b: math.nan)
    with pytest.raises(ValueError, match="low < high"):
        search_b(lambda b: b, 1.1, 1.0)


def test_residuals_need_their_images():
    with pytest.raises(ValueError, match="call follow"):
        observe(ddim(GaussianDenoiser(VP, MEAN, VAR), VP, MEAN[None], make_times(VP, 2)), Residuals(VP, 2, SHAPE))
    with pytest.raises(ValueError, match="residuals of 3 steps on 2"):
        delta(VP, make_times(VP, 2), StepMoments(3, SHAPE), VAR)
