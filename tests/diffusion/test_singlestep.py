"""Solvers in log(alpha / sigma) and of the reverse stochastic equation on exact Gaussians: orders, moments, noise."""

import math

import pytest
import torch

from ldm.diffusion.noise import ImageNoise, index_between
from ldm.diffusion.samplers import make_sampler, make_times, run
from ldm.diffusion.samplers.sde import brownian_share, dpmpp_sde
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser

F64 = torch.float64
SHAPE = (1, 2, 3)
MEAN = torch.linspace(-1, 1, 6, dtype=F64).reshape(SHAPE)
VAR = torch.tensor([0.05, 0.1, 0.3, 0.5, 1.5, 3.0], dtype=F64).reshape(SHAPE)
SCHEDULES = {
    "vp": (LinearVPSchedule(), lambda steps: torch.linspace(0.9, 0.2, steps + 1, dtype=F64)),
    "edm": (EDMSchedule(), lambda steps: torch.linspace(20 ** (1 / 7), 0.1 ** (1 / 7), steps + 1, dtype=F64) ** 7),
    "flow": (FlowSchedule(), lambda steps: torch.linspace(0.95, 0.1, steps + 1, dtype=F64)),
}
# Sampler, options, order on smooth times. LMS and 3M begin with a step of order 1, which leaves order 2 at last.
ORDERS = {
    "second": ("DPM-Solver-2", {}, 2),
    "third": ("DPM-Solver-3", {}, 3),
    "ending low": ("DPM-Solver-fast", {}, 2),
    "2S": ("DPM-Solver++2S-ancestral", {"eta": 0.0}, 2),
    "ancestral without noise": ("DPM-2-ancestral", {"eta": 0.0}, 2),
    "SDE without noise": ("DPM-Solver++SDE", {"eta": 0.0}, 2),
    "2M": ("DPM-Solver++2M-SDE", {"eta": 0.0, "solver_type": "heun"}, 2),
    "3M": ("DPM-Solver++3M-SDE", {"eta": 0.0}, 2),
    "LMS": ("LMS", {}, 2),
}
NOISY = {
    "Euler-ancestral": ({}, 1),
    "DPM-2-ancestral": ({}, 2),
    "DPM-Solver++2S-ancestral": ({}, 2),
    "DPM-Solver++SDE": ({}, 2),
    "DPM-Solver++2M-SDE": ({}, 2),
    "DPM-Solver++3M-SDE": ({"eta": 0.5}, 2),
}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, case):
    """Twice the steps divide the error by 2^order at least; the answer is the flow in closed form."""
    (schedule, times), (sampler, options, order) = SCHEDULES[case], ORDERS[name]
    denoiser, errors = GaussianDenoiser(schedule, MEAN, VAR), []
    for steps in (32, 64):
        each = times(steps)
        x = draw(2, *SHAPE) * float(schedule.sigma(each[0]))
        exact = denoiser.flow(x, float(each[0]), float(each[-1]))
        errors.append(float((run(make_sampler(sampler, **options)(denoiser, schedule, x, each)) - exact).abs().max()))
    found = math.log2(errors[0] / errors[1])
    assert order - 0.25 < found < order + (2 if name == "LMS" else 0.6), (found, errors)


def moments(sampler, denoiser, schedule, times):
    """Mean and variance at the end of samples that begin with those of x at times[0], with no Monte Carlo.

    The end is linear in the beginning and in every draw: state 0 has no draw, state 1 begins at 1, and the others have
    one element of one draw.
    """
    steps = len(times) - 1
    keys = [*range(steps), *map(index_between, range(steps))]
    x = torch.zeros(2 + len(keys), *SHAPE, dtype=F64)
    x[1] = 1

    def noise(index, shape):
        return torch.zeros(shape, dtype=F64).index_fill_(0, torch.tensor([2 + keys.index(index)]), 1)

    end = run(sampler(denoiser, schedule, x, times, noise=noise))
    slope, shares = end[1] - end[0], end[2:] - end[0]
    u = float(times[0])
    mean = end[0] + slope * schedule.alpha(u) * MEAN
    return mean, slope**2 * (schedule.alpha(u) ** 2 * VAR + schedule.sigma(u) ** 2) + shares.square().sum(0)


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("name", NOISY)
def test_order_of_the_variance_of_samples(name, case):
    """The mean is exact on a Gaussian, and the error of the variance falls as the order says."""
    (schedule, times), (options, order) = SCHEDULES[case], NOISY[name]
    errors, denoiser = [], GaussianDenoiser(schedule, MEAN, VAR)
    for steps in (16, 32):
        mean, var = moments(make_sampler(name, **options), denoiser, schedule, times(steps))
        s = float(times(steps)[-1])
        expected = schedule.alpha(s) ** 2 * VAR + schedule.sigma(s) ** 2
        torch.testing.assert_close(mean, schedule.alpha(s) * MEAN, rtol=0, atol=1e-12)
        errors.append(float((var / expected - 1).abs().max()))
    assert order - 0.3 < math.log2(errors[0] / errors[1]) < order + 1, errors
    assert errors[1] < (0.2 if order == 1 else 0.04)


