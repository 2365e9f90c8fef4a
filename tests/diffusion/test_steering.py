"""Steering against closed forms: linear members, finite differences, and the ends of its strength."""

import pytest
import torch

from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import NetworkDenoiser, Prediction, Target
from ldm.diffusion.steering import SteeredDenoiser, spread_times
from ldm.diffusion.transition import ddim
from ldm.ensembles.members import MemberNetwork, Members
from ldm.pipelines.steering import edges_of, fixed_direction, members_apart
from ldm.util import generator

SCHEDULE = CosineSchedule()
U = 0.4


class LinearNetwork(torch.nn.Module):
    """Output = weight x, elements as one vector, in float64; nothing depends on time or class."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.randn(16, 16, generator=generator("weight"), dtype=torch.float64))

    def forward(self, x, t, cond):
        return (x.flatten(1) @ self.weight.T).reshape(x.shape)


@pytest.fixture(scope="module")
def case():
    """A linear network that regresses x_0, three members, and states."""
    network = LinearNetwork()
    spread = 0.1 * torch.randn(3, 16, 16, generator=generator("spread"), dtype=torch.float64)
    weights = network.weight.detach() + spread
    members = NetworkDenoiser(MemberNetwork(network, Members({"weight": weights})), SCHEDULE, Target("x0"))
    x = torch.randn(2, 1, 4, 4, generator=generator("x"), dtype=torch.float64)
    return NetworkDenoiser(network, SCHEDULE, Target("x0")), members, weights, x


def test_disagreement_of_linear_members_has_the_gradient_of_a_quadratic_form(case):
    """J = x^T S x / D with S the sample covariance of the weights' rows, so grad J = 2 S x / D."""
    denoiser, members, weights, x = case
    apart = weights - weights.mean(0)
    gram = torch.einsum("mij,mik->jk", apart, apart) / 2
    flat = x.flatten(1)
    measure = members_apart(members)
    torch.testing.assert_close(measure(x, U), torch.einsum("bj,jk,bk->b", flat, gram, flat) / 16)
    slope = flat @ gram
    expected = (slope / slope.norm(dim=1, keepdim=True)).reshape(x.shape)
    with torch.no_grad():  # as sampling runs
        found = SteeredDenoiser(denoiser, SCHEDULE, measure, 0.2).direction(x, U)
    torch.testing.assert_close(found, expected)


def test_the_turn_has_its_stated_length_and_keeps_the_state(case):
    denoiser, members, _, x = case
    plain = denoiser(x, U)
    steered = SteeredDenoiser(denoiser, SCHEDULE, members_apart(members), 0.2)(x, U)
    turned = (steered.eps - plain.eps).flatten(1).norm(dim=1)
    torch.testing.assert_close(turned, 0.2 * plain.eps.flatten(1).norm(dim=1))
    alpha, sigma = SCHEDULE.coefficients(U, x)
    torch.testing.assert_close(alpha * steered.x0 + sigma * steered.eps, x)
    none = SteeredDenoiser(denoiser, SCHEDULE, members_apart(members), 0.0)(x, U)
    torch.testing.assert_close(none.eps, plain.eps)


@pytest.mark.parametrize("kind", ["disagreement", "edges", "random"])
def test_directions_are_slopes_by_finite_differences(case, kind):
    denoiser, members, _, x = case
    measure = {
        "disagreement": members_apart(members),
        "edges": edges_of(denoiser),
        "random": fixed_direction([4, 9], 0),
    }[kind]
    found = SteeredDenoiser(denoiser, SCHEDULE, measure, 0.1).direction(x, U)
    slope = torch.zeros_like(x)
    for place in range(16):
        step = torch.zeros(16, dtype=x.dtype)
        step[place] = 1e-5
        step = step.reshape(1, 1, 4, 4)
        change = (measure(x + step, U) - measure(x - step, U)) / 2e-5
        slope.view(2, 16)[:, place] = change
    slope = slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


def test_samples_end_where_the_members_agree_more(case):
    denoiser, members, _, x = case
    times = torch.linspace(0.9, 0.0, 11, dtype=torch.float64)
    measure = members_apart(members)
    ends = []
    for strength in (-0.3, 0.0, 0.3):
        *_, last = ddim(SteeredDenoiser(denoiser, SCHEDULE, measure, strength), SCHEDULE, x, times)
        ends.append(measure(last.x_next, 0.05))
    assert (ends[0] > ends[1]).all() and (ends[1] > ends[2]).all()


def test_nothing_changes_without_data_or_without_a_gradient(case):
    denoiser, _, _, x = case
    flat = SteeredDenoiser(denoiser, SCHEDULE, lambda state, u: 0 * state.flatten(1).sum(1), 0.5)
    torch.testing.assert_close(flat(x, U).eps, denoiser(x, U).eps)

    def pure(state, u):
        return Prediction(torch.zeros_like(state), state)

    from ldm.diffusion.schedule import FlowSchedule

    steered = SteeredDenoiser(pure, FlowSchedule(), lambda state, u: state.flatten(1).square().sum(1), 0.5)
    torch.testing.assert_close(steered(x, 1.0).eps, x)


def test_times_are_quantiles_of_the_density():
    times = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(spread_times(times, torch.ones(4)), times)
    torch.testing.assert_close(spread_times(times, torch.tensor([5.0, 1.0, 9.0, 2.0]), 0.0), times)
    # masses 3, 1, 1, 1: equal shares are 1.5 each
    found = spread_times(times, torch.tensor([3.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([4.0, 3.5, 3.0, 1.5, 0.0], dtype=torch.float64))
    squared = spread_times(times, torch.tensor([3.0, 1.0, 1.0, 1.0]).sqrt(), 2.0)
    torch.testing.assert_close(squared, found)
    with pytest.raises(ValueError, match="a density above 0 for each of 4 steps"):
        spread_times(times, torch.tensor([1.0, 0.0, 1.0, 1.0]))
