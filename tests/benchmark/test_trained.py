"""What is trained for a world: anchored members, and what a fit costs."""

import torch
from torch.func import functional_call

from ldm.experiments.small_networks import SmallNetwork, SmallTraining, draw_noised, unstack_networks
from ldm.util import generator


def test_the_pull_is_that_of_an_anchored_member(problem):
    """sigma^2 / (N D s^2), with s half of a row's deviation."""
    trained = problem.trained
    (pull,) = trained.find_pull(["labels.weight"]).values()
    images = trained.data[0]
    noise = float(trained.laplace().sigma_noise.square().mean())
    table = trained.base.get_parameter("labels.weight")
    expected = noise / images.numel() / (0.5 * table.std(1, keepdim=True)).square()
    torch.testing.assert_close(pull, expected.expand_as(pull), rtol=0.05, atol=0)


def test_a_strong_pull_holds_members_at_their_start(images):
    network = SmallNetwork(width=8).initialise(generator("one")).requires_grad_(False)
    start = {"labels.weight": torch.randn(1, 10, 8, generator=generator("start"))}
    chosen = torch.arange(50)[None]

    def move(pull):
        recipe = SmallTraining(steps=20, rate=1e-2, batch=16)
        given = (network, start, images.train, images.labels, chosen, generator("fit"))
        return float((recipe.fit(*given, pull=pull)["labels.weight"] - start["labels.weight"]).abs().max())

    assert move({"labels.weight": torch.tensor(1e4)}) < 0.3 * move(None)


def test_networks_of_other_sizes_come_apart(images):
    recipe = SmallTraining(steps=1, batch=4, width=12)
    wide = torch.zeros(20, 100)
    (network,) = recipe.train(wide, images.labels[:20], torch.arange(20)[None], 0)
    row = draw_noised(wide[:3], images.labels[:3], generator("rows"))
    assert functional_call(network, {}, tuple(row[:3])).shape == (3, 100)
    again = unstack_networks({name: value[None] for name, value in network.named_parameters()})[0]
    torch.testing.assert_close(again(*row[:3]), network(*row[:3]))


def test_a_fit_is_counted_for_every_method_that_stands_on_it(problem):
    trained = problem.trained
    trained.laplace()
    trained.artefacts.used.clear()
    trained.laplace("diag")
    assert trained.artefacts.used["laplace"].seconds > 0
    assert trained.artefacts.used["laplace"].bytes > 0
