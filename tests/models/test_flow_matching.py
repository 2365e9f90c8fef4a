"""The adapters for flow_matching's and diffusers' users: signs, times, grids, and closed forms through them."""

import math

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target
from ldm.diffusion.flow_matching import (
    ODESolver,
    diffusers_network,
    from_flow_matching,
    shifted_times,
    to_flow_matching,
)
from ldm.diffusion.samplers import make_sampler, make_times, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule
from ldm.experiments.toy import GaussianDenoiser

F64 = torch.float64
MEAN = torch.linspace(-1, 1, 6, dtype=F64).reshape(1, 2, 3)
VAR = torch.tensor([0.05, 0.1, 0.3, 0.5, 1.5, 3.0], dtype=F64).reshape(1, 2, 3)
X = torch.randn(2, 1, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
EXACT = GaussianDenoiser(FlowSchedule(), MEAN, VAR)


def velocity(x, t, shift=0.0):
    """E[x_1 - x_0 | x_t] for data N(MEAN, VAR), x_t = t x_1 + (1 - t) x_0, t = 0 at noise [B] or a number."""
    t = t.double().reshape(-1, 1, 1, 1)
    residual = (x - t * MEAN) / (t**2 * VAR + (1 - t) ** 2)
    return MEAN + t * VAR * residual - (1 - t) * residual + shift


def test_a_velocity_model_is_a_denoiser_and_the_way_back():
    denoiser = from_flow_matching(velocity)
    for u in (0.9, 0.25):
        for name in ("x0", "eps"):
            found = getattr(denoiser(X, u), name)
            torch.testing.assert_close(found, getattr(EXACT(X, u), name), rtol=1e-6, atol=1e-6)
        back = to_flow_matching(denoiser, FlowSchedule())
        torch.testing.assert_close(back(X, torch.tensor(1 - u)), velocity(X, torch.tensor(1 - u)), rtol=1e-6, atol=1e-6)


def test_any_denoiser_is_a_velocity_model_of_the_straight_path():
    schedule = LinearVPSchedule()
    model = to_flow_matching(GaussianDenoiser(schedule, MEAN, VAR), schedule)
    for t in (0.2, 0.7):
        torch.testing.assert_close(model(X, torch.full((2,), t)), velocity(X, torch.tensor(t)), rtol=1e-6, atol=1e-6)


def test_a_path_that_ends_before_pure_noise_is_a_velocity_model_from_its_end():
    schedule = EDMSchedule()
    model = to_flow_matching(GaussianDenoiser(schedule, MEAN, VAR), schedule)
    torch.testing.assert_close(model(X, torch.tensor(0.0)), velocity(X, torch.tensor(0.0)), rtol=0, atol=0.1)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "rk4", "dopri5"])
def test_the_solver_is_the_sampler_in_the_other_direction_of_time(method):
    names = {"euler": "Euler", "midpoint": "Midpoint", "heun2": "Heun", "rk4": "RK4", "dopri5": "Dopri5"}
    solver = ODESolver(velocity)
    found = solver.sample(X, step_size=0.1, method=method)
    plain = run(
        make_sampler(names[method])(from_flow_matching(velocity), FlowSchedule(), X, make_times(FlowSchedule(), 10))
    )
    # Tolerances of dopri5; the sampler's rk4 is the classical rule, the solver's the 3/8 rule.
    accuracy = {"dopri5": 3e-4, "rk4": 3e-4}.get(method, 1e-5)
    torch.testing.assert_close(found, plain, rtol=0, atol=accuracy)
    exact = EXACT.flow(X, 1.0, 0.0)
    fine = solver.sample(X, step_size=0.01, method=method)
    torch.testing.assert_close(fine, exact, rtol=0, atol=0.1 if method == "euler" else 5e-3)


