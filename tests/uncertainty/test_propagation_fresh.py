"""The recursion with weights drawn anew: affine maps by matrix algebra, limits, and the published defects."""

from dataclasses import replace

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target
from ldm.diffusion.epsilon_scaling import EpsilonScaling, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import make_sampler, run
from ldm.diffusion.schedule import FlowSchedule
from ldm.laplace import LastLayerLaplace, Observation
from ldm.uncertainty.propagation import PredictiveDenoiser, bayesdiff, beginning, trajectory_integral
from tests.uncertainty.test_propagation import LABELS, PATHS, Smooth, X, posterior, setting


def parts(name="flow", bend=False, scale=1.0, local=False):
    network, laplace = posterior(bend, local=local)
    build, schedule, times = setting(name, network, scale)
    null = torch.full_like(LABELS, 2)
    denoiser = PredictiveDenoiser(laplace, schedule, Target(PATHS[name][1]), LABELS, null, scale)
    return network, laplace, build, schedule, times, denoiser


def walk(steps, denoiser, seed=0, **options):
    return list(bayesdiff(steps, denoiser, source=torch.Generator().manual_seed(seed), **options))


def dense(network, laplace, schedule, times):
    """V' = diag((I - h J) diag(V) (I - h J)^T) + h^2 gamma^2(x), J from the network's answers to unit images."""
    variances = []
    for b in range(2):
        label, x, var = LABELS[b : b + 1], X[b : b + 1], torch.zeros(12).double()
        units = torch.eye(12).double().reshape(12, 1, 3, 4)
        with torch.no_grad():
            origin = network(torch.zeros_like(x), None, label)
            matrix = (network(units, None, label.expand(12)) - origin).flatten(1).T
            for width in (times[:-1] - times[1:]).tolist():
                step = torch.eye(12).double() - width * matrix
                gamma = laplace(x, torch.ones(1), label)[1].flatten()
                gamma = gamma + extra_gamma(laplace, x, var, label)
                var = step.square() @ var + width**2 * gamma
                x = x - width * network(x, None, label)
        variances.append(var.reshape(1, 3, 4))
    return torch.stack(variances)


def extra_gamma(laplace, x, var, label):
    """E gamma^2 - gamma^2(mean) for independent x: features are linear, so it is sum_j var_j |root^T d a / d x_j|^2."""
    units = torch.eye(12).double().reshape(12, 1, 3, 4)
    zero = laplace.layer.patches(laplace.features(torch.zeros_like(x), None, label))
    moved = laplace.layer.patches(laplace.features(units, None, label.expand(12))) - zero
    return var @ (moved @ laplace.covariance().root[0]).square().sum(-1)


