"""Runge-Kutta tableaux by their order conditions, adaptive steps by closed forms."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.ode.tableau import TABLEAUX, Integrator, tableau
from ldm.diffusion.samplers import dopri5, dpm_adaptive, make_times, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule
from ldm.experiments.toy import GaussianDenoiser
from tests.models.test_sampler import MEAN, VAR, Counting, draw

F64 = torch.float64
FLOW = FlowSchedule()


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_conditions(name):
    """Sums over the tableau that an order needs, up to 4 (Hairer et al. 1993, II.2, table 2.2)."""
    it = TABLEAUX[name]
    stages = len(it.b)
    a = torch.zeros(stages, stages, dtype=F64)
    for row, values in enumerate(it.a):
        a[row, : len(values)] = torch.tensor(values, dtype=F64)
    b, c = torch.tensor(it.b, dtype=F64), torch.tensor(it.nodes, dtype=F64)
    embedded = None if it.error is None else b - torch.tensor(it.error, dtype=F64)
    for weights, order in ((b, it.order), (embedded, 4)) if embedded is not None else ((b, it.order),):
        conditions = {1: [(weights.sum(), 1)], 2: [(weights @ c, 1 / 2)]}
        conditions[3] = [(weights @ c**2, 1 / 3), (weights @ a @ c, 1 / 6)]
        conditions[4] = [(weights @ c**3, 1 / 4), (weights @ (c * (a @ c)), 1 / 8)]
        conditions[4] += [(weights @ a @ c**2, 1 / 12), (weights @ a @ a @ c, 1 / 24)]
        for up_to in range(1, min(order, 4) + 1):
            for found, value in conditions[up_to]:
                assert float(found) == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("name", TABLEAUX)
def test_orders_of_convergence_backwards_too(name):
    """y' = y cos(tau) from 2 to 0: y = exp(sin tau - sin 2)."""
    errors = []
    for steps in (20, 40):
        walk = Integrator(lambda y, tau: (y * math.cos(tau), None), TABLEAUX[name], rtol=math.inf, width=2.0 / steps)
        y, times = torch.ones(1, 1, 1, 1, dtype=F64), torch.linspace(2, 0, steps + 1).tolist()
        for start, stop in itertools.pairwise(times):
            walk.width = 2.0 / steps
            y = walk.across(y, start, stop)[0]
        errors.append(abs(float(y) - math.exp(-math.sin(2))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(TABLEAUX[name].order, abs=0.3)


def test_integrals_beside_the_state():
    """The integral of cos over [0, 2], and of y' = -y: exact answers, within the tolerance."""
    rate = lambda y, tau: (-y, math.cos(tau) * torch.ones(2, dtype=F64))  # noqa: E731
    walk = Integrator(rate, TABLEAUX["dopri5"], 1e-8, 1e-8)
    y, gained = walk.across(torch.ones(2, 1, 1, 1, dtype=F64), 0.0, 2.0)
    torch.testing.assert_close(y.flatten(), torch.full((2,), math.exp(-2), dtype=F64), rtol=1e-7, atol=0)
    torch.testing.assert_close(gained, torch.full((2,), math.sin(2), dtype=F64), rtol=1e-7, atol=0)


def test_adaptive_samples_reach_the_closed_form_within_the_tolerance():
    x, errors, asked = draw(2, *MEAN.shape), [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        denoiser = Counting(GaussianDenoiser(FLOW, MEAN, VAR))
        found = run(dopri5(denoiser, FLOW, x, torch.tensor([1.0, 0.0]), rtol=tolerance, atol=tolerance))
        errors.append(float((found - denoiser.denoiser.flow(x, 1.0, 0.0)).abs().max()))
        asked.append(len(denoiser.times))
    assert errors[0] < 1e-2 and errors[1] < 1e-4 and errors[2] < 1e-6 and asked[0] < asked[1] < asked[2] < 400


def test_times_of_the_grid_only_report():
    x, denoiser = draw(2, *MEAN.shape), GaussianDenoiser(FLOW, MEAN, VAR)
    steps = list(dopri5(denoiser, FLOW, x, torch.tensor([1.0, 0.7, 0.2, 0.0]), rtol=1e-8, atol=1e-8))
    for step, s in zip(steps, (0.7, 0.2, 0.0), strict=True):
        torch.testing.assert_close(step.x_next, denoiser.flow(x, 1.0, s), rtol=0, atol=1e-6)
        torch.testing.assert_close(FLOW.noised(step.x0, step.eps, step.u), step.x)
    schedule = LinearVPSchedule()
    vp = run(
        dopri5(GaussianDenoiser(schedule, MEAN, VAR), schedule, x, torch.tensor([1.0, 0.3, 0.02]), rtol=1e-7, atol=1e-7)
    )
    torch.testing.assert_close(vp, GaussianDenoiser(schedule, MEAN, VAR).flow(x, 1.0, 0.02), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [LinearVPSchedule(), EDMSchedule(), FLOW], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_reaches_the_closed_form_within_the_tolerance(schedule, order):
    """From the highest level to the lowest; steps from pure noise and to clean data have an error of their own."""
    times = make_times(schedule, 1, "logsnr", sigma_min=0.05, sigma_max=40.0)
    x, errors, asked = draw(2, *MEAN.shape) * float(schedule.sigma(times[0])), [], []
    for tolerance in (1e-2, 1e-4, 1e-5):
        denoiser = Counting(GaussianDenoiser(schedule, MEAN, VAR))
        found = run(dpm_adaptive(denoiser, schedule, x, times, order=order, rtol=tolerance, atol=tolerance))
        errors.append(float((found - denoiser.denoiser.flow(x, float(times[0]), float(times[-1]))).abs().max()))
        asked.append(len(denoiser.times))
    assert errors[0] < 0.1 and errors[1] < 1e-3 and errors[2] < 1e-4 and asked[0] < asked[1] < asked[2]


@pytest.mark.parametrize("schedule", [LinearVPSchedule(), EDMSchedule(), FLOW], ids=["vp", "edm", "flow"])
def test_dpm_adaptive_reports_at_the_times_and_reaches_both_ends(schedule):
    x, denoiser = draw(2, *MEAN.shape) * schedule.prior_std, GaussianDenoiser(schedule, MEAN, VAR)
    times = torch.tensor([1.0, 0.7, 0.02, 0.0], dtype=F64) * schedule.end
    steps = list(dpm_adaptive(denoiser, schedule, x, times, rtol=1e-4, atol=1e-4))
    state = x
    for step, s in zip(steps, times[1:].tolist(), strict=True):
        # The steps at the ends are of first order: from a flow's pure noise, and to clean data.
        torch.testing.assert_close(step.x_next, denoiser.flow(x, float(times[0]), s), rtol=0, atol=2e-3)
        torch.testing.assert_close(schedule.noised(step.x0, step.eps, step.u), step.x, rtol=0, atol=1e-9)
        assert torch.equal(step.x, state)
        state = step.x_next
    with pytest.raises(ValueError, match="must be 2 or 3, got 1"):
        run(dpm_adaptive(denoiser, schedule, x, times, order=1))
    with pytest.raises(ValueError, match=r"adaptive steps did not lead from .* is the state finite"):
        run(dpm_adaptive(lambda x, u: Prediction(x * math.nan, x * math.nan), schedule, x, times))


@pytest.mark.parametrize("solver", [dopri5, dpm_adaptive])
def test_step_sizes_look_at_the_first_member_only(solver):
    """A second member on which the solver would need many more steps does not change where it asks."""
    easy, hard = GaussianDenoiser(FLOW, MEAN, VAR), GaussianDenoiser(FLOW, MEAN, 1e-6 * VAR)
    alone = Counting(easy)

    def both(x, u):
        parts = [one(x[index] if x.ndim == 5 else x, u) for index, one in enumerate((easy, hard))]
        return Prediction(torch.stack([part.x0 for part in parts]), torch.stack([part.eps for part in parts]))

    together, times = Counting(both), torch.tensor([1.0, 0.1])
    x = draw(2, *MEAN.shape)
    image = run(solver(alone, FLOW, x, times))
    assert torch.equal(run(solver(together, FLOW, x, times))[0], image) and together.times == alone.times
    assert len(Counting(hard).times) == 0


def test_what_cannot_be_solved_is_an_error():
    explodes = Integrator(lambda y, tau: (y**2, None), TABLEAUX["dopri5"], most=60)
    with pytest.raises(ValueError, match="60 adaptive steps did not lead from 0 to 2"):
        explodes.across(torch.ones(1, 1, 1, 1, dtype=F64), 0.0, 2.0)
    with pytest.raises(ValueError, match="method must be one of"):
        tableau("rk45")
