"""Guidance on an interval, away from a weaker model, with its size corrected: closed forms and published formulas."""

import math

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target, guided
from ldm.diffusion.guidance import GuidanceRule, RuledGuidance, SharedDenoiser
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.ode.runge_kutta import heun
from ldm.diffusion.samplers import run
from ldm.diffusion.schedule import EDMSchedule, VPSchedule, make_betas
from ldm.diffusion.times import make_times

F64 = torch.float64
EDM, VP = EDMSchedule(), VPSchedule(make_betas("linear", 1000))
MEANS = torch.tensor([0.5, -1.0, 2.0], dtype=F64)  # of classes 0, 1 and null
LABELS, NULL = torch.tensor([0, 1]), torch.tensor([2, 2])


def gaussian(variance, means=MEANS):
    """The predicted x0 of data N(mean of the class, variance) on EDM's schedule."""

    def network(x, t, cond):
        sigma = (4 * t.double()).exp().reshape(-1, 1, 1, 1)
        mean = means[cond].reshape(-1, 1, 1, 1)
        return mean + variance / (variance + sigma**2) * (x - mean)

    return network


def plain(variance, cond=LABELS):
    return NetworkDenoiser(gaussian(variance), EDM, Target("x0"), cond)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.3, 5.0)])
def test_autoguidance_of_gaussians_ends_where_its_differential_equation_does(low, high):
    """dx / dsigma = sigma (x - mean) (s / (v + sigma^2) + (1 - s) / (w + sigma^2)) on the interval, with s = 1 outside.

    So the distance to the mean is multiplied by ((v + sigma^2)^s (w + sigma^2)^(1 - s))^(1/2) at one end over the
    other.
    """
    better, weaker, scale = 0.25, 1.0, 2.5
    times = make_times(EDM, 100, "karras", sigma_min=0.01, sigma_max=20.0)
    guidance = RuledGuidance(plain(better), plain(weaker), None, GuidanceRule(scale, low, high))
    x = 20 * draw(2, 1, 2, 2)
    found = run(heun(guidance, EDM, x, times))

    def factor(start, end, s):
        return math.sqrt(
            ((better + end**2) / (better + start**2)) ** s * ((weaker + end**2) / (weaker + start**2)) ** (1 - s)
        )

    high, low = min(high, 20.0), low
    shrinks = factor(20.0, high, 1) * factor(high, low, scale) * factor(low, 0.0, 1)
    mean = MEANS[LABELS].reshape(-1, 1, 1, 1)
    expected = mean + shrinks * (x - mean)
    # Heun's error, and the steps that the interval's ends fall into.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float((expected - mean).abs().max()))
    assert abs(shrinks / factor(20.0, 0.0, 1) - 1) > 0.1


def test_the_interval_is_open_below_and_closed_above():
    guidance = RuledGuidance(plain(0.25), None, NULL, GuidanceRule(3.0, 0.5, 2.0))
    everywhere = guided(plain(0.25), NULL, 3.0)
    x = draw(2, 1, 2, 2)
    for sigma, inside in ((0.5, False), (0.500001, True), (2.0, True), (2.000001, False)):
        expected = (everywhere if inside else plain(0.25))(x, sigma)
        torch.testing.assert_close(guidance(x, sigma).x0, expected.x0)
    each = guidance(x, torch.tensor([0.5, 2.0], dtype=F64)).x0
    torch.testing.assert_close(each[0], plain(0.25)(x, 0.5).x0[0])
    torch.testing.assert_close(each[1], everywhere(x, 2.0).x0[1])


def test_outside_the_interval_the_network_sees_each_image_once():
    rows = []

    def counted(x, t, cond):
        rows.append(len(x))
        return gaussian(0.25)(x, t, cond)

    own = NetworkDenoiser(counted, EDM, Target("x0"), LABELS)
    guidance = RuledGuidance(own, None, NULL, GuidanceRule(3.0, 0.5, 2.0))
    for sigma in (0.1, 1.0, 3.0):
        guidance(draw(2, 1, 2, 2), sigma)
    assert rows == [2, 4, 2]


