"""Samplers on exact Gaussians: orders of convergence, moments, evaluations, branching, options."""

from __future__ import annotations

import inspect
import itertools
import math
from functools import partial
from typing import get_args

import pytest
import torch

from ldm.diffusion.denoiser import MappedDenoiser, Prediction
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.ode.own_time import heun_in_time
from ldm.diffusion.samplers import SAMPLERS, ancestral, ddim, heun, make_sampler, make_times, run
from ldm.diffusion.samplers.registry import sampler_options
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser, MixtureDenoiser
from ldm.settings import SamplerName, Sampling
from ldm.settings.names import ADAPTIVE, SECOND_NAMES, SecondName

F64 = torch.float64
SHAPE = (1, 2, 3)
MEAN = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=F64).reshape(SHAPE)
VAR = torch.tensor([0.05, 0.1, 0.3, 0.5, 1.5, 3.0], dtype=F64).reshape(SHAPE)
VP = VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))
SMOOTH, EDM, FLOW = LinearVPSchedule(), EDMSchedule(), FlowSchedule()
# EDM's own grid is uniform in sigma^(1/7).
GRIDS = {
    "vp": (SMOOTH, lambda steps: torch.linspace(0.9, 0.2, steps + 1, dtype=F64)),
    "edm": (EDM, lambda steps: torch.linspace(20 ** (1 / 7), 0.1 ** (1 / 7), steps + 1, dtype=F64) ** 7),
    "flow": (FLOW, lambda steps: torch.linspace(1.0, 0.1, steps + 1, dtype=F64)),
    "flow to data": (FLOW, lambda steps: make_times(FLOW, steps)),
}
NAMES = get_args(SamplerName)
ORDERS = {"DDIM": 1, "Euler": 1, "Heun": 2, "Midpoint": 2, "DPM-Solver++": 2, "PLMS": 2, "RK4": 4}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Counting:
    """A denoiser that remembers the times it was asked at."""

    def __init__(self, denoiser):
        self.denoiser, self.times = denoiser, []

    def __call__(self, x, u):
        self.times.append(float(u))
        return self.denoiser(x, u)


def error(name, schedule, times):
    denoiser, x = GaussianDenoiser(schedule, MEAN, VAR), draw(2, *SHAPE) * schedule.sigma(float(times[0])).to(F64)
    exact = denoiser.flow(x, float(times[0]), float(times[-1]))
    return (run(SAMPLERS[name](denoiser, schedule, x, times)) - exact).abs().max().item()


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, case):
    """Twice the steps divide the error by 2^order; the answer is the flow in closed form."""
    schedule, times = GRIDS[case]
    steps = 16 if name == "RK4" else 64
    errors = [error(name, schedule, times(count)) for count in (steps, 2 * steps)]
    order = math.log2(errors[0] / errors[1])
    # On a Gaussian the midpoint's error of second order cancels; on equal steps PLMS is better than on others. A flow
    # begins at log(alpha / sigma) = -infinity, where DPM-Solver++ has no order.
    lower = 1.5 if name == "DPM-Solver++" and schedule is FLOW else ORDERS[name] - 0.25
    assert lower < order < (3.4 if name in ("PLMS", "Midpoint") else ORDERS[name] + 0.4), (order, errors)


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_on_a_mixture(name):
    """The same where the flow is not affine; the answer is RK4 with many steps."""
    schedule, times = GRIDS["vp"]
    denoiser = MixtureDenoiser(schedule, torch.stack([MEAN * 0 - 1, MEAN * 0 + 0.5, MEAN * 0.5 + 1]), VAR)
    x = draw(2, *SHAPE)
    exact = run(SAMPLERS["RK4"](denoiser, schedule, x, times(128)))
    steps = 16 if name == "RK4" else 32
    errors = [
        (run(SAMPLERS[name](denoiser, schedule, x, times(count))) - exact).abs().max() for count in (steps, 2 * steps)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[name]) < 0.2, errors