def test_independent_draws_would_make_the_sde_solver_first_order(monkeypatch):
    """The two draws of a step belong to one Brownian path; taken apart, the variance has an error of order 1."""
    schedule, times = SCHEDULES["edm"]
    errors = {}
    for kind, share in (("path", brownian_share), ("apart", lambda *where: 0.0)):
        monkeypatch.setattr("ldm.diffusion.samplers.sde.brownian_share", share)
        denoiser = GaussianDenoiser(schedule, MEAN, VAR)
        found = (moments(dpmpp_sde, denoiser, schedule, times(steps))[1] for steps in (16, 32))
        errors[kind] = [float((var / (VAR + 0.01) - 1).abs().max()) for var in found]
    assert errors["path"][0] / errors["path"][1] > 3.4 and errors["apart"][0] / errors["apart"][1] < 2
    assert errors["apart"][1] > 10 * errors["path"][1]


def test_draws_inside_a_step_are_a_brownian_bridge():
    """Var of both increments and their covariance are those of a path W(sigma / alpha), over many images."""
    schedule, u, s, seen = EDMSchedule(), 10.0, 2.0, []
    images = tuple(range(4000))

    def denoiser(x, u):
        seen.append(x)
        return GaussianDenoiser(schedule, MEAN[..., :1, :1], VAR[..., :1, :1])(x, u)

    x = torch.zeros(len(images), 1, 1, 1, dtype=F64)
    times = torch.tensor([u, s], dtype=F64)
    step = next(dpmpp_sde(denoiser, schedule, x, times, noise=ImageNoise(3, images)))
    middle = math.sqrt(u * s)
    inside, whole = (
        seen[1].flatten() - seen[1].mean(),
        step.x_next.flatten() - step.transition.mean(step.x0, step.eps).flatten(),
    )
    correlation = float((inside * whole).mean() / (inside.std() * whole.std()))
    expected = math.sqrt((u - middle) / (u - s))
    assert abs(correlation - expected) < 4 * (1 - expected**2) / len(images) ** 0.5
    assert abs(float(inside.var()) / (middle**2 * (1 - (middle / u) ** 2)) - 1) < 4 * (2 / len(images)) ** 0.5
    assert abs(float(whole.var()) / (s**2 * (1 - (s / u) ** 2)) - 1) < 4 * (2 / len(images)) ** 0.5


EVALUATIONS = {
    "DPM-Solver-2": (20, 19),
    "DPM-Solver-3": (30, 28),
    "DPM-Solver-fast": (27, 27),
    "DPM-Solver++2S-ancestral": (20, 19),
    "DPM-2-ancestral": (20, 19),
    "DPM-Solver++SDE": (20, 19),
    "DPM-Solver++2M-SDE": (10, 10),
    "DPM-Solver++3M-SDE": (10, 10),
    "Euler-ancestral": (10, 10),
    "LMS": (10, 10),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_number_of_evaluations(name):
    """Of ten steps that end at a little noise, and of ten that end at clean data; none evaluates at clean data."""
    schedule = VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))
    exact, x = GaussianDenoiser(schedule, MEAN, VAR), draw(2, *SHAPE)
    for spacing, expected in zip(("logsnr", "karras"), EVALUATIONS[name], strict=True):
        asked = []
        denoiser = lambda x, u: (asked.append(float(u)), exact(x, u))[1]  # noqa: B023, E731
        times = make_times(schedule, 10, spacing)
        steps = list(make_sampler(name)(denoiser, schedule, x, times, noise=ImageNoise(0, (0, 1))))
        assert len(steps) == 10 and len(asked) == expected and min(asked) >= 1 - 1e-9