def test_total_variance_of_a_linear_network_is_matrix_algebra():
    network, laplace, build, schedule, times, denoiser = parts()
    steps = make_sampler("Euler")(build(network), schedule, X, times)
    found = walk(steps, denoiser, particles=2000)
    with torch.no_grad():
        expected = dense(network, laplace, schedule, times)
    # 1000 pairs: relative standard error of a variance sqrt(2 / 1000) = 0.045 a step.
    torch.testing.assert_close(found[-1].var, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(found[0].var, (times[0] - times[1]) ** 2 * laplace(X, torch.ones(2), LABELS)[1])


@pytest.mark.parametrize("form", ["total", "published"])
@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
def test_images_are_the_plain_samplers(sampler, form):
    network, _, build, schedule, times, denoiser = parts("vp", bend=True, scale=3.0)
    noise, solver = ImageNoise(3, [0, 1]), make_sampler(sampler)
    found = walk(solver(build(network), schedule, X, times, noise=noise), denoiser, form=form)
    assert torch.equal(found[-1].step.x_next, run(solver(build(network), schedule, X, times, noise=noise)))
    assert len(found) == len(times) - 1
    if form == "total":
        assert all(bool((each.var > 0).all()) for each in found)


def test_slopes_are_those_of_the_samplers_step():
    network, _, build, schedule, times, denoiser = parts("vp", scale=2.0)
    step = next(make_sampler("DDIM")(build(network), schedule, X, times))
    a, b = denoiser.slopes(step.transition, step.x)
    mean, _ = denoiser.law(X, step.u)
    torch.testing.assert_close(a * X + b * mean, step.x_next, rtol=1e-9, atol=1e-9)


def test_held_slopes_keep_the_contraction_that_the_published_skip_drops():
    """A diagonal Jacobian j: V' = (1 - h j)^2 V + h^2 gamma^2 at every step; published, V stays where it was."""
    network, laplace, build, schedule, _, denoiser = parts(local=True)
    times = torch.linspace(1, 0, 9, dtype=torch.float64)

    def variances(**options):
        steps = make_sampler("Euler")(build(network), schedule, X, times)
        return walk(steps, denoiser, particles=800, every=1000, **options)

    gain = network(torch.ones_like(X), None, LABELS) - network(torch.zeros_like(X), None, LABELS)
    x, var = X, torch.zeros_like(X)
    for _ in range(8):
        mean, gamma = laplace(x, torch.ones(2), LABELS)
        x, var = x - mean / 8, (1 - gain.detach() / 8) ** 2 * var + gamma / 64
    # One step of 400 pairs, relative standard error 0.07 of its share; the spread of x widens gamma^2 a little there.
    torch.testing.assert_close(variances()[-1].var, var, rtol=0.15, atol=0)
    assert bool((variances()[-1].var / variances(form="published")[-1].var - 1).abs().min() > 0.15)
    published = variances(form="published")
    torch.testing.assert_close(published[-1].var, published[1].var)
    torch.testing.assert_close(published[0].var, laplace(X, torch.ones(2), LABELS)[1] / 64)


def begin_of(sampler, schedule, times):
    return beginning(make_sampler(sampler), schedule, times)


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
def test_a_first_order_step_begun_anew_is_the_affine_one(sampler):
    network, _, build, schedule, times, denoiser = parts("vp", bend=True, scale=2.0)
    noise, solver = ImageNoise(3, [0, 1]), make_sampler(sampler)
    found = [
        walk(solver(build(network), schedule, X, times, noise=noise), denoiser, begin=begin)[-1].var
        for begin in (None, begin_of(sampler, schedule, times))
    ]
    torch.testing.assert_close(*found, rtol=1e-8, atol=0)


def test_heuns_step_of_a_linear_network_is_matrix_algebra():
    """V' = diag(M diag(V) M^T) + h^2 / 4 (gamma_1^2 + gamma_2^2), M column by column from steps of unit images."""
    network, laplace, build, schedule, times, denoiser = parts()
    solver = make_sampler("Heun")
    steps = list(solver(build(network), schedule, X, times[:3]))
    found = walk(iter(steps), denoiser, particles=4000, begin=beginning(solver, schedule, times[:3]))
    width, b = 0.25, 0
    label = LABELS[b : b + 1]
    flat = NetworkDenoiser(network, schedule, Target("velocity"), label.expand(13))
    units = torch.cat([torch.zeros(1, 12), torch.eye(12)]).double().reshape(13, 1, 3, 4)
    moved = next(solver(flat, schedule, units, times, start=1)).x_next.detach().flatten(1)
    matrix = (moved[1:] - moved[0]).T
    x, var = steps[1].x[b : b + 1], found[0].var[b].flatten()
    with torch.no_grad():
        ends = [x, x - width * network(x, None, label)]
        slope = (network(units, None, label.expand(13)).flatten(1)[1:] - network(0 * x, None, label).flatten(1)).T
    gamma = laplace(ends[0], torch.ones(1), label)[1].flatten() + extra_gamma(laplace, x, var, label)
    spread = (torch.eye(12).double() - width * slope).square() @ var
    gamma = gamma + laplace(ends[1], torch.ones(1), label)[1].flatten() + extra_gamma(laplace, x, spread, label)
    expected = matrix.square() @ var + width**2 / 4 * gamma
    # 2000 pairs, relative standard error 0.03 a value
    torch.testing.assert_close(found[1].var[b].flatten(), expected, rtol=0.12, atol=0)
    first = sum(laplace(each, torch.ones(2), LABELS)[1] for each in (X, X - width * network(X, None, LABELS)))
    torch.testing.assert_close(found[0].var, width**2 / 4 * first.detach())


@pytest.mark.parametrize("sampler", ["Heun", "Midpoint", "RK4", "PLMS", "DPM-Solver++"])
def test_other_samplers_begin_anew_or_are_refused(sampler):
    network, _, build, schedule, times, denoiser = parts("vp", bend=True)
    solver = make_sampler(sampler)
    found = walk(
        solver(build(network), schedule, X, times), denoiser, begin=beginning(solver, schedule, times), every=2
    )
    assert torch.equal(found[-1].step.x_next, run(solver(build(network), schedule, X, times)))
    assert all(bool((each.var > 0).all()) for each in found)
    for form in ("total", "published"):
        with pytest.raises(ValueError, match="not first order"):
            walk(solver(build(network), schedule, X, times), denoiser, form=form)
    with pytest.raises(ValueError, match="first-order steps only"):
        walk(
            solver(build(network), schedule, X, times),
            denoiser,
            form="published",
            begin=beginning(solver, schedule, times),
        )


def test_chunks_change_nothing():
    network, _, build, schedule, times, denoiser = parts("vp", bend=True, scale=2.0)
    found = [
        walk(make_sampler("DDIM")(build(network), schedule, X, times), replace(denoiser, chunk=chunk))[-1].var
        for chunk in (None, 3)
    ]
    torch.testing.assert_close(*found)


def test_path_integral_sums_the_variance_along_the_walk():
    network, laplace, build, schedule, times, denoiser = parts(bend=True)
    steps = list(make_sampler("Euler")(build(network), schedule, X, times))
    expected = sum((step.u - step.transition.s) * laplace(step.x, torch.ones(2), LABELS)[1] for step in steps)
    torch.testing.assert_close(
        trajectory_integral(make_sampler("Euler")(denoiser, schedule, X, times), denoiser), expected
    )
    assert len(denoiser.visited) == len(steps)
    with pytest.raises(ValueError, match="already been run"):
        trajectory_integral(iter([]), denoiser)


def test_errors_say_what_is_wrong():
    denoiser = parts()[-1]
    wrong = (("even number", {"particles": 3}), ("a form", {"form": "other"}), ("every step", {"every": 0}))
    for sentence, options in wrong:
        with pytest.raises(ValueError, match=sentence):
            walk(iter([]), denoiser, **options)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_epsilon_scaling_divides_the_noise_and_its_variance(name):
    """Against the wrapper that samplers use: its x_0 and eps, and the variance of a posterior's eps over lambda^2."""
    network, _, build, schedule, times, denoiser = parts(name, bend=True, scale=2.0)
    wrapper = scaled(build(network), schedule, EpsilonScaling(1.2, 0.01), times)
    corrected = replace(denoiser, factor=wrapper.factor, visited=[])
    u = float(times[len(times) // 2])
    found, expected = corrected(X, u), wrapper(X, u)
    torch.testing.assert_close(found.x0, expected.x0)
    torch.testing.assert_close(found.eps, expected.eps)
    _, gamma = denoiser.law(X, u)
    zero, one = torch.zeros_like(X), torch.ones_like(X)
    slope = denoiser.target.solve(one, zero, *schedule.per_image(u))[1]  # of eps with the output
    (_, variance) = corrected.visited[-1]
    torch.testing.assert_close(slope**2 * variance, wrapper.eps_variance(slope**2 * gamma, u))
    walked = walk(make_sampler("DDIM")(wrapper, schedule, X, times), corrected)
    assert torch.equal(walked[-1].step.x_next, run(make_sampler("DDIM")(wrapper, schedule, X, times)))
    in_data = scaled(build(network), schedule, EpsilonScaling(1.2, direction="x0_only"), times)
    with pytest.raises(ValueError, match="changes x0 alone"):
        walk(make_sampler("DDIM")(in_data, schedule, X, times), replace(corrected, factor=in_data.factor))


class Tinted(Smooth):
    """The network under a condition of pictures [B, 1, 3, 4]."""

    def backbone(self, x, t, cond):
        return self.first(x + 0.5 * cond)


def test_states_of_an_image_have_the_condition_of_that_image():
    """A condition of several dimensions, pictures for example, goes with its image, whatever the number of states."""
    network = Tinted().double()
    pictures = 0.3 * X.flip(0)
    laplace = LastLayerLaplace(network, prior_precision=2.0)
    laplace.fit([Observation(X, torch.ones(2).double(), pictures, network(X, None, pictures).detach())])
    schedule, target = FlowSchedule(), Target("velocity")
    states = torch.stack([X, 2 * X, X - 1])  # [N, B, C, H, W]
    mean, variance = PredictiveDenoiser(laplace, schedule, target, pictures).states(states, 0.4)
    for image in range(2):
        alone = PredictiveDenoiser(laplace, schedule, target, pictures[image : image + 1])
        wanted = alone.states(states[:, image : image + 1], 0.4)
        torch.testing.assert_close((mean[:, image : image + 1], variance[:, image : image + 1]), wanted)
    torch.testing.assert_close(mean[0], network(X, None, pictures).detach())
