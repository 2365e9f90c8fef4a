"""Guidance by a classifier against the exact conditional denoiser of a mixture, and its place among the wrappers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ldm.diffusion.classifier_guidance import ClassifierScore, classifier_guided
from ldm.diffusion.denoiser import NetworkDenoiser, Target, clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import SAMPLERS, ancestral, make_sampler, make_times, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, VPSchedule, make_betas
from ldm.experiments.toy import MixtureDenoiser
from ldm.settings import SamplerName
from ldm.settings.names import ADAPTIVE

F64 = torch.float64
VP = VPSchedule(make_betas("cosine", 1000))
LABELS = torch.tensor([0, 1, 1])
NOISE = ImageNoise(0, (0, 1, 2))


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixture(schedule):
    return MixtureDenoiser(schedule, draw(2, 1, 2, 2, seed=5), 0.3, torch.tensor([0.25, 0.75], dtype=F64))


class Conditional:
    """The exact denoiser of each image's own component."""

    def __init__(self, schedule):
        means = mixture(schedule).means
        self.parts = [MixtureDenoiser(schedule, means[k : k + 1], 0.3) for k in LABELS.tolist()]

    def __call__(self, x, u):
        found = [part(x[k : k + 1], u) for k, part in enumerate(self.parts)]
        join = lambda name: torch.cat([getattr(one, name) for one in found])  # noqa: E731
        return type(found[0])(join("x0"), join("eps"))


def exact_score(schedule, scale=1.0):
    """log p(y | x) of the mixture as logits."""
    denoiser = mixture(schedule)

    def classifier(x, t):
        u = t[:1].double() + 1 if isinstance(schedule, VPSchedule) else t[0].double()
        u = (4 * u).exp() if isinstance(schedule, EDMSchedule) else u
        return denoiser.responsibilities(x, u.squeeze()).log()

    return ClassifierScore(classifier, schedule, LABELS, scale)


