"""Likelihoods along a flow against the densities of Gaussians and mixtures."""

import math

import pytest
import torch

from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.derivative import diagonal, rademacher
from ldm.diffusion.likelihood import Likelihood, dequantise, log_likelihood, standard_normal
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule
from ldm.experiments.toy import GaussianDenoiser, MixtureDenoiser, correlated_gaussian
from tests.conftest import tiny_model

F64 = torch.float64
SOURCE = torch.Generator().manual_seed(0)
MEAN = torch.randn(1, 2, 3, dtype=F64, generator=SOURCE)
ROOT = torch.randn(6, 6, dtype=F64, generator=SOURCE) / 2
COVARIANCE = ROOT @ ROOT.T + 0.2 * torch.eye(6, dtype=F64)
X = MEAN + torch.randn(3, 1, 2, 3, dtype=F64, generator=SOURCE)


def gaussian_log_density(x, mean, covariance):
    flat = torch.distributions.MultivariateNormal(mean.flatten(), covariance)
    return flat.log_prob(x.flatten(1))


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_density_of_a_gaussian(schedule, method):
    denoiser = correlated_gaussian(schedule, MEAN, COVARIANCE)
    times = torch.linspace(1, 0, 31 if method == "rk4" else 2, dtype=F64)
    found = log_likelihood(denoiser, schedule, X, times, method=method, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.log_density, gaussian_log_density(X, MEAN, COVARIANCE), rtol=0, atol=2e-5)
    torch.testing.assert_close(denoiser.flow(found.noise, 1.0, 0.0), X, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [LinearVPSchedule(), EDMSchedule(sigma_max=80.0)], ids=["vp", "edm"])
def test_density_of_a_noised_state_where_a_path_ends_before_noise(schedule):
    """From u > 0 it is the density of alpha x_0 + sigma eps; the noisy end is known exactly."""
    denoiser, low = correlated_gaussian(schedule, MEAN, COVARIANCE), 0.05 * schedule.end
    alpha, sigma = schedule.coefficients(low, X)
    ends = [float(value) for value in schedule.coefficients(schedule.end, X)]

    def log_prior(x):
        spread = ends[0] ** 2 * COVARIANCE + ends[1] ** 2 * torch.eye(6, dtype=F64)
        return gaussian_log_density(x, ends[0] * MEAN, spread)

    times = torch.tensor([schedule.end, low], dtype=F64)
    found = log_likelihood(denoiser, schedule, X, times, method="dopri5", rtol=1e-6, atol=1e-6, log_prior=log_prior)
    exact = gaussian_log_density(X, alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * torch.eye(6, dtype=F64))
    torch.testing.assert_close(found.log_density, exact, rtol=0, atol=1e-4)


def test_density_of_a_mixture():
    means = torch.stack([MEAN - 1, MEAN + 0.5, 0.3 * MEAN])
    denoiser = MixtureDenoiser(FlowSchedule(), means, 0.3)
    found = log_likelihood(denoiser, FlowSchedule(), X, torch.tensor([1.0, 0.0]), method="dopri5")
    exact = torch.stack([gaussian_log_density(X, mean, 0.3 * torch.eye(6, dtype=F64)) for mean in means])
    torch.testing.assert_close(found.log_density, exact.logsumexp(0) - math.log(3), rtol=0, atol=1e-3)


def test_estimated_divergences_are_unbiased():
    denoiser = correlated_gaussian(FlowSchedule(), MEAN, COVARIANCE)
    times, repeats = torch.linspace(1, 0, 21, dtype=F64), 256
    exact = log_likelihood(denoiser, FlowSchedule(), X[:1], times).log_density
    source = torch.Generator().manual_seed(3)
    options = {"probes": 4, "generator": source}
    estimates = log_likelihood(
        denoiser, FlowSchedule(), X[:1].expand(repeats, -1, -1, -1), times, **options
    ).log_density
    error = float(estimates.std()) / repeats**0.5
    assert 0 < error < 0.1 and abs(float(estimates.mean() - exact)) < 4 * error
    with pytest.raises(ValueError, match="go together"):
        log_likelihood(denoiser, FlowSchedule(), X, times, probes=2)


def test_derivatives_of_a_network_do_not_depend_on_how_images_lie_in_memory():
    """Images as data sets hold them, channels last, seen as [B, C, H, W]: a UNet's norms refuse such tangents."""
    network = tiny_model().network
    labels, t = torch.tensor([1, 2]), torch.tensor([3.0, 400.0])
    held = torch.randn(2, 8, 8, 1, generator=torch.Generator().manual_seed(4)).permute(0, 3, 1, 2)
    signs = rademacher(2, held, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, plain = (diagonal(lambda x: network(x, t, labels), x, signs) for x in (held, held.contiguous()))
    torch.testing.assert_close(found, plain)


def test_bits_per_dimension_of_uniform_bytes_are_eight():
    """256 levels 2 / 255 apart fill a length of 512 / 255 in each of 6 dimensions: 8 bits each."""
    found = log_likelihood(
        GaussianDenoiser(FlowSchedule(), MEAN, MEAN * 0 + 1), FlowSchedule(), X, torch.tensor([1.0, 0.0])
    )
    uniform = type(found)(torch.full((3,), -6 * math.log(512 / 255), dtype=F64), found.noise)
    torch.testing.assert_close(uniform.bits_per_dimension, torch.full((3,), 8.0, dtype=F64))
    torch.testing.assert_close(standard_normal(X, 2.0), torch.distributions.Normal(0, 2).log_prob(X).flatten(1).sum(1))


def test_dequantised_levels_fill_what_lies_between_them_and_bound_the_code():
    """A density that is constant over each level's width: its bits are the entropy of the levels, 1.5 here."""
    levels = torch.tensor([0, 0, 255, 7]).repeat(500).reshape(-1, 1, 1, 1) / 127.5 - 1
    spread = dequantise(levels.double(), torch.Generator().manual_seed(0))
    assert torch.equal(((spread + 1) * 127.5).round(), ((levels.double() + 1) * 127.5).round())
    offsets = ((spread - levels) * 255).flatten()
    assert offsets.abs().max() <= 1 and offsets.var().item() == pytest.approx(1 / 3, rel=0.05)
    share = torch.where(levels.flatten() == -1, 0.5, 0.25).double()
    bits = Likelihood((share * 127.5).log(), torch.zeros(2000, 1, 1, 1)).bits_per_dimension
    assert bits.mean().item() == pytest.approx(1.5, abs=1e-6)


def test_diagonals_are_those_of_the_dense_jacobian():
    def function(x):
        return torch.tanh(x.roll(1, -1) * x) + 0.3 * x.flip(-2)

    dense = torch.stack([torch.autograd.functional.jacobian(function, x[None]).reshape(6, 6).diagonal() for x in X])
    torch.testing.assert_close(diagonal(function, X, chunk=4).flatten(1), dense)
    many = rademacher(20000, X, torch.Generator().manual_seed(1))
    torch.testing.assert_close(diagonal(function, X, many).flatten(1), dense, rtol=0, atol=0.03)
