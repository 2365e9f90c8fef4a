"""Clean data and pure noise: every sampler and likelihood on every path, whatever its network regresses."""

import math

import pytest
import torch

from ldm.diffusion.affine import CosineSchedule, LinearAlphaSchedule, PolynomialSchedule
from ldm.diffusion.denoiser import Prediction, Target, make_target
from ldm.diffusion.flow_matching import ODESolver, to_flow_matching
from ldm.diffusion.likelihood import log_likelihood
from ldm.diffusion.ode.own_time import heun_in_time
from ldm.diffusion.samplers import SAMPLERS, heun, make_sampler, make_times, plms, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VESchedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser
from ldm.settings.names import SECOND_NAMES

F64 = torch.float64
PATHS = {
    "table": VPSchedule(make_betas("linear", 1000)),
    "linear vp": LinearVPSchedule(),
    "edm": EDMSchedule(),
    "ve": VESchedule(),
    "straight": FlowSchedule(),
    "square": PolynomialSchedule(power=2.0),
    "root": PolynomialSchedule(power=0.5),
    "cosine": CosineSchedule(),
    "linear alpha": LinearAlphaSchedule(),
}
TARGETS = ("eps", "x0", "v", "velocity")
# Data of mean 0, whose limit at pure noise is the one that `Target.solve` takes.
MEAN = torch.zeros(1, 1, 2, dtype=F64)
VAR = torch.tensor([0.1, 1.5], dtype=F64).reshape(1, 1, 2)
X = torch.randn(1, 1, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).expand(1 + len(TARGETS), 1, 1, 2)
NAMES = [name for name in SAMPLERS if name not in SECOND_NAMES]


class Regressed:
    """The exact denoiser of N(MEAN, VAR) for the first image, and for one more by each target what a network that
    regresses it without error makes of it. A target that is no number, at an end of some path, is replaced by 3."""

    def __init__(self, schedule):
        self.schedule, self.exact = schedule, GaussianDenoiser(schedule, MEAN, VAR)
        self.targets = [make_target(schedule, name) for name in TARGETS]

    def __call__(self, x, u):
        assert math.isfinite(self.schedule.time_to_net(u)), f"a network was asked at u = {u}, a time that is no number"
        levels = self.schedule.per_image(u)
        exact = self.exact(x, u)
        x0, eps = [exact.x0[:1]], [exact.eps[:1]]
        for row, target in enumerate(self.targets, 1):
            output = target.of(exact.x0, exact.eps, *levels)[row : row + 1]
            output = torch.where(output.isfinite(), output, 3.0)
            parts = target.solve(output, x[row : row + 1], *levels)
            x0.append(parts[0])
            eps.append(parts[1])
        return Prediction(torch.cat(x0), torch.cat(eps))


def same(index, shape):
    """Noise that all images share."""
    source = torch.Generator().manual_seed(index)
    return torch.randn((1, *shape[1:]), generator=source, dtype=F64).expand(shape)


@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_with_every_target_is_that_of_the_exact_denoiser(path):
    schedule = PATHS[path]
    times = make_times(schedule, 3, "trailing")
    for name in NAMES:
        options = {"rtol": 1e-2, "atol": 1e-2} if name == "Dopri5" else {}
        sampler = make_sampler(name, **options)
        found = run(sampler(Regressed(schedule), schedule, X * schedule.prior_std, times, noise=same))
        for row, target in enumerate(TARGETS, 1):
            torch.testing.assert_close(found[row], found[0], rtol=1e-5, atol=1e-7, msg=f"{name} on {path}, {target}")


@pytest.mark.parametrize("path", PATHS)
def test_every_likelihood_with_every_target_is_that_of_the_exact_denoiser(path):
    schedule = PATHS[path]
    found = log_likelihood(Regressed(schedule), schedule, X, make_times(schedule, 1, "trailing")).log_density
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[1:], found[:1].expand(len(TARGETS)), rtol=1e-5, atol=1e-5)


def test_adaptive_likelihoods_reach_both_ends():
    schedule = FlowSchedule()
    exact = torch.distributions.Normal(MEAN, VAR.sqrt()).log_prob(X).flatten(1).sum(1)
    tolerance = {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    found = log_likelihood(Regressed(schedule), schedule, X, torch.tensor([1.0, 0.0]), **tolerance)
    torch.testing.assert_close(found.log_density, exact, rtol=0, atol=0.2)


def test_parts_that_do_not_follow_take_their_limits():
    x, output = X, X + 7
    one, zero = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    x0, eps = Target("x0").solve(output, x, 0.5 * one, zero)
    assert torch.equal(x0, 2 * x) and not bool(eps.any())
    x0, eps = Target("eps").solve(output, x, zero, 2 * one)
    assert torch.equal(eps, x / 2) and not bool(x0.any())
    for name in ("eps", "v", "velocity"):  # what follows is the network's
        assert torch.equal(Target(name).solve(output, x, one, zero)[0], x)
    assert torch.equal(Target("x0").solve(output, x, zero, one)[0], output)
    assert torch.equal(Target("velocity").solve(output, x, zero, one)[0], x - output)
    # Images at an end beside others of one batch.
    x, output = X[:2], X[:2] + 7
    alpha = torch.tensor([0.0, 0.6], dtype=F64).reshape(2, 1, 1, 1)
    found = Target("eps").solve(output, x, alpha, (1 - alpha**2).sqrt())
    torch.testing.assert_close(found[0][1], (x[1] - 0.8 * output[1]) / 0.6)
    assert all(bool(part.isfinite().all()) for part in found)


@pytest.mark.parametrize("solver", [heun, heun_in_time], ids=["Heun", "Heun-time"])
def test_heun_asks_a_flow_at_clean_data(solver):
    """Ten steps to N(0.7, 0.3^2), as heun2 of the solver in the other direction of time: an error below 5e-3."""
    schedule, mean, var = FlowSchedule(), torch.full((1, 2, 2), 0.7), torch.full((1, 2, 2), 0.09)
    denoiser = GaussianDenoiser(schedule, mean.double(), var.double())
    x = torch.randn(3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = run(solver(denoiser, schedule, x, make_times(schedule, 10)))
    assert (found - denoiser.flow(x, 1.0, 0.0)).abs().max() < 5e-3
    other = ODESolver(to_flow_matching(denoiser, schedule)).sample(x, step_size=0.1, method="heun2")
    torch.testing.assert_close(found, other, rtol=0, atol=1e-9)


def test_plms_of_one_step_is_heun_on_a_flow():
    schedule = FlowSchedule()
    denoiser, times = GaussianDenoiser(schedule, MEAN, VAR), torch.tensor([1.0, 0.0], dtype=F64)
    torch.testing.assert_close(*(run(solver(denoiser, schedule, X, times)) for solver in (plms, heun)))


def test_a_denoiser_that_does_not_know_clean_data_is_a_velocity_model_there():
    schedule = EDMSchedule()
    velocity = to_flow_matching(Regressed(schedule), schedule)
    exact = to_flow_matching(GaussianDenoiser(schedule, MEAN, VAR), schedule)
    torch.testing.assert_close(velocity(X, torch.tensor(1.0)), exact(X, torch.tensor(1.0)))