def test_grids_intermediates_and_extras():
    solver, times = ODESolver(velocity), torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    schedule = solver.sample(X, 0.01, "rk4", time_grid=times, return_intermediates=True)
    assert schedule.shape == (3, *X.shape) and torch.equal(schedule[0], X)
    torch.testing.assert_close(schedule[1], EXACT.flow(X, 1.0, 0.7), rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule[2], EXACT.flow(X, 1.0, 0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(solver.sample(schedule[2], 0.01, "rk4", time_grid=times.flip(0)), X, rtol=0, atol=1e-5)
    one = solver.sample(X, shift=0.5)
    torch.testing.assert_close(one, X + velocity(X, torch.tensor(0.0)) + 0.5)
    with pytest.raises(TypeError):
        solver.sample(X, time_steps=3)
    state = X.clone().requires_grad_()
    assert solver.sample(state, enable_grad=True).requires_grad and not solver.sample(state).requires_grad


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("step_size", [0.3, 0.25, 0.07, None])
def test_fixed_steps_are_torchdiffeqs(method, step_size):
    """Its rules by their names, its short last step, and its straight lines between steps, in both directions."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    solver = ODESolver(velocity)
    for times in (torch.tensor([0.0, 0.31, 0.8, 1.0], dtype=F64), torch.tensor([0.9, 0.5, 0.1], dtype=F64)):
        options = {} if step_size is None else {"step_size": step_size}
        theirs = odeint(lambda t, x: velocity(x, t), X, times, method=method, options=options)
        ours = solver.sample(X, step_size, method, time_grid=times, return_intermediates=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # times reach models in the state's precision
        assert torch.equal(solver.sample(X, step_size, method, time_grid=times), ours[-1])


def test_likelihoods():
    noise, found = ODESolver(velocity).compute_likelihood(X, step_size=0.05, method="rk4", exact_divergence=True)
    exact = torch.distributions.Normal(MEAN, VAR.sqrt()).log_prob(X).flatten(1).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(EXACT.flow(noise, 1.0, 0.0), X, rtol=0, atol=1e-3)
    source = torch.Generator().manual_seed(1)
    repeated = X[:1].expand(200, -1, -1, -1)
    # The Jacobian is diagonal: one probe of signs is exact.
    _, estimated = ODESolver(velocity).compute_likelihood(repeated, step_size=0.05, method="rk4", generator=source)
    torch.testing.assert_close(estimated, exact[:1].expand(200), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="pass generator="):
        ODESolver(velocity).compute_likelihood(X)


class Transformer:
    """As diffusers' models are called: output noise - data, timestep 1000 sigma."""

    def __call__(self, hidden_states, timestep, scale=1.0):
        sample = -velocity(hidden_states, 1 - timestep.double() / 1000)
        return (scale * sample,)


def test_a_diffusers_model_runs_reversed():
    network = diffusers_network(Transformer(), scale=1.0)
    denoiser = NetworkDenoiser(network, FlowSchedule(time_scale=1000.0), Target("velocity"))
    torch.testing.assert_close(denoiser(X, 0.4).x0, EXACT(X, 0.4).x0, rtol=1e-5, atol=1e-6)
    sample = run(make_sampler("RK4")(denoiser, FlowSchedule(), X, shifted_times(30)))
    torch.testing.assert_close(sample, EXACT.flow(X, 1.0, 0.0), rtol=0, atol=1e-3)


def test_shifted_grids_are_those_of_the_published_formula():
    times = shifted_times(4, shift=3.0)
    even = torch.linspace(1, 3e-3 / 1.002, 4, dtype=F64)
    torch.testing.assert_close(times, torch.cat([3 * even / (1 + 2 * even), torch.zeros(1, dtype=F64)]))
    assert shifted_times(1).tolist() == [1, 0]
    torch.testing.assert_close(shifted_times(3, 1.0)[:3], torch.linspace(1, 1e-3, 3, dtype=F64))


def test_errors():
    solver = ODESolver(velocity)
    for times in ([0.0], [0.0, 0.5, 0.2], [0.0, 1.5]):
        with pytest.raises(ValueError, match="time"):
            solver.sample(X, time_grid=times)
    with pytest.raises(ValueError, match="step_size above 0"):
        solver.sample(X, step_size=0.0)
    with pytest.raises(ValueError, match="method must be one of"):
        solver.sample(X, method="rk45")
    with pytest.raises(ValueError, match="steps >= 1 and shift > 0"):
        shifted_times(0)
    assert math.isclose(float(shifted_times(2)[1]), 3 * (3e-3 / 1.002) / (1 + 2 * (3e-3 / 1.002)))