@pytest.mark.parametrize(
    ("schedule", "each_time"), [(VP, (1, 300, 999)), (FlowSchedule(), (0.25, 0.5)), (EDMSchedule(), (0.5, 8.0))]
)
def test_the_exact_classifier_turns_the_mixture_into_its_component(schedule, each_time):
    guided, expected = classifier_guided(mixture(schedule), exact_score(schedule)), Conditional(schedule)
    for u in each_time:
        x = schedule.noised(draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), u)
        for name in ("x0", "eps"):
            # The time reaches the classifier in float32, as it reaches a network.
            ours, theirs = (getattr(one(x, u), name) for one in (guided, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in ("Euler", "Heun", "PLMS", "DPM-Solver++"):
        times, x = make_times(schedule, 8), draw(3, 1, 2, 2) * schedule.prior_std
        if schedule.field == "velocity":
            times = times[1:]  # at pure noise a mixture and its parts predict different means
        ours, theirs = (run(SAMPLERS[name](one, schedule, x, times)) for one in (guided, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_mean_shift_of_a_small_step_is_the_conditional_mean():
    """sqrt(1 - beta) between the two: both are first order in the step."""
    score, x, times = exact_score(VP), draw(3, 1, 2, 2), make_times(VP, 1000)
    start = 700
    options = {"variance": "fixed_large", "noise": NOISE, "start": start}
    ours = next(ancestral(mixture(VP), VP, x, times, mean_shift=score.mean_shift, **options)).distribution.mean
    theirs = next(ancestral(Conditional(VP), VP, x, times, **options)).distribution.mean
    plain = next(ancestral(mixture(VP), VP, x, times, **options)).distribution.mean
    assert float((ours - theirs).abs().max()) < 0.01 * float((plain - theirs).abs().max())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_mean_shift_sees_the_published_variances(variance):
    """guided-diffusion's tables of the respaced process: both begin with posterior_variance[1], at clean data."""
    times, seen = make_times(VP, "20"), []
    run(ancestral(mixture(VP), VP, draw(3, 1, 2, 2), times, variance=variance, noise=NOISE,
                  mean_shift=lambda x, u, w: seen.append(float(w)) or torch.zeros_like(x)))  # fmt: skip
    abar = (VP.alpha(times) ** 2).flip(0)[1:]
    before = torch.cat([torch.ones(1), abar[:-1]])
    betas = 1 - abar / before
    posterior = betas * (1 - before) / (1 - abar)
    expected = torch.cat([posterior[1:2], (posterior if variance == "fixed_small" else betas)[1:]])
    torch.testing.assert_close(torch.tensor(seen[::-1], dtype=torch.float64), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampler", ["DDIM", "Heun"])
def test_the_gradient_is_neither_scaled_nor_clipped(sampler):
    network, times = lambda x, t, cond: 1.3 * x.roll(1, -1), make_times(VP, "20")
    score, u, x = exact_score(VP, 3.0), 500.0, draw(3, 1, 2, 2)
    plain = NetworkDenoiser(network, VP, Target("eps"))
    wrapped = classifier_guided(clipped(scaled(plain, VP, EpsilonScaling(1.05), times), VP), score)
    alpha, sigma = VP.coefficients(u, x)
    x0 = ((x - sigma * network(x, None, None) / 1.05) / alpha).clamp(-1, 1)
    eps = (x - alpha * x0) / sigma - sigma * score(x, u)
    torch.testing.assert_close(wrapped(x, u).eps, eps)
    torch.testing.assert_close(wrapped(x, u).x0, (x - sigma * eps) / alpha)
    assert not torch.allclose(
        run(SAMPLERS[sampler](wrapped, VP, x, times)), run(SAMPLERS[sampler](wrapped.denoiser, VP, x, times))
    )


# A clamp has a kink, at which adaptive steps shrink.
@pytest.mark.parametrize("sampler", [name for name in get_args(SamplerName) if name not in ADAPTIVE])
def test_every_sampler_scales_once_under_a_classifier(sampler):
    """Scaling the network's noise below the gradient is a network whose noise is shorter; the gradient stays."""
    network, times, x = lambda x, t, cond: 0.7 * x.roll(1, -1), make_times(VP, "20"), draw(3, 1, 2, 2)
    score, plain = exact_score(VP), NetworkDenoiser(network, VP, Target("eps"))
    shorter = NetworkDenoiser(lambda x, t, cond: network(x, t, cond) / 1.05, VP, Target("eps"))
    ends = []
    for one in (scaled(plain, VP, EpsilonScaling(1.05), times), shorter, plain):
        guided = classifier_guided(clipped(one, VP), score)
        ends.append(run(make_sampler(sampler)(guided, VP, x, times, noise=NOISE)))
    torch.testing.assert_close(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], atol=1e-3), "scaling acts"


def test_scaling_acts_once_under_the_mean_shift():
    """Two wrong ways of the published DDIM, dividing twice or dividing the gradient, are told apart."""
    network, times, x = lambda x, t, cond: 0.7 * x.roll(1, -1), make_times(VP, "20"), draw(3, 1, 2, 2)
    score = exact_score(VP)
    shift = {"mean_shift": score.mean_shift, "noise": NOISE}
    ours = scaled(NetworkDenoiser(network, VP, Target("eps")), VP, EpsilonScaling(1.05), times)
    theirs = NetworkDenoiser(lambda x, t, cond: network(x, t, cond) / 1.05, VP, Target("eps"))
    ours, theirs = (run(ancestral(clipped(one, VP), VP, x, times, **shift)) for one in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_members_share_the_labels_and_scale_zero_is_off():
    score, x = exact_score(VP, 2.0), draw(3, 1, 2, 2)
    both = torch.stack([x, x.flip(-1)])
    torch.testing.assert_close(score(both, 400.0), torch.stack([score(x, 400.0), score(x.flip(-1), 400.0)]))
    torch.testing.assert_close(score(x, torch.tensor([400.0, 400.0, 400.0])), score(x, 400.0))
    plain = mixture(VP)
    assert classifier_guided(plain, exact_score(VP, 0.0)) is plain and classifier_guided(plain, None) is plain
    # At a flow's first point there is no data, and nothing to guide.
    schedule = FlowSchedule()
    first = classifier_guided(mixture(schedule), exact_score(schedule))(x, 1.0)
    for name in ("x0", "eps"):
        torch.testing.assert_close(getattr(first, name), getattr(mixture(schedule)(x, 1.0), name))


def test_the_gradient_has_derivatives():
    """Under jvp, as tangents of weights take it: against a central difference."""
    score, x, v = exact_score(VP), draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=9)
    _, ours = torch.func.jvp(lambda state: score(state, 300.0), (x,), (v,))
    h = 1e-5
    torch.testing.assert_close(
        ours, (score(x + h * v, 300.0) - score(x - h * v, 300.0)) / (2 * h), rtol=1e-5, atol=1e-7
    )