@pytest.mark.parametrize("name", EVALUATIONS)
def test_steps_are_line_2_of_what_they_report(name):
    """On a flow from pure noise to clean data, where the first and the last step have no width in lambda."""
    schedule = FlowSchedule()
    denoiser, x, noise = GaussianDenoiser(schedule, MEAN, VAR), draw(2, *SHAPE), ImageNoise(2, (0, 1))
    for step in make_sampler(name)(denoiser, schedule, x, make_times(schedule, 6), noise=noise):
        torch.testing.assert_close(schedule.noised(step.x0, step.eps, step.u), step.x)
        w = step.transition.w
        drawn = noise(step.index, x.shape).double() if w > 0 else 0
        torch.testing.assert_close(step.transition.mean(step.x0, step.eps) + w.sqrt() * drawn, step.x_next)
        assert torch.equal(step.x, x) and bool(step.x_next.isfinite().all())
        x = step.x_next


def test_images_do_not_depend_on_the_batch():
    schedule = EDMSchedule()
    denoiser, times = GaussianDenoiser(schedule, MEAN, VAR), make_times(schedule, 5)
    x = draw(3, *SHAPE)
    sampler = make_sampler("DPM-Solver++SDE")
    together = run(sampler(denoiser, schedule, x, times, noise=ImageNoise(5, (7, 8, 9))))
    alone = run(sampler(denoiser, schedule, x[1:2], times, noise=ImageNoise(5, (8,))))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)


def test_heuns_eta_is_a_share_of_the_greatest_churn():
    """DDAE's gamma = eta (sqrt(2) - 1) inside the window is S_churn = eta (sqrt(2) - 1) S."""
    schedule = EDMSchedule()
    denoiser, times, noise = GaussianDenoiser(schedule, MEAN, VAR), make_times(schedule, 6), ImageNoise(1, (0, 1))
    window = {"S_min": 0.01, "S_max": 1.0, "S_noise": 1.007}
    x = 80 * draw(2, *SHAPE)
    by_eta = run(make_sampler("Heun", eta=0.3, **window)(denoiser, schedule, x, times, noise=noise))
    by_churn = make_sampler("Heun", S_churn=0.3 * (2**0.5 - 1) * 6, **window)
    torch.testing.assert_close(by_eta, run(by_churn(denoiser, schedule, x, times, noise=noise)))
    assert not torch.allclose(by_eta, run(make_sampler("Heun")(denoiser, schedule, x, times)))
    with pytest.raises(ValueError, match="give S_churn or eta"):
        next(make_sampler("Heun", S_churn=1.0, eta=0.5)(denoiser, schedule, x, times))
    with pytest.raises(ValueError, match="eta from 0 to 1"):
        next(make_sampler("Heun", eta=1.5)(denoiser, schedule, x, times))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LMS", {"order": 7}, "order must be a whole number from 1 to 6, got 7"),
        ("LMS", {"order": 2.5}, "order of sampler LMS takes a whole number, got 2.5"),
        ("DPM-Solver-fast", {"remainder": 3}, "0, 1 or 2, got 3"),
        ("DPM-Solver++SDE", {"r": 0.0}, "r is a fraction of the step"),
        ("DPM-Solver++2M-SDE", {"solver_type": "euler"}, "solver_type must be one of"),
        ("DPM-Solver++2M-SDE", {"solver_tpe": "heun"}, "did you mean 'solver_type'"),
        ("DPM-Solver-3", {"S_churn": 4.0}, "DPM-Solver-3 has no S_churn; its options: none"),
    ],
)
def test_options_that_do_not_fit(name, options, words):
    schedule = EDMSchedule()
    with pytest.raises(ValueError, match=words):
        next(
            make_sampler(name, **options)(
                GaussianDenoiser(schedule, MEAN, VAR), schedule, MEAN, make_times(schedule, 2)
            )
        )
