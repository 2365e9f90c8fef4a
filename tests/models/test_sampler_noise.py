"""Samplers that draw noise: learned variance, guidance by a shift of the mean, churn, temperature."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ancestral, ddim, heun, make_times, run
from ldm.diffusion.transition import posterior_variance
from ldm.experiments.toy import GaussianDenoiser, MixtureDenoiser
from tests.models.test_sampler import EDM, F64, MEAN, SHAPE, SMOOTH, VAR, VP, draw


def test_learned_range_lies_between_the_bounds():
    def learned(x, u):
        prediction = GaussianDenoiser(VP, MEAN, VAR)(x, u)
        return Prediction(prediction.x0, prediction.eps, torch.full_like(x, 0.25))

    times, x, noise = make_times(VP, 10, "trailing"), draw(2, *SHAPE), ImageNoise(1, (0, 1))
    variances = {
        name: [step.transition.w for step in ancestral(learned, VP, x, times, variance=name, noise=noise)]
        for name in ("fixed_small", "fixed_large", "learned_range")
    }
    for small, large, middle in zip(*variances.values(), strict=True):
        torch.testing.assert_close(middle, (large**0.25 * small**0.75).expand(middle.shape))
    with pytest.raises(ValueError, match="learns its variance"):
        run(ancestral(GaussianDenoiser(VP, MEAN, VAR), VP, x, times, variance="learned_range", noise=noise))
    with pytest.raises(ValueError, match="variance must be one of"):
        run(ancestral(learned, VP, x, times, variance="large", noise=noise))


def test_mean_shift_guides_to_a_class():
    """Two Gaussian classes: shifting the mean by the variance times the score of the class samples that class."""
    means = torch.stack([MEAN * 0 - 1, MEAN * 0 + 1])
    both, one = MixtureDenoiser(VP, means, 0.1), MixtureDenoiser(VP, means[1:], 0.1)

    def shift(x, u, variance):
        return variance * (both(x, u).eps - one(x, u).eps) / VP.sigma(u)  # grad log p(1 | x)

    times, x, noise = make_times(VP, 250), draw(64, *SHAPE), ImageNoise(1, tuple(range(64)))
    steps = list(ancestral(both, VP, x, times, mean_shift=shift, noise=noise))
    torch.testing.assert_close(steps[-1].x_next.mean(0), means[1], rtol=0, atol=0.2)
    step = steps[3]
    drawn = step.transition.w.sqrt() * noise(3, x.shape).to(F64)
    torch.testing.assert_close(step.distribution.mean + drawn, step.x_next)


def test_shift_of_the_clean_step_uses_the_variance_before_it():
    """guided-diffusion clips the vanishing posterior variance of the last step to the one before."""
    seen = []
    shift = lambda x, u, variance: seen.append(variance) or torch.zeros_like(x)  # noqa: E731
    times, noise = make_times(VP, "10"), ImageNoise(1, (0, 1))
    run(ancestral(GaussianDenoiser(VP, MEAN, VAR), VP, draw(2, *SHAPE), times, mean_shift=shift, noise=noise))
    assert seen[-1] == seen[-2] == posterior_variance(VP, float(times[-3]), float(times[-2]))


def test_churn_keeps_the_marginals():
    """A Gaussian state stays Gaussian under churn: moments from the affine parts and the noise added."""
    denoiser, times, sampled = GaussianDenoiser(EDM, MEAN, VAR), make_times(EDM, 50), 2000
    noise = ImageNoise(3, tuple(range(sampled)))
    x = noise.initial((sampled, *SHAPE)).to(F64) * 80
    samples = run(heun(denoiser, EDM, x, times, S_churn=40, noise=noise))
    torch.testing.assert_close(samples.mean(0), MEAN, rtol=0, atol=5 * (3 / sampled) ** 0.5)
    torch.testing.assert_close(samples.var(0), VAR, rtol=5 * (2 / sampled) ** 0.5, atol=0)


def test_churn_has_the_noise_of_the_raised_level():
    """The state after churn is q(x_u' | x_u), on a schedule with alpha as well."""
    for schedule, u in ((EDM, 5.0), (VP, 400.0), (SMOOTH, 0.4)):
        times, x = torch.tensor([u, 0.5 * u], dtype=F64), torch.zeros(1, *SHAPE, dtype=F64)
        ones = lambda index, shape: torch.ones(shape, dtype=F64)  # noqa: E731
        step = next(heun(GaussianDenoiser(schedule, MEAN, VAR), schedule, x, times, S_churn=0.1, noise=ones))
        torch.testing.assert_close(schedule.ratio(step.u), 1.1 * schedule.ratio(u))
        gained = schedule.sigma(step.u) ** 2 - (schedule.alpha(step.u) / schedule.alpha(u) * schedule.sigma(u)) ** 2
        torch.testing.assert_close(step.x, (x + 1) * gained.sqrt())
    with pytest.raises(ValueError, match="S_churn = 0"):
        run(heun(GaussianDenoiser(EDM, MEAN, VAR), EDM, x, times, S_churn=1.0))


def test_temperature_scales_only_the_noise():
    denoiser, times, noise = GaussianDenoiser(VP, MEAN, VAR), make_times(VP, 10), ImageNoise(1, (0, 1))
    for sampler, options in ((ddim, {"eta": 1.0}), (ancestral, {})):
        warm, cold = (
            next(sampler(denoiser, VP, draw(2, *SHAPE), times, temperature=t, noise=noise, **options)) for t in (1, 0.5)
        )
        mean = warm.distribution.mean
        torch.testing.assert_close(cold.x_next - mean, 0.5 * (warm.x_next - mean))
