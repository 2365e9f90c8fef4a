"""Affine schedules and their velocities: rates by differences, exact fields, one trajectory for all of them."""

import pytest
import torch

from ldm.diffusion.affine import CosineSchedule, LinearAlphaSchedule, PolynomialSchedule
from ldm.diffusion.denoiser import NetworkDenoiser, Target, make_target
from ldm.diffusion.samplers import make_sampler, make_times, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, Schedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser

F64 = torch.float64
AFFINE = {
    "straight": FlowSchedule(),
    "cubic": PolynomialSchedule(power=3.0),
    "root": PolynomialSchedule(power=0.5),
    "cosine": CosineSchedule(),
    "linear alpha": LinearAlphaSchedule(),
}
TABLE = VPSchedule(make_betas("linear", 100))
PATHS = {**AFFINE, "linear vp": LinearVPSchedule(), "edm": EDMSchedule(), "table": TABLE}
MEAN = torch.linspace(-1, 1, 6, dtype=F64).reshape(1, 2, 3)
VAR = torch.tensor([0.05, 0.1, 0.3, 0.5, 1.5, 3.0], dtype=F64).reshape(1, 2, 3)


@pytest.mark.parametrize("name", PATHS)
def test_rates_are_differences(name):
    schedule = PATHS[name]
    u, step = (torch.tensor([0.123, 0.4567, 0.905], dtype=F64) * schedule.end), 1e-6 * schedule.end
    for rate, level in zip(schedule.rates(u), (schedule.alpha, schedule.sigma), strict=True):
        torch.testing.assert_close(rate, (level(u + step) - level(u - step)) / (2 * step), rtol=1e-7, atol=1e-9)


def test_rates_of_a_table_change_at_its_entries():
    left, right = TABLE.rates(49.9999999), TABLE.rates(50.0)
    assert left[0] != pytest.approx(float(right[0]), rel=1e-4)
    torch.testing.assert_close(TABLE.rates(49.5)[0], TABLE.alpha(49.5) * 0.5 * torch.log1p(-TABLE.betas[49]))


@pytest.mark.parametrize("name", AFFINE)
def test_paths_lead_from_data_to_noise_and_times_invert_ratios(name):
    schedule = AFFINE[name]
    ends = [float(value) for u in (0.0, 1.0) for value in (schedule.alpha(u), schedule.sigma(u))]
    assert ends == pytest.approx([1, 0, 0, 1], abs=1e-15)
    u = torch.linspace(0.01, 0.99, 57, dtype=F64)
    torch.testing.assert_close(schedule.time_at(schedule.ratio(u)), u, rtol=1e-9, atol=1e-12)
    assert schedule.time_at(0.0) == 0 and schedule.time_at(float("inf")) == 1


def test_network_times():
    assert FlowSchedule(reversed_time=True).time_to_net(0.25) == 0.75
    assert CosineSchedule(time_scale=1000.0).time_to_net(0.25) == 250
    assert PolynomialSchedule(reversed_time=True, time_scale=4.0).time_to_net(0.25) == 3


@pytest.mark.parametrize("name", ["straight", "cubic", "cosine", "linear alpha", "linear vp", "edm"])
def test_velocities_are_the_derivative_of_the_state_and_solve_for_both_parts(name):
    schedule = PATHS[name]
    target, source = make_target(schedule, "velocity"), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 1, 2, 3, dtype=F64, generator=source)
    u, step = 0.37 * schedule.end, 1e-6 * schedule.end
    levels = schedule.per_image(u)
    velocity = target.of(x0, eps, *levels)
    moved = (schedule.noised(x0, eps, u + step) - schedule.noised(x0, eps, u - step)) / (2 * step)
    torch.testing.assert_close(velocity, moved, rtol=1e-7, atol=1e-8)
    for found, true in zip(target.solve(velocity, schedule.noised(x0, eps, u), *levels), (x0, eps), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)


def test_velocity_of_the_straight_path_and_of_a_table_is_eps_minus_x0():
    for schedule in (FlowSchedule(), TABLE):
        assert make_target(schedule, "velocity") == Target("velocity")
    assert make_target(CosineSchedule(), "v", 0.3) == Target("v", 0.3)
    cosine = make_target(CosineSchedule(), "velocity").coefficients(*CosineSchedule().per_image(0.3))
    torch.testing.assert_close(cosine[0], torch.pi / 2 * CosineSchedule().alpha(0.3))


def exact_velocity(schedule: Schedule):
    """A network that regresses the velocity of N(MEAN, VAR) exactly, in the schedule's own time."""

    def network(x, t, cond):
        u = 1 - t[0].double() if schedule.reversed_time else t[0].double()
        prediction = GaussianDenoiser(schedule, MEAN, VAR)(x, u)
        return make_target(schedule, "velocity").of(prediction.x0, prediction.eps, *schedule.per_image(u))

    return network


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule(), FlowSchedule(reversed_time=True)], ids=str)
def test_a_network_of_velocities_flows_to_the_data(schedule):
    x = torch.randn(2, 1, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    denoiser = NetworkDenoiser(exact_velocity(schedule), schedule, make_target(schedule, "velocity"))
    exact = GaussianDenoiser(schedule, MEAN, VAR).flow(x, 1.0, 0.0)
    found = run(make_sampler("RK4")(denoiser, schedule, x, make_times(schedule, 40)))
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-6)  # times reach networks in float32


@pytest.mark.parametrize("name", ["Euler", "Midpoint", "Heun", "RK4", "Dopri5"])
def test_all_paths_are_one_trajectory(name):
    """Grids with the same sigma / alpha: from one noise every schedule comes to the same data, whatever the solver."""
    x = torch.randn(2, 1, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    times, ends = make_times(FlowSchedule(), 5), []
    for schedule in AFFINE.values():
        own = schedule.time_at(FlowSchedule().ratio(times))
        ends.append(run(make_sampler(name)(GaussianDenoiser(schedule, MEAN, VAR), schedule, x, own)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-7, atol=1e-7)


def test_where_velocities_say_nothing_of_the_data_the_prediction_is_its_limit():
    schedule = PolynomialSchedule(power=2.0)
    denoiser = NetworkDenoiser(lambda x, t, cond: torch.zeros_like(x), schedule, make_target(schedule, "velocity"))
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(denoiser(x, 1.0).eps, x) and not bool(denoiser(x, 1.0).x0.any())
    assert bool(denoiser(x, 0.99).x0.isfinite().all())


def test_errors_name_what_is_missing():
    class Bare(FlowSchedule):
        rates = Schedule.rates

    with pytest.raises(NotImplementedError, match="Bare defines no rates"):
        Bare().rates(0.5)
    with pytest.raises(ValueError, match="power must be above 0"):
        PolynomialSchedule(power=0.0)
