"""Variances through a decoder: linear ones in closed form, small ones by their derivative; and states around a cut."""

import pytest
import torch

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import make_sampler, run
from ldm.uncertainty.propagation import decoded_draws, decoded_members, decoded_tangents, sampled_steps
from ldm.uncertainty.resampling import finished, step_at, variants
from tests.uncertainty.test_propagation import X, posterior, setting

MATRIX = torch.randn(12, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
AWAY = torch.randn(500, 2, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def linear(z):
    return (z.flatten(1) @ MATRIX).reshape(-1, 3, 3, 3)


def curved(z):
    return linear(z).tanh()


def test_a_linear_decoder_carries_covariances():
    flat = AWAY.flatten(2)
    centred = flat - flat.mean(0)
    exact = torch.einsum("mbi,mbj,ik,jk->bk", centred, centred, MATRIX, MATRIX) / 499
    torch.testing.assert_close(decoded_members(linear, Z + AWAY, chunk=7).flatten(1), exact)
    raw = torch.einsum("mbi,mbj,ik,jk->bk", flat, flat, MATRIX, MATRIX) / 500
    torch.testing.assert_close(decoded_tangents(linear, Z, AWAY, chunk=33).flatten(1), raw)
    var = AWAY.square().mean(0)
    drawn = decoded_draws(linear, Z, var, ImageNoise(3, (0, 1)), count=2000)
    torch.testing.assert_close(drawn.flatten(1), var.flatten(1) @ MATRIX.square(), rtol=0.2, atol=0)
    alone = decoded_draws(linear, Z[1:], var[1:], ImageNoise(3, (1,)), count=5)
    torch.testing.assert_close(alone, decoded_draws(linear, Z, var, ImageNoise(3, (0, 1)), count=5)[1:])


def test_small_members_of_a_curved_decoder_are_its_tangents():
    found = decoded_members(curved, Z + 1e-4 * (AWAY - AWAY.mean(0))) * 1e8 * 499 / 500
    torch.testing.assert_close(decoded_tangents(curved, Z, AWAY - AWAY.mean(0)), found, rtol=1e-3, atol=1e-6)


def walk():
    network, laplace = posterior()
    build, path, times = setting("vp", network)
    members, solver = laplace.sample(3, torch.Generator().manual_seed(3)), make_sampler("DDIM", eta=0.5)
    noise = ImageNoise(7, [0, 1])
    at = step_at(sampled_steps(solver, build, network, members, path, X, times, noise=noise), 2)
    return network, build(network), path, times, solver, noise, at


def test_the_first_variant_ends_where_the_plain_sampler_does():
    _, denoiser, path, times, solver, noise, at = walk()
    states = variants(at, 4, noise)
    ends = finished(solver, denoiser, path, states, times, 2, noise)
    assert torch.equal(ends[0], run(solver(denoiser, path, X, times, noise=noise)))
    assert bool((ends[1:] != ends[0]).any()) and ends.shape == (4, *X.shape)
    with pytest.raises(ValueError, match="no step"):
        step_at(iter([]), 2)


def test_variants_have_the_maps_spread_and_members_are_themselves():
    *_, at = walk()
    noise = ImageNoise(1, [0, 1])
    many = variants(at, 3000, noise)[1:]
    torch.testing.assert_close(many.var(0), at.var, rtol=0.15, atol=0)
    even = variants(at, 3000, noise, "uniform")[1:].var(0)
    torch.testing.assert_close(even.sum((1, 2, 3)), at.var.sum((1, 2, 3)), rtol=0.05, atol=0)
    torch.testing.assert_close(even, even.mean((1, 2, 3), keepdim=True).expand_as(even), rtol=0.15, atol=0)
    assert torch.equal(variants(at, 4, noise, "members")[1:], at.step.x_next + (at.members - at.step.x_next))
    for kind, count in (("other", 3), ("members", 9), ("variance", 1)):
        with pytest.raises(ValueError, match=r"kind|sampled members"):
            variants(at, count, noise, kind)
