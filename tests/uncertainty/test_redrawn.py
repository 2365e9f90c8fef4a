"""New weights at every evaluation: matrix algebra on a linear network, seeds, and the recursion that stands for it."""

from functools import partial

import pytest
import torch

from ldm.diffusion.affine import CosineSchedule, PolynomialSchedule
from ldm.diffusion.denoiser import Target
from ldm.diffusion.derivative import balanced_signs
from ldm.diffusion.samplers import make_sampler, run
from ldm.diffusion.schedule import FlowSchedule
from ldm.experiments.toy import GaussianDenoiser
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.propagation import (
    PredictiveDenoiser,
    bayesdiff,
    beginning,
    redrawn_steps,
    trajectory_integral,
)
from tests.uncertainty.test_propagation import LABELS, X, setting
from tests.uncertainty.test_propagation_fresh import parts


def walk(count, sampler="Euler", name="flow", bend=False, seed=0, **options):
    network, laplace = parts(name, bend)[:2]
    build, schedule, times = setting(name, network)
    draw = partial(laplace.sample, count, torch.Generator().manual_seed(seed))
    return list(redrawn_steps(make_sampler(sampler), build, network, draw, schedule, X, times, **options))


def covariances(network, laplace, times):
    """C' = (I - h J) C (I - h J)^T + h^2 A S A^T of image 0, with J and the patches A from dense matrices; E over x of
    A S A^T by its curvature, A being linear in x, is left out: small where the variance of x is."""
    x, label, covariance = X[:1], LABELS[:1], torch.zeros(12, 12).double()
    units, root = torch.eye(12).double().reshape(12, 1, 3, 4), laplace.covariance().root[0]
    with torch.no_grad():
        origin = network(torch.zeros_like(x), None, label)
        matrix = (network(units, None, label.expand(12)) - origin).flatten(1).T
        for width in (times[:-1] - times[1:]).tolist():
            step = torch.eye(12).double() - width * matrix
            noise = laplace.layer.patches(laplace.features(x, None, label))[0] @ root
            covariance = step @ covariance @ step.T + width**2 * noise @ noise.T
            x = x - width * network(x, None, label)
    return covariance


