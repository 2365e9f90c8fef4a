"""Members that differ inside the backbone, in one batch: each equals a pass of its own, in float64, to rounding."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from ldm.ensembles.folding import can_fold, fold_members
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.memory import peak_bytes
from ldm.modules.dit import DiT
from ldm.modules.low_rank import add_factors, find_layers
from ldm.pipelines.speed import speed_up
from ldm.settings import Speed
from ldm.util import generator
from tests.conftest import tiny_model

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (2, 7, 5)),
    "linear of rows": (lambda: nn.Linear(5, 6, bias=False), (2, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3, padding=1), (2, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 6, 3, stride=2, padding=1), (2, 5, 8, 8)),
    "dilated": (lambda: nn.Conv2d(5, 6, 3, padding=2, dilation=2, bias=False), (2, 5, 8, 8)),
    "pixel": (lambda: nn.Conv2d(5, 6, 1), (2, 5, 4, 8)),
    "pixel stride": (lambda: nn.Conv2d(5, 6, 1, stride=2), (2, 5, 8, 8)),
}
CPU = torch.device("cpu")
M = 3


def draw(key, *shape):
    return torch.randn(*shape, generator=generator("folding", key, *shape), dtype=torch.float64)


def change_rows(value):
    """Members that differ from a weight in its rows 1 and 4."""
    own = value.expand(M, *value.shape).clone()
    own[:, [1, 4]] += draw("rows", *own[:, [1, 4]].shape)
    return own


CHANGES = {
    "factors": lambda state: {name: draw(name, M, *state[name].shape) for name in state if "lora" in name},
    "one factor": lambda state: {name: draw(name, M, *state[name].shape) for name in state if "lora_B" in name},
    "rows": lambda state: {name: change_rows(state[name]) for name in state if name == "0.weight"},
    "weights": lambda state: {name: draw(name, M, *state[name].shape) for name in state if name == "0.weight"},
    "nothing": lambda state: {name: state[name].expand(M, *state[name].shape) for name in state if name == "0.weight"},
    "biases": lambda state: {name: draw(name, M, *state[name].shape) for name in state if "bias" in name},
    "rows and biases": lambda state: CHANGES["rows"](state) | CHANGES["biases"](state),
    "all": lambda state: CHANGES["factors"](state) | CHANGES["weights"](state) | CHANGES["biases"](state),
}


def list_changes():
    """Every layer with every change that it has something for: biases alone need a bias."""
    for kind, (make, _) in LAYERS.items():
        for change in CHANGES:
            if change != "biases" or make().bias is not None:
                yield kind, change


@pytest.mark.parametrize(("kind", "change"), list_changes())
def test_a_folded_layer_is_that_of_each_member(kind, change):
    make, shape = LAYERS[kind]
    network = nn.Sequential(make()).double()
    add_factors(network, ["0"], 2)
    network.load_state_dict({name: draw(f"base {name}", *one.shape) for name, one in network.state_dict().items()})
    overrides = CHANGES[change](network.state_dict())
    x = draw("x", M, *shape)
    assert can_fold(network, overrides)
    folded, present = fold_members(network, overrides)
    apart = [functional_call(network, {name: one[m] for name, one in overrides.items()}, x[m]) for m in range(M)]
    torch.testing.assert_close(folded(x.flatten(0, 1)).unflatten(0, (M, -1)), torch.stack(apart))
    present.members = slice(1, 3)
    torch.testing.assert_close(folded(x[1:].flatten(0, 1)).unflatten(0, (2, -1)), torch.stack(apart[1:]))
    assert set(folded.state_dict()) == set(network.state_dict())


def test_only_layers_whose_products_are_known_fold():
    network = nn.ModuleDict({"norm": nn.LayerNorm(4), "groups": nn.Conv2d(4, 4, 3, groups=2), "plain": nn.Linear(4, 4)})
    network["round"] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    network["same"] = nn.Conv2d(4, 4, 3, padding="same")
    found = {name for name, value in network.named_parameters() if can_fold(network, {name: value})}
    assert found == {"plain.weight", "plain.bias"}


def make_model(layers, rank=2):
    """A tiny model with factors, and what three members override of it."""
    model = tiny_model().double()
    unet = model.model.diffusion_model
    add_factors(unet, find_layers(unet, layers), rank)
    state = model.network.state_dict()
    return model, state, [name for name in state if "lora_" in name]


def make_members(state, names, count=M):
    return Members({name: state[name] + 0.3 * draw(name, count, *state[name].shape) for name in names})


MORE = {
    "factors": [],
    "beside heads at both ends": ["cond_stage_model.embedding.weight", "model.diffusion_model.out.2.weight"],
    "beside a first layer": ["model.diffusion_model.input_blocks.0.0.weight"],
}


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("shared", [True, False], ids=["shared-x", "own-x"])
@torch.no_grad()
def test_folded_members_equal_separate_passes(more, shared):
    model, state, factors = make_model(["attention", "*in_layers.2"])
    members = make_members(state, factors + MORE[more])
    network = model.network
    x = draw("x", *((2,) if shared else (M, 2)), 1, 8, 8)
    t, labels = torch.tensor([700.0, 3.0], dtype=torch.float64), torch.tensor([4, 10, 1, 2])  # two for each image
    wide = x.repeat(*[1] * (x.ndim - 4), 2, 1, 1, 1)
    apart = [SingleMember(network, members, m)(wide if shared else wide[m], t.repeat(2), labels) for m in range(M)]
    for chunk in (None, 5, 2, 1):
        folded = MemberNetwork(network, members, chunk)
        assert folded.folds
        torch.testing.assert_close(folded(x, t, labels), torch.stack(apart), atol=1e-10, rtol=1e-8)
    vmapped = MemberNetwork(network, members, staged=False)
    torch.testing.assert_close(vmapped(x, t, labels[:2]), torch.stack(apart)[:, :2], atol=1e-10, rtol=1e-8)
    assert (apart[0] - apart[1]).abs().max() > 1e-3, "the members must differ, or nothing is tested"


@torch.no_grad()
def test_weights_of_members_are_never_made():
    """Forty members of a layer of 256 x 256, one row each: less than the weights of one of them is made beside."""
    network = nn.Sequential(nn.Linear(256, 256))
    names = add_factors(network, ["0"], 2)
    overrides = {name: draw(name, 40, *network.get_parameter(name).shape).float() for name in names}
    folded, _ = fold_members(network, overrides)
    x = draw("x", 40, 256).float()
    of_weights = 4 * 256 * 256
    assert peak_bytes(lambda: folded(x)) < of_weights
    vmapped = vmap(lambda own, one: functional_call(network, own, (one,)))
    assert peak_bytes(lambda: vmapped(overrides, x)) > 40 * of_weights


@torch.no_grad()
def test_what_is_laid_over_the_features_is_laid_over_members():
    model, state, factors = make_model(["attention"])
    members = make_members(state, factors)
    unet = speed_up(model.model.diffusion_model, Speed(precision="fp16"), CPU)  # which this device does in float32
    inputs = draw("x", 2, 1, 8, 8), torch.tensor([700.0, 3.0], dtype=torch.float64), torch.tensor([4, 10])
    expected = MemberNetwork(model.network, members)(*inputs)
    model.model.diffusion_model = unet
    found = MemberNetwork(model.network, members)(*inputs)
    assert "features" in vars(unet)
    torch.testing.assert_close(found, expected)


def test_members_that_are_trained_run_by_vmap():
    model, state, factors = make_model(["attention"])
    members = make_members(state, factors)
    assert MemberNetwork(model.network, members).folds
    trained = Members({name: value.requires_grad_() for name, value in members.overrides.items()})
    assert not MemberNetwork(model.network, trained).folds


@torch.no_grad()
def test_transformers_fold():
    net = DiT(4, 2, 1, 16, 2, 2, num_classes=3).double()
    net.load_state_dict({name: draw(name, *one.shape) / 4 for name, one in net.state_dict().items()})
    names = add_factors(net, find_layers(net, ["attention", "*.fc1"]), 2)
    overrides = {name: draw(name, M, *net.get_parameter(name).shape) for name in names}
    x, t, y = draw("x", M, 2, 1, 4, 4), torch.tensor([3.0, 9.0]).double(), torch.tensor([0, 2])
    folded, _ = fold_members(net, overrides)
    found = folded(x.flatten(0, 1), t.repeat(M), y.repeat(M)).unflatten(0, (M, -1))
    for m in range(M):
        torch.testing.assert_close(
            found[m], functional_call(net, {name: one[m] for name, one in overrides.items()}, (x[m], t, y))
        )
