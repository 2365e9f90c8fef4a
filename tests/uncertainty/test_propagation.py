"""Propagated variances against matrix algebra on a linear network, finite differences and sampled weights."""

import pytest
import torch
from torch import nn

from ldm.diffusion.denoiser import NetworkDenoiser, Target, guided
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import make_sampler, make_times, run
from ldm.diffusion.schedule import FlowSchedule, VPSchedule, make_betas
from ldm.ensembles.members import Members
from ldm.laplace import LastLayerLaplace, Observation
from ldm.uncertainty.propagation import all_directions, sampled, tangents
from tests.conftest import tiny_model


class Smooth(nn.Module):
    """x [B, 1, 3, 4] -> [B, 1, 3, 4], curved in x; linear with `bend=False`."""

    def __init__(self, bend=True):
        super().__init__()
        self.first, self.bend, self.labels = nn.Conv2d(1, 2, 3, padding=1), bend, nn.Embedding(3, 2)
        self.out = nn.Sequential(nn.Tanh() if bend else nn.Identity(), nn.Conv2d(2, 1, 3, padding=1))

    def backbone(self, x, t, cond):
        return self.first(x) + 0.2 * self.labels(cond)[:, :, None, None]

    def forward(self, x, t, cond):
        return self.out(self.backbone(x, t, cond))


PATHS = {"flow": (FlowSchedule(), "velocity"), "vp": (VPSchedule(make_betas("linear", 1000)), "eps")}
X = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LABELS = torch.tensor([0, 1])


def posterior(bend=True, precision=2.0, local=False):
    """A network and its posterior; `local` sees no neighbours, so that its Jacobian is diagonal."""
    network, source = Smooth(bend).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
        if local:
            for layer in (network.first, network.out[1]):
                layer.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        laplace = LastLayerLaplace(network, prior_precision=precision)
        laplace.fit([Observation(X, torch.ones(2).double(), LABELS, network(X, None, LABELS))])
    return network, laplace


def setting(name, network, scale=1.0):
    schedule, target = PATHS[name]

    def build(net):
        return guided(NetworkDenoiser(net, schedule, Target(target), LABELS), torch.full_like(LABELS, 2), scale)

    return build, schedule, make_times(schedule, 4)


