"""The small network and its trainings, many at once."""

import pytest
import torch
from torch.func import functional_call, stack_module_state

from ldm.experiments.small_networks import (
    SmallNetwork,
    SmallTraining,
    draw_masks,
    draw_noised,
    read_digits,
    unstack_networks,
)
from ldm.util import generator


@pytest.fixture(scope="module")
def digits():
    return read_digits("test")


def test_flat_and_square_states_are_one(digits):
    network = SmallNetwork().initialise(generator("one"))
    images, labels = digits
    rows = draw_noised(images[:3], labels[:3], generator("rows"))
    flat = network(rows.x, rows.t, rows.cond)
    square = network(rows.x.reshape(3, 1, 8, 8), rows.t, rows.cond)
    torch.testing.assert_close(square.flatten(1), flat)
    assert square.shape == (3, 1, 8, 8)


def test_mask_of_zeros_leaves_the_blocks_with_their_biases(digits):
    network = SmallNetwork().initialise(generator("one"))
    images, labels = digits
    rows = draw_noised(images[:2], labels[:2], generator("rows"))
    dropped = functional_call(network, {"masks": torch.zeros(2, 64)}, (rows.x, rows.t, rows.cond))
    expected = network.out(network.first(rows.x) + network.blocks[0].bias + network.blocks[1].bias)
    torch.testing.assert_close(dropped, expected)


def test_masks_keep_the_mean():
    masks = draw_masks((20_000,), 0.25, generator("masks"))
    torch.testing.assert_close(masks.unique(), torch.tensor([0, 1 / 0.75]))
    assert float(masks.mean()) == pytest.approx(1.0, abs=0.02)


def test_a_fit_changes_what_it_is_given_and_lowers_the_loss(digits):
    images, labels = digits
    network = SmallNetwork().initialise(generator("one")).requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start = {name: torch.stack([before[name]] * 2) for name in ("out.1.weight", "out.1.bias")}
    chosen = torch.arange(len(images)).repeat(2, 1)
    fitted = SmallTraining(steps=60, rate=1e-2).fit(network, start, images, labels, chosen, generator("fit"))
    assert set(fitted) == set(start)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    rows = draw_noised(images, labels, generator("test"))

    def loss(state):
        return float((functional_call(network, state, tuple(rows[:3])) - rows.target).square().mean())

    for number in range(2):
        assert loss({name: value[number] for name, value in fitted.items()}) < 0.8 * loss({})


def test_networks_trained_together_come_apart_as_they_were(digits):
    images, labels = digits
    chosen = torch.stack([torch.arange(40), torch.arange(40, 80)])
    networks = SmallTraining(steps=2, batch=8).train(images, labels, chosen, 3)
    again = SmallTraining(steps=2, batch=8).train(images, labels, chosen, 3)
    for one, other in zip(networks, again, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())
    first, second = (network.state_dict()["out.1.weight"] for network in networks)
    assert not torch.equal(first, second)
    stacked = stack_module_state(networks)[0]
    torch.testing.assert_close(unstack_networks(stacked)[1].state_dict(), networks[1].state_dict())