@pytest.mark.parametrize("name", ORDERS)
def test_moments_of_deterministic_samples(name):
    """Steps are affine, so the images of 0 and 1 carry mean and variance of all samples."""
    times = make_times(VP, 200)
    denoiser = GaussianDenoiser(VP, MEAN, VAR)
    ends = run(SAMPLERS[name](denoiser, VP, torch.stack([MEAN * 0, MEAN * 0 + 1]), times))
    # 2M suffers most from the last steps of LDM's times, which are long in log(alpha / sigma).
    accuracy = {"DDIM": 0.05, "Euler": 0.05, "DPM-Solver++": 0.015}.get(name, 5e-3)
    flow = denoiser.flow(torch.stack([MEAN * 0, MEAN * 0 + 1]), 1000.0, 1.0)
    torch.testing.assert_close(ends, flow, rtol=0, atol=accuracy)
    # x_T is not quite N(0, 1): alpha_T = 0.012 of the mean is left.
    torch.testing.assert_close(ends[0], VP.alpha(1.0) * MEAN, rtol=0, atol=accuracy + 0.05)
    var = VP.alpha(1.0) ** 2 * VAR + VP.sigma(1.0) ** 2
    torch.testing.assert_close((ends[1] - ends[0]) ** 2, var, rtol=3 * accuracy, atol=0)


def affine_moments(sampler, denoiser, schedule, times):
    """Mean and variance after each step, from N(0, sigma^2): x_s = A x + b + sqrt(w) z."""
    mean, var = MEAN * 0, MEAN * 0 + schedule.prior_std**2
    noise = lambda index, shape: torch.zeros(shape, dtype=F64)  # noqa: E731
    for index in range(len(times) - 1):
        ends = torch.stack([MEAN * 0, MEAN * 0 + 1])
        step = next(sampler(denoiser, schedule, ends, times, start=index, noise=noise))
        slope = step.x_next[1] - step.x_next[0]
        mean, var = step.x_next[0] + slope * mean, slope**2 * var + step.transition.w
    return mean, var


STOCHASTIC = {
    "ddim eta 1": lambda *args, **more: ddim(*args, eta=1.0, **more),
    "ddim eta 0.5": lambda *args, **more: ddim(*args, eta=0.5, **more),
    "fixed_small": ancestral,
    "fixed_large": lambda *args, **more: ancestral(*args, variance="fixed_large", **more),
}


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_moments_of_stochastic_samples(name, schedule):
    mean, var = affine_moments(
        STOCHASTIC[name], GaussianDenoiser(schedule, MEAN, VAR), schedule, make_times(schedule, 1000)
    )
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
    # First order in the steps, which on LDM's table are coarse beside the smallest variance.
    torch.testing.assert_close(var, VAR, rtol=0.1 if schedule is VP else 0.03, atol=0)


@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
@pytest.mark.parametrize("name", ["ddim eta 1", "ddim eta 0.5", "fixed_small"])
def test_a_known_point_is_reached_exactly_at_any_eta(name, schedule):
    """With x_0 known, every marginal is q(x_s | x_0) whatever the steps (Song et al. 2021, lemma 1)."""
    times = torch.tensor([1.0, 0.7, 0.2, 0.05], dtype=F64) * schedule.end
    start, variance = float(schedule.sigma(schedule.end) ** 2), None
    point = MixtureDenoiser(schedule, MEAN[None])
    mean, variance = schedule.alpha(schedule.end) * MEAN, MEAN * 0 + start
    for index, s in enumerate(times[1:].tolist()):
        ends = torch.stack([MEAN * 0, MEAN * 0 + 1])
        quiet = lambda index, shape: torch.zeros(shape, dtype=F64)  # noqa: E731
        step = next(STOCHASTIC[name](point, schedule, ends, times, start=index, noise=quiet))
        slope = step.x_next[1] - step.x_next[0]
        mean, variance = step.x_next[0] + slope * mean, slope**2 * variance + step.transition.w
        torch.testing.assert_close(mean, schedule.alpha(s) * MEAN)
        torch.testing.assert_close(variance, (MEAN * 0 + 1) * schedule.sigma(s) ** 2)


def test_ancestral_is_ddim_at_eta_1_also_when_clipped():
    denoiser = MappedDenoiser(GaussianDenoiser(VP, MEAN, VAR), VP, lambda x0: x0.clamp(-0.3, 0.3))
    times, x, noise = make_times(VP, "20"), draw(2, *SHAPE), ImageNoise(1, (0, 1))
    one = run(ddim(denoiser, VP, x, times, eta=1.0, noise=noise))
    torch.testing.assert_close(run(ancestral(denoiser, VP, x, times, noise=noise)), one, rtol=0, atol=1e-12)