SAMPLERS = ["DDIM", "DDPM", "PLMS", "DPM-Solver++", "DPM-Solver-3", "DPM-Solver++SDE", "LMS", "Heun", "RK4"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tangents_are_derivatives_and_the_image_is_the_plain_samplers(sampler, name):
    """Central differences in the weights, for every sampler and schedule; guidance included."""
    network, laplace = posterior()
    build, schedule, times = setting(name, network, scale=2.0)
    members = laplace.sample(2, torch.Generator().manual_seed(3))
    noise, step = ImageNoise(7, [0, 1]), 1e-5
    solver = make_sampler(sampler)
    found = tangents(solver, build, network, members, schedule, X, times, noise=noise)
    assert torch.equal(found.image, run(solver(build(network), schedule, X, times, noise=noise)))
    own = network.state_dict()
    for k in range(2):
        ends = []
        for sign in (1, -1):
            moved = {key: own[key] + sign * step * (value[k] - own[key]) for key, value in members.overrides.items()}
            ends.append(sampled(solver, build, network, Members.stack([moved] * 2), schedule, X, times, noise=noise))
        difference = (ends[0].members[0] - ends[1].members[0]) / (2 * step)
        torch.testing.assert_close(found.members[k], difference, rtol=1e-6, atol=1e-8)
        assert torch.equal(ends[0].image, found.image)
    torch.testing.assert_close(found.var, found.members.square().mean(0))


def test_exact_tangents_of_one_step_are_matrix_algebra():
    """From u = 1 to 0 a flow takes one step x - f(x, W): variance a^T S a, the predictive variance itself."""
    network, laplace = posterior()
    build, schedule, _ = setting("flow", network)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = tangents(make_sampler("Euler"), build, network, all_directions(laplace), schedule, X, times, chunk=4)
    torch.testing.assert_close(found.var, laplace(X, torch.ones(2), LABELS)[1], rtol=1e-10, atol=0)


def test_exact_tangents_of_a_linear_network_are_matrix_algebra():
    """x' = x - h f(x): sensitivities S' = (I - h J) S - h a^T, with J and a from dense matrices of the network."""
    network, laplace = posterior(bend=False)
    build, schedule, times = setting("flow", network)
    found = tangents(make_sampler("Euler"), build, network, all_directions(laplace), schedule, X, times)
    covariance = laplace.covariance().root[0] @ laplace.covariance().root[0].T
    for b in range(2):
        x, sensitivity = X[b : b + 1], torch.zeros(12, laplace.layer.width).double()
        label = LABELS[b : b + 1]
        with torch.no_grad():
            units = torch.eye(12).double().reshape(12, 1, 3, 4)
            origin = network(torch.zeros_like(x), None, label)
            matrix = (network(units, None, label.expand(12)) - origin).flatten(1).T
            for width in (times[:-1] - times[1:]).tolist():
                patches = laplace.layer.patches(laplace.features(x, None, label))[0]
                sensitivity = sensitivity - width * (matrix @ sensitivity + patches)
                x = x - width * network(x, None, label)
        expected = torch.einsum("pk,kl,pl->p", sensitivity, covariance, sensitivity)
        torch.testing.assert_close(found.var[b].flatten(), expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.image[b : b + 1], x)


def test_small_variances_of_sampled_weights_are_those_of_tangents():
    """The same draws: sampled minus plain is the tangent to first order, so variances agree like 1 / precision."""
    errors = []
    for precision in (1e4, 1e6):
        network, laplace = posterior(precision=precision)
        build, schedule, times = setting("vp", network)
        members = laplace.sample(8, torch.Generator().manual_seed(3), antithetic=True)
        arguments = (make_sampler("DDIM"), build, network, members, schedule, X, times)
        drawn, first = sampled(*arguments), tangents(*arguments)
        centred = (drawn.members - drawn.image).square().mean(0)
        errors.append(float(((centred - first.var) / first.var).abs().max()))
    assert errors[0] < 0.05 and errors[1] < errors[0] / 30
    torch.testing.assert_close(drawn.var, drawn.members.var(0))


def test_no_variance_is_the_plain_sampler():
    network, _ = posterior()
    build, schedule, times = setting("vp", network)
    state = {name: value for name, value in network.state_dict().items() if name.startswith("out.1")}
    members = Members.stack([state] * 3)
    solver, noise = make_sampler("DDIM", eta=1.0), ImageNoise(2, [4, 5])
    plain = run(solver(build(network), schedule, X, times, noise=noise))
    for method in (sampled, tangents):
        found = method(solver, build, network, members, schedule, X, times, noise=noise)
        assert torch.equal(found.image, plain)
        assert float(found.var.max()) < 1e-28


def test_a_guided_latent_diffusion_model_carries_tangents():
    """Attention, norms and embeddings have the derivatives: central differences on a whole model, in chunks."""
    model = tiny_model().double()
    network, schedule, times = model.network, model.schedule, model.sampling_times(2)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    own = network.state_dict()
    source, step = torch.Generator().manual_seed(6), 1e-5
    names = [name for name in own if name.startswith("model.diffusion_model.out.2")]
    changes = [{name: torch.randn(own[name].shape, generator=source).double() for name in names} for _ in range(2)]

    def build(net):
        return model.denoiser(torch.tensor([3]), 2.0, net)

    members = Members.stack([{name: own[name] + change[name] for name in names} for change in changes])
    found = tangents(make_sampler("DDIM"), build, network, members, schedule, x, times, chunk=1)
    assert torch.equal(found.image, run(make_sampler("DDIM")(build(network), schedule, x, times)))
    pair = [{name: own[name] + sign * step * changes[0][name] for name in names} for sign in (1, -1)]
    ends = sampled(make_sampler("DDIM"), build, network, Members.stack(pair), schedule, x, times).members
    torch.testing.assert_close(found.members[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)
