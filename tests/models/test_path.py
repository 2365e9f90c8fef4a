"""Schedules against the published tables, their own inverses and limits."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion.losses import elbo_weights, elementwise_error
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.diffusion.transition import ddim_transition, forward_variance, posterior_variance
from tests.conftest import golden_json, golden_tensors

F64 = torch.float64
# Square root and cosine differ by one unit in the last place between machines: absolute bound, float64.
SCHEDULES = {"linear_cin256": 0, "linear_default": 0, "sqrt_linear": 0, "sqrt": 4e-17, "cosine": 3e-16}
PATHS = {
    "vp": VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195)),
    "cosine": VPSchedule(make_betas("cosine", 50)),
    "linear_vp": LinearVPSchedule(),
    "edm": EDMSchedule(),
    "flow": FlowSchedule(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_the_published_ones(name):
    settings = dict(golden_json("schedules")["beta_kwargs"][name])
    betas = make_betas(settings.pop("schedule"), settings.pop("n_timestep"), **settings)
    torch.testing.assert_close(betas, golden_tensors("schedules")[f"betas/{name}"], rtol=0, atol=SCHEDULES[name])


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 200, 250, 500])
@pytest.mark.parametrize("eta", [0, 1])
def test_transitions_are_the_published_ddim_parameters(steps, eta):
    """The published tables start from float32 alphas_cumprod: so does the first schedule here."""
    golden = {name.removeprefix(f"ddim_uniform/{steps}/"): value for name, value in golden_tensors("schedules").items()}
    exact = PATHS["vp"]
    rounded = torch.cat([torch.ones(1, dtype=F64), exact.log_abar[1:].exp().float().double()])
    schedule = VPSchedule(1 - rounded[1:] / rounded[:-1])
    times = (golden["timesteps"] + 1).double()
    later = torch.cat([torch.ones(1, dtype=F64), times[:-1]])
    for one, tolerance in ((schedule, 1e-13), (exact, 1e-7)):
        torch.testing.assert_close(one.alpha(times) ** 2, golden["alphas"], rtol=tolerance, atol=0)
        torch.testing.assert_close(one.alpha(later) ** 2, golden["alphas_prev"], rtol=tolerance, atol=0)
    assert torch.equal((exact.alpha(times) ** 2).float().double(), golden["alphas"])
    assert torch.equal((exact.alpha(later) ** 2).float().double(), golden["alphas_prev"])
    transitions = [ddim_transition(schedule, float(u), float(s), eta) for u, s in zip(times, later, strict=True)]
    sigmas = torch.stack([transition.w.sqrt() for transition in transitions])
    # The published expression rounds 1 - abar to float32 on the way.
    torch.testing.assert_close(sigmas, golden[f"eta{eta}/sigmas"], rtol=3e-6 if eta else 0, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_time_at_inverts_the_ratio(name):
    schedule = PATHS[name]
    u = torch.linspace(0.01, 0.99, 57, dtype=F64) * schedule.end
    torch.testing.assert_close(schedule.time_at(schedule.ratio(u)), u, rtol=1e-9, atol=1e-12)
    assert schedule.ratio(0.0) == 0 and schedule.time_at(0.0) == 0


@pytest.mark.parametrize("name", ["vp", "cosine", "linear_vp"])
def test_vp_keeps_variance_and_ends_at_its_noisiest_time(name):
    schedule = PATHS[name]
    u = torch.linspace(0, schedule.end, 401, dtype=F64)
    torch.testing.assert_close(
        schedule.alpha(u) ** 2 + schedule.sigma(u) ** 2, torch.ones(401, dtype=F64), rtol=0, atol=1e-14
    )
    assert schedule.time_at(math.inf) == schedule.end == schedule.time_at(1e30)


def test_vp_interpolates_log_alpha_bar_between_entries():
    schedule = PATHS["vp"]
    half = (schedule.alpha(10.0) * schedule.alpha(11.0)).sqrt()
    torch.testing.assert_close(schedule.alpha(10.5), half, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"\[0, 1000\]"):
        schedule.alpha(1000.5)
    with pytest.raises(ValueError, match="betas must be a vector"):
        VPSchedule(torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="cosine"):
        make_betas("quadratic", 10)


def test_linear_vp_matches_the_published_noise_levels_and_their_inverse():
    golden, schedule = golden_tensors("edm"), PATHS["linear_vp"]
    torch.testing.assert_close(
        schedule.ratio(golden["vp/t"].double()).float(), golden["vp/sigma_of_t"], rtol=2e-5, atol=1e-6
    )
    times = schedule.time_at(golden["vp/sigma_inv_in"].double()).float()
    torch.testing.assert_close(times, golden["vp/sigma_inv"], rtol=1e-4, atol=1e-6)


def iddpm_levels(dtype, count=1000):
    """Karras et al. 2022, table 1: u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, 0.001) - 1, from u_M = 0."""
    angles = torch.arange(count + 1, dtype=dtype) * (0.5 * math.pi / count / 1.008)
    abar, levels = torch.sin(angles) ** 2, torch.zeros(count + 1, dtype=dtype)
    for j in range(count, 0, -1):
        levels[j - 1] = ((levels[j] ** 2 + 1) / (abar[j - 1] / abar[j]).clamp(min=1e-3) - 1).sqrt()
    return levels.double()


def test_cosine_table_gives_the_noise_levels_of_iddpm():
    """The published recursion runs in float32 and loses 5e-4 of the lowest levels; in float64 it gives our table."""
    levels = VPSchedule(make_betas("cosine", 1000)).ratio(torch.arange(1000, -1, -1, dtype=F64))
    torch.testing.assert_close(levels, iddpm_levels(F64), rtol=1e-10, atol=0)
    golden = golden_tensors("edm")["iddpm/u"].double()
    torch.testing.assert_close(golden[50:950], levels[50:950], rtol=2e-5, atol=0)
    torch.testing.assert_close(golden, levels, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_variances_are_those_of_bayes_rule(name):
    """x_0 given, x_s ~ N(alpha_s x_0, sigma_s^2) and x_u | x_s ~ N(a x_s, f): precisions add."""
    schedule = PATHS[name]
    u, s = 0.7 * schedule.end, 0.4 * schedule.end
    forward = forward_variance(schedule, u, s)
    a = schedule.alpha(u) / schedule.alpha(s)
    torch.testing.assert_close(a**2 * schedule.sigma(s) ** 2 + forward, schedule.sigma(u) ** 2, rtol=1e-12, atol=0)
    posterior = 1 / (1 / schedule.sigma(s) ** 2 + a**2 / forward)
    torch.testing.assert_close(posterior_variance(schedule, u, s), posterior, rtol=1e-10, atol=0)


def test_times_of_networks():
    assert PATHS["vp"].time_to_net(1000.0) == 999
    assert VPSchedule(make_betas("linear", 100), unit_time=True).time_to_net(50.0) == 0.5
    assert PATHS["edm"].time_to_net(1.0) == 0
    assert FlowSchedule(reversed_time=True).time_to_net(0.25) == 0.75


def test_noised_broadcasts_times_over_images():
    schedule, x = PATHS["vp"], torch.randn(2, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([1.0, 900.0])
    batch = schedule.noised(x, 2 * x, u)
    for image, time in zip(range(2), u, strict=True):
        torch.testing.assert_close(batch[image], schedule.alpha(time) * x[image] + schedule.sigma(time) * 2 * x[image])


def test_bound_weights_are_the_published_expressions():
    schedule = PATHS["vp"]
    abar, betas = schedule.log_abar[1:].exp(), schedule.betas
    previous = torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    variance = betas * (1 - previous) / (1 - abar)
    eps, x0 = (elbo_weights(schedule, name, variance) for name in ("eps", "x0"))
    # eps: beta^2 / (2 var alpha (1 - abar)) collapses to beta / (2 alpha (1 - abar_prev)).
    torch.testing.assert_close(eps[1:], (betas / (2 * (1 - betas) * (1 - previous)))[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(x0[1:], (abar.sqrt() / (4 - 2 * abar))[1:], rtol=1e-12, atol=0)
    assert eps[0] == eps[1] and x0[0] == x0[1]
    assert bool((elbo_weights(schedule, "v", variance) == 1).all())
    with pytest.raises(ValueError, match="velocity"):
        elbo_weights(schedule, "velocity", variance)


def test_errors_are_unreduced():
    output, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 1.0]])
    assert elementwise_error(output, target).tolist() == [[1, 9]]
    assert elementwise_error(output, target, "l1").tolist() == [[1, 3]]
    with pytest.raises(ValueError, match="huber"):
        elementwise_error(output, target, "huber")
