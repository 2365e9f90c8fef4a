"""Low-rank factors of layers: nothing changes while B is zero, W + B A otherwise, under transforms too."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from ldm.modules.dit import DiT
from ldm.modules.low_rank import add_factors, add_factors_of, draw_factors, find_layers, fold_factors
from ldm.util import generator

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, padding=1), (3, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (3, 5, 8, 8)),
    "pixel": (lambda: nn.Conv2d(5, 4, 1, bias=False), (3, 5, 8, 8)),
}


def draw(*shape):
    return torch.randn(*shape, generator=generator("low rank", len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_w_plus_b_a(kind):
    make, shape = LAYERS[kind]
    network = nn.Sequential(make()).double()
    x, plain = draw(*shape), {name: value.clone() for name, value in network.state_dict().items()}
    expected = network(x)
    assert add_factors(network, find_layers(network, ["0"]), 2) == ["0.lora_A", "0.lora_B"]
    assert torch.equal(network(x), expected) and set(plain) < set(network.state_dict())
    members = {name: draw(3, *value.shape) for name, value in network.named_parameters() if "lora" in name}
    together = vmap(lambda one: functional_call(network, one, (x,)))(members)
    for index in range(3):
        heads = {name: value[index] for name, value in members.items()}
        folded = nn.Sequential(make()).double()
        folded.load_state_dict({**plain, **fold_factors(heads, plain)})
        torch.testing.assert_close(together[index], folded(x))


def test_attention_and_patterns_choose_layers():
    net = DiT(4, 2, 1, 16, 2, 2, num_classes=3)
    inside = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj"]
    assert find_layers(net, ["attention"]) == inside
    assert find_layers(net, ["blocks.0.attn.*", "*.fc1"]) == [*inside[:2], "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    with pytest.raises(ValueError, match=r"'heads.9' fits no linear layer"):
        find_layers(net, ["heads.9"])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_factors(net, inside, 0)


def test_a_weight_that_is_used_without_a_call_has_its_factors():
    attention, x = nn.MultiheadAttention(4, 2).double(), draw(3, 2, 4)
    plain = attention(x, x, x)[0]
    a, b = add_factors(attention, find_layers(attention, ["out_proj"]), 1)
    heads = {a: draw(1, 4), b: draw(4, 1)}
    folded = {name: value for name, value in attention.state_dict().items() if "lora" not in name}
    other = nn.MultiheadAttention(4, 2).double()
    other.load_state_dict({**folded, **fold_factors(heads, folded)})
    changed = functional_call(attention, heads, (x, x, x))[0]
    torch.testing.assert_close(changed, other(x, x, x)[0])
    assert not torch.allclose(changed, plain)


def test_heads_make_their_factors():
    net, twin = (DiT(4, 2, 1, 16, 1, 2, num_classes=3) for _ in range(2))
    names = add_factors(net, find_layers(net, ["attention"]), 3)
    add_factors_of(twin, {name: net.get_parameter(name) for name in names} | {"table.lora_A": torch.zeros(2, 2)})
    assert {name: value.shape for name, value in twin.named_parameters()} == {
        name: value.shape for name, value in net.named_parameters()
    }


def test_drawn_corrections_have_the_deviation_of_their_row():
    weight, a, b = draw(6, 400), torch.zeros(3, 400), torch.zeros(6, 3)
    wanted = torch.linspace(0.1, 2, 6)[:, None]
    first, second = draw_factors(weight, a, b, wanted, generator("draw"))
    assert float(first) == pytest.approx(1 / 20) and second.shape == (6, 1)
    found = torch.stack(
        [(draw_factors(weight, a, b, wanted, generator("draw", index)), b @ a)[1] for index in range(300)]
    )
    torch.testing.assert_close(found.square().mean((0, 2)).sqrt(), wanted[:, 0], rtol=0.1, atol=0)
    draw_factors(weight, a, b, None, generator("draw"))
    assert not b.any() and a.any()