@pytest.mark.parametrize("name", ["eps", "v"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_outputs_are_rescaled_as_published(name, phi):
    """Lin et al. 2024, eq. 14 to 16, of what the network regresses, as diffusers does; x0 and eps keep the state."""
    outputs = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    own = NetworkDenoiser(lambda x, t, cond: torch.cat(outputs), VP, Target(name), LABELS)
    x, u, scale = draw(2, 3, 4, 4), 600.0, 4.0
    found = RuledGuidance(own, None, NULL, GuidanceRule(scale, rescale=phi))(x, u)
    null, cond = outputs
    far = null + scale * (cond - null)
    sizes = [one.flatten(1).std(dim=1).reshape(2, 1, 1, 1) for one in (cond, far)]
    expected = phi * far * sizes[0] / sizes[1] + (1 - phi) * far
    alpha, sigma = VP.per_image(u)
    torch.testing.assert_close(Target(name).of(found.x0, found.eps, alpha, sigma), expected)
    torch.testing.assert_close(VP.noised(found.x0, found.eps, u), x)


def test_members_have_scales_of_their_own():
    """[M, 1, 1, 1, 1] for members, [B, 1, 1, 1] for images; null and class are one batch as without."""

    def members(x, t, cond):
        x = x if x.ndim == 5 else x.expand(3, *x.shape)
        offsets = torch.tensor([0.0, 1.0, -1.0], dtype=F64).reshape(3, 1, 1, 1, 1)
        return torch.stack([gaussian(0.25)(one, t, cond) for one in x]) + offsets * MEANS[cond].reshape(-1, 1, 1, 1)

    own = NetworkDenoiser(members, EDM, Target("x0"), LABELS)
    scales = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    for x in (draw(2, 1, 2, 2), draw(3, 2, 1, 2, 2)):
        found = RuledGuidance(own, None, NULL, GuidanceRule(scales.reshape(-1, 1, 1, 1, 1)))(x, 1.0)
        for member, scale in enumerate(scales.tolist()):
            expected = (own if scale == 1 else guided(own, NULL, scale))(x, 1.0)
            torch.testing.assert_close(found.x0[member], expected.x0[member])
            torch.testing.assert_close(found.eps[member], expected.eps[member])
    single = plain(0.25)
    of_images = RuledGuidance(single, None, NULL, GuidanceRule(torch.tensor([1.0, 3.0]).reshape(-1, 1, 1, 1)))
    x = draw(2, 1, 2, 2)
    torch.testing.assert_close(of_images(x, 1.0).x0[0], single(x, 1.0).x0[0])
    torch.testing.assert_close(of_images(x, 1.0).x0[1], guided(single, NULL, 3.0)(x, 1.0).x0[1])


def test_one_weaker_model_serves_all_members():
    shared = SharedDenoiser(gaussian(1.0), EDM, Target("x0"), LABELS)
    x = draw(3, 2, 1, 2, 2)
    for u in (1.0, torch.tensor([0.5, 2.0], dtype=F64)):
        found = shared(x, u)
        for member in range(3):
            torch.testing.assert_close(found.x0[member], shared(x[member], u).x0)
            torch.testing.assert_close(found.eps[member], plain(1.0)(x[member], u).eps)


def test_a_guided_image_does_not_depend_on_its_batch():
    times = make_times(EDM, 5)
    images = []
    for batch in ((0, 1), (1,)):
        labels = torch.tensor([image % 2 for image in batch])
        rule = GuidanceRule(2.0, 0.1, 10.0, 0.7)
        guidance = RuledGuidance(plain(0.25, labels), plain(1.0, labels), None, rule)
        x = 80 * ImageNoise(0, batch)(-1, (len(batch), 1, 2, 2)).double()
        images.append(run(heun(guidance, EDM, x, times))[-1])
    torch.testing.assert_close(*images)