EVALUATIONS = {"DDIM": 10, "Euler": 10, "DPM-Solver++": 10, "PLMS": 11, "Heun": 19, "Midpoint": 20, "RK4": 38}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_number_of_evaluations(name):
    for schedule in (VP, EDM):
        denoiser = Counting(GaussianDenoiser(schedule, MEAN, VAR))
        steps = list(SAMPLERS[name](denoiser, schedule, draw(2, *SHAPE), make_times(schedule, 10, "trailing")))
        assert len(steps) == 10 and len(denoiser.times) == EVALUATIONS[name] and min(denoiser.times) > 0
        assert [step.index for step in steps] == list(range(10))


@pytest.mark.slow
def test_any_number_of_steps_reaches_data():
    for name, count in [*itertools.product(ORDERS, (1, 2, 3, 7)), ("DPM-Solver++", 999), ("PLMS", 1000)]:
        times = make_times(VP, count, "trailing")
        steps = SAMPLERS[name](GaussianDenoiser(VP, MEAN, VAR), VP, draw(1, *SHAPE), times)
        states = [step.x_next for step in steps]
        assert len(states) == count and bool(states[-1].isfinite().all())


@pytest.mark.parametrize("name", ORDERS)
def test_steps_are_line_2_of_what_they_report(name):
    denoiser, times = GaussianDenoiser(VP, MEAN, VAR), make_times(VP, 8, "trailing")
    x = draw(2, *SHAPE)
    for step in SAMPLERS[name](denoiser, VP, x, times):
        torch.testing.assert_close(VP.noised(step.x0, step.eps, step.u), step.x)
        torch.testing.assert_close(VP.noised(step.x0, step.eps, step.transition.s), step.x_next)
        assert torch.equal(step.x, x)
        x = step.x_next


@pytest.mark.parametrize("name", NAMES)
def test_a_branch_starts_with_empty_history(name):
    denoiser, times = GaussianDenoiser(VP, MEAN, VAR), make_times(VP, 8, "trailing")
    sampler = partial(make_sampler(name), noise=ImageNoise(1, (0, 1)))
    steps = list(sampler(denoiser, VP, draw(2, *SHAPE), times))
    branched = list(sampler(denoiser, VP, steps[4].x_next, times, start=5))
    assert [step.index for step in branched] == [5, 6, 7]
    first_order = next(ddim(denoiser, VP, steps[4].x_next, times, start=5))
    if name in ("DPM-Solver++", "LMS"):
        torch.testing.assert_close(branched[0].x_next, first_order.x_next, rtol=0, atol=1e-12)
    elif name in ("DPM-Solver++2M-SDE", "DPM-Solver++3M-SDE"):
        noisy = next(ddim(denoiser, VP, steps[4].x_next, times, eta=1.0, noise=ImageNoise(1, (0, 1)), start=5))
        torch.testing.assert_close(branched[0].x_next, noisy.x_next, rtol=0, atol=1e-12)
    elif name in ADAPTIVE:  # its first step has a size of its own
        torch.testing.assert_close(branched[-1].x_next, steps[-1].x_next, rtol=0, atol=2e-3)
    elif name != "PLMS":
        assert torch.equal(branched[-1].x_next, steps[-1].x_next)
    with pytest.raises(ValueError, match="not among the"):
        run(sampler(denoiser, VP, steps[4].x_next, times, start=8))


@pytest.mark.parametrize("name", NAMES)
def test_a_caller_may_send_another_state(name):
    denoiser, times = GaussianDenoiser(VP, MEAN, VAR), make_times(VP, 4, "trailing")
    steps = make_sampler(name)(denoiser, VP, draw(2, *SHAPE), times, noise=ImageNoise(1, (0, 1)))
    next(steps)
    other = draw(2, *SHAPE, seed=5)
    assert torch.equal(steps.send(other).x, other)