def test_the_process_of_a_linear_network_is_matrix_algebra():
    """With covariances between pixels, which the recursion does not keep."""
    network, laplace, _, _, times, _ = parts()
    laplace.prior_precision = 400.0
    build, schedule, _ = setting("flow", network)
    draw = partial(laplace.sample, 1000, torch.Generator().manual_seed(0))
    *_, found = redrawn_steps(make_sampler("Euler"), build, network, draw, schedule, X, times)
    expected = covariances(network, laplace, times).diagonal()
    torch.testing.assert_close(found.var[0].flatten(), expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM", "Heun", "PLMS", "DPM-Solver++", "DPM-Solver++SDE"])
def test_images_are_the_plain_samplers_and_seeds_decide(sampler):
    def zero(index, shape):
        return torch.zeros(shape, dtype=torch.float64)

    found = [walk(3, sampler, "vp", True, seed, noise=zero)[-1] for seed in (0, 0, 1)]
    network, _, build, schedule, times, _ = parts("vp", True)
    assert torch.equal(found[0].step.x_next, run(make_sampler(sampler)(build(network), schedule, X, times, noise=zero)))
    assert torch.equal(found[0].var, found[1].var) and not torch.equal(found[0].var, found[2].var)
    torch.testing.assert_close(found[0].var, found[0].members.var(0))


def test_every_evaluation_draws_anew():
    """One step from pure noise to data: Heun's two fields have independent errors, so less variance than Euler's."""
    network, laplace, *_ = parts()
    calls = []

    def draw():
        calls.append(1)
        return laplace.sample(2, torch.Generator().manual_seed(len(calls)))

    build, schedule, times = setting("flow", network)
    list(redrawn_steps(make_sampler("Heun"), build, network, draw, schedule, X, times))
    assert len(calls) == 2 * (len(times) - 1)


def test_balanced_signs_are_orthogonal_between_near_elements():
    drawn = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = balanced_signs(drawn, 24)  # blocks of 16: every pixel of a 4 x 4 tile has a row of its own
    assert signs.shape == (24, 2, 1, 4, 4) and bool((signs.abs() == 1).all())
    flat = signs[:16, 0].flatten(1)
    torch.testing.assert_close(flat.T @ flat / 16, torch.eye(16, dtype=torch.float64))
    few = balanced_signs(drawn[:1, :, :, :, :], 4)[:, 0, 0]  # rows by the lowest bits of row and column
    inner = torch.einsum("kij,kij->ij", few[:, :, :-1], few[:, :, 1:])
    assert not bool(inner.any()) and not bool(torch.einsum("kij,kij->ij", few[:, :-1], few[:, 1:]).any())
    assert bool((balanced_signs(drawn[:1], 1).abs() == 1).all())


def test_squared_slopes_from_balanced_signs_are_unbiased():
    source = torch.Generator().manual_seed(1)
    matrix = torch.randn(24, 24, generator=source, dtype=torch.float64)
    signs = balanced_signs(torch.randn(2, 3000, 2, 3, 4, generator=source, dtype=torch.float64), 3)
    found = (signs.flatten(2) @ matrix.T).square().mean((0, 1))
    torch.testing.assert_close(found, matrix.square().sum(1), rtol=0.1, atol=0)


def test_two_seeds_of_the_recursion_agree():
    """Sixteen states, four steps: what is left to chance are the slopes between far pixels."""
    network, _, build, schedule, times, denoiser = parts("vp", True)
    solver, found = make_sampler("DDIM"), []
    for seed in (0, 1):
        source = torch.Generator().manual_seed(seed)
        *_, last = bayesdiff(solver(build(network), schedule, X, times), denoiser, particles=16, source=source)
        found.append(last.var)
    assert agreement(*found).error < 0.15


def test_the_recursion_leaves_out_what_an_evaluation_s_error_does_to_the_later_ones_of_its_step():
    """One step of Heun from a certain state, h wide on a flow, where a pixel's output f hangs on that pixel by J alone.

    x~ = x - h f_1(x) and x' = x - h / 2 (f_1(x) + f_2(x~)), so that an error of f_1 counts -h / 2 (1 - h J) in the
    process, and -h / 2 in the recursion. A narrow posterior leaves the first order.
    """
    network, laplace, build, schedule, times, denoiser = parts(local=True)
    network.first.weight.data *= 40  # slopes J of 0.8
    laplace.prior_precision = 4e4
    solver, width = make_sampler("Heun"), float(times[0] - times[1])
    with torch.no_grad():
        output = network(X, None, LABELS)
        slope = network(X + 1, None, LABELS) - output
        first, second = (laplace(x, torch.ones(2), LABELS)[1] for x in (X, X - width * output))
    steps = solver(build(network), schedule, X, times)
    given = {"particles": 2, "source": torch.Generator(), "begin": beginning(solver, schedule, times)}
    recursion = next(bayesdiff(steps, denoiser, **given)).var
    torch.testing.assert_close(recursion, (width / 2) ** 2 * (first + second))
    draw = partial(laplace.sample, 4000, torch.Generator().manual_seed(0))
    process = next(redrawn_steps(solver, build, network, draw, schedule, X, times)).var
    expected = (width / 2) ** 2 * ((1 - width * slope).square() * first + second)
    torch.testing.assert_close(process, expected, rtol=0.12, atol=0)  # 5 deviations of 4000 draws
    assert float((expected / recursion - 1).abs().max()) > 0.12


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule(), PolynomialSchedule(power=3.0)], ids=str)
def test_the_integral_along_a_trajectory_does_not_depend_on_how_a_flow_counts_time(schedule):
    """A variance of 1 of the velocity at every time, from pure noise to data: 1, in sigma / (alpha + sigma)."""
    times = schedule.time_at(FlowSchedule().ratio(torch.linspace(1, 0, 6, dtype=torch.float64)))
    laplace = parts()[1]
    denoiser = PredictiveDenoiser(laplace, schedule, Target("velocity"))
    exact = GaussianDenoiser(schedule, torch.zeros(1, 3, 4), torch.ones(1, 3, 4))

    def steps():
        for step in make_sampler("Euler")(exact, schedule, X, times):
            denoiser.visited.append((step.u, torch.ones_like(X)))
            yield step

    torch.testing.assert_close(trajectory_integral(steps(), denoiser), torch.ones_like(X))
