"""Conditions by number: a network of texts and pictures that takes labels of a list of them."""

import copy

import pytest
import torch
from torch import nn

from ldm.ensembles.members import MemberNetwork, Members
from ldm.modules.choices import Choices
from ldm.modules.conditioned import ConditionedNetwork, DiffusionWrapper
from tests.conftest import tiny_config

PROMPTS, LENGTH, WIDTH = 3, 4, 8


class Words(nn.Module):
    """A text encoder: one row a token."""

    max_length = LENGTH

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(11, WIDTH)

    def embed(self, tokens):
        return self.rows(tokens)


def seeded():
    return torch.Generator().manual_seed(0)


def make_network(key):
    channels = 1 + 2 * (key != "crossattn")
    text = {"use_spatial_transformer": key != "concat", "context_dim": None if key == "concat" else WIDTH}
    params = {**tiny_config()["params"]["unet_config"]["params"], "in_channels": channels, **text}
    wrapper = DiffusionWrapper({"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}, key)
    network = ConditionedNetwork(wrapper, None if key == "concat" else Words())
    for parameter in network.parameters():  # the last layer starts at zero
        nn.init.normal_(parameter, std=0.2, generator=seeded())
    return network.eval().requires_grad_(False)


def make_choices(key):
    tokens = torch.randint(11, (PROMPTS + 1, LENGTH), generator=seeded())
    picture = torch.randn(PROMPTS + 1, 2, 8, 8, generator=seeded())
    return Choices(
        tuple("abc"),
        tokens=tokens if key != "concat" else None,
        picture=picture if key != "crossattn" else None,
        null=True,
    )


@pytest.mark.parametrize("key", ["crossattn", "concat", "hybrid"])
def test_a_label_stands_for_its_prompt_and_its_picture(key):
    network, choices = make_network(key), make_choices(key)
    assert network.needs_choices
    labelled = ConditionedNetwork(network.model, network.cond_stage_model, choices)
    assert not labelled.needs_choices
    labels, x, t = torch.tensor([2, 0, 3]), torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([5.0, 5.0, 5.0])
    found = labelled(x, t, labels)
    given = {}
    if choices.picture is not None:
        given["c_concat"] = [choices.picture[labels]]
    if choices.tokens is not None:
        given["c_crossattn"] = [network.cond_stage_model.embed(choices.tokens[labels])]
    expected = network.model(x, t, **given)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, labelled(x, t, torch.tensor([1, 0, 3])), atol=1e-4)


@pytest.mark.parametrize("key", ["crossattn", "concat", "hybrid"])
def test_members_agree_with_separate_networks(key):
    network = make_network(key)
    labelled = ConditionedNetwork(network.model, network.cond_stage_model, make_choices(key))
    name = "model.diffusion_model.out.2.weight" if key == "concat" else "cond_stage_model.rows.weight"
    own = torch.randn(2, *labelled.state_dict()[name].shape, generator=seeded())
    labels, x, t = torch.tensor([2, 0, 3, 1]), torch.randn(2, 1, 8, 8, generator=seeded()), torch.full((2,), 5.0)
    for staged in (True, False):
        wide = x if staged else x.repeat(2, 1, 1, 1)
        times = t if staged else t.repeat(2)
        found = MemberNetwork(labelled, Members({name: own}), staged=staged)(wide, times, labels)
        for member in range(2):
            alone = copy.deepcopy(labelled)
            alone.load_state_dict({name: own[member]}, strict=False)
            expected = alone(x.repeat(2, 1, 1, 1), t.repeat(2), labels)
            assert torch.allclose(found[member], expected, atol=1e-5)


def test_choices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 conditions need a row each and one for the null condition, got"):
        Choices(tuple("abc"), tokens=torch.zeros(3, 4, dtype=torch.long), null=True)
    network = make_network("crossattn")
    with pytest.raises(ValueError, match="takes a picture: False, text: True"):
        ConditionedNetwork(network.model, None, make_choices("concat"))
    alone = make_network("concat")
    with pytest.raises(ValueError, match="joins a picture to the state"):
        alone(torch.zeros(1, 1, 8, 8), torch.ones(1), None)