@pytest.mark.parametrize("name", NAMES)
def test_members_are_walked_together(name):
    """Two members [M, B, ...] from one state agree with two separate walks."""
    alone = [GaussianDenoiser(VP, MEAN, VAR), GaussianDenoiser(VP, MEAN + 1, 2 * VAR)]

    def members(x, u):
        parts = [one(x[index] if x.ndim == 5 else x, u) for index, one in enumerate(alone)]
        return Prediction(torch.stack([part.x0 for part in parts]), torch.stack([part.eps for part in parts]))

    times, x = make_times(VP, 6, "trailing"), draw(2, *SHAPE)
    zero = lambda index, shape: torch.zeros(shape, dtype=F64)  # noqa: E731
    sampler = partial(make_sampler(name), noise=zero)
    together = run(sampler(members, VP, x, times))
    # Adaptive steps are those of the first member: the others agree within the tolerance.
    accuracy = {"Dopri5": 1e-4, "DPM-Solver-adaptive": 0.05}.get(name, 1e-12)
    for index, one in enumerate(alone):
        torch.testing.assert_close(together[index], run(sampler(one, VP, x, times)), rtol=0, atol=accuracy)


def test_no_churn_at_pure_noise():
    flow, times = FlowSchedule(), torch.tensor([1.0, 0.0], dtype=F64)
    x = torch.randn(2, *MEAN.shape, dtype=F64, generator=torch.Generator().manual_seed(4))
    for method in (heun, heun_in_time):
        plain = run(method(GaussianDenoiser(flow, MEAN, VAR), flow, x, times))
        torch.testing.assert_close(run(method(GaussianDenoiser(flow, MEAN, VAR), flow, x, times, S_churn=2.0)), plain)


def test_heun_on_a_vp_path_is_edms_heun_in_scaled_variables():
    """The same data, x / alpha and sigma / alpha: one trajectory."""
    vp_times = torch.tensor([900.0, 500.0, 200.0, 20.0, 0.0], dtype=F64)
    x = draw(2, *SHAPE)
    vp = run(heun(GaussianDenoiser(VP, MEAN, VAR), VP, x, vp_times))
    edm = run(heun(GaussianDenoiser(EDM, MEAN, VAR), EDM, x / VP.alpha(900.0), VP.ratio(vp_times)))
    torch.testing.assert_close(vp, edm)


def test_options_that_a_sampler_lacks_are_errors():
    for name in NAMES:
        assert not {"noise", "start"} & set(sampler_options(name))
        with pytest.raises(TypeError):
            SAMPLERS[name](None, VP, None, None, colour=3)
        make_sampler(name, eta=None, temperature=None)
        with pytest.raises(TypeError):
            make_sampler(name)(None, VP, None, None, eta=0.0)
    for name in ("PLMS", "LMS", "DPM-Solver++", "DPM-Solver-3", "Euler", "Midpoint", "RK4", "Dopri5"):
        make_sampler(name, eta=0.0, temperature=1.0)
        assert name == "Euler" or "noise" not in inspect.signature(SAMPLERS[name]).parameters
        with pytest.raises(ValueError, match=f"sampler {name.replace('+', '.')} has no eta"):
            make_sampler(name, eta=0.5)
    with pytest.raises(ValueError, match="DDPM has no eta; its options: variance, temperature, mean_shift"):
        make_sampler("DDPM", eta=0.0)
    with pytest.raises(ValueError, match=r"sampler must be one of .* did you mean 'DDIM'\?"):
        make_sampler("ddim")
    with pytest.raises(ValueError, match=r"sampler Heun has no s_chrn; .* did you mean 'S_churn'\?"):
        make_sampler("Heun", s_chrn=4)
    with pytest.raises(ValueError, match="S_churn of sampler Heun takes a number, got 'much'"):
        make_sampler("Heun", S_churn="much")
    with pytest.raises(ValueError, match="pass noise="):
        run(make_sampler("DDIM", eta=1.0)(GaussianDenoiser(VP, MEAN, VAR), VP, draw(1, *SHAPE), make_times(VP, 5)))


def test_grids_that_do_not_descend_are_refused():
    with pytest.raises(ValueError, match="must descend"):
        run(ddim(GaussianDenoiser(VP, MEAN, VAR), VP, draw(1, *SHAPE), torch.tensor([1.0, 5.0])))


def test_every_sampler_has_a_name_that_the_command_line_takes():
    assert set(NAMES) | set(get_args(SecondName)) == set(SAMPLERS)
    assert set(get_args(SecondName)) == set(SECOND_NAMES)
    for second, name in SECOND_NAMES.items():
        assert SAMPLERS[second] is SAMPLERS[name] and Sampling(sampler=second).sampler == name
