"""Diffusion transformers: published keys and size, positions, the mathematics of a block, stages and taps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.dit import DiT, grid_positions
from ldm.util import generator

TINY = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(seed=0, **changes):
    """A network none of whose layers is zero."""
    net, source = DiT(**{**TINY, **changes}), generator("dit", seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.data = torch.randn(parameter.shape, generator=source) / fan_in**0.5
    return net.double().eval()


def draw(*shape):
    return torch.randn(*shape, generator=generator("dit inputs"), dtype=torch.float64)


def test_dit_xl_2_has_the_published_keys_and_size():
    with torch.device("meta"):
        net = DiT()
    assert sum(parameter.numel() for parameter in net.parameters()) == 675_129_632
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    block = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608)}
    block["adaLN_modulation.1"] = (6912, 1152)
    for index in range(28):
        for name, shape in block.items():
            expected[f"blocks.{index}.{name}.weight"] = shape
            expected[f"blocks.{index}.{name}.bias"] = shape[:1]
    assert shapes == expected
    assert list(net.taps) == [f"layer-{index}" for index in range(28)]


def test_positions_encode_columns_then_rows():
    code = grid_positions(16, 3).double()
    for row in range(3):
        for column in range(3):
            token = code[3 * row + column]
            for part, place in ((token[:8], column), (token[8:], row)):
                for i in range(4):
                    angle = place / 10000 ** (i / 4)
                    assert float(part[i]) == pytest.approx(math.sin(angle), abs=1e-6)
                    assert float(part[4 + i]) == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
def test_a_block_is_its_formula():
    block, x, c = tiny().blocks[0], draw(2, 4, 16), draw(2, 16)
    parts = F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None] for part in parts.split(16, dim=1))

    def norm(h):
        return (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-6).sqrt()

    h = norm(x) * (1 + scale_a) + shift_a
    qkv = h @ block.attn.qkv.weight.T + block.attn.qkv.bias
    heads = []
    for head in range(2):
        query, key, value = (qkv[..., 16 * k + 8 * head : 16 * k + 8 * head + 8] for k in range(3))
        heads.append(torch.softmax(query @ key.mT / 8**0.5, -1) @ value)
    x1 = x + gate_a * (torch.cat(heads, 2) @ block.attn.proj.weight.T + block.attn.proj.bias)
    h = (norm(x1) * (1 + scale_m) + shift_m) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    expected = x1 + gate_m * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, c), expected)


@torch.no_grad()
def test_stages_patches_and_the_null_class():
    net, x, t = tiny(), draw(2, 4, 4, 4), torch.tensor([3.0, 700.0], dtype=torch.float64)
    y = torch.tensor([1, 4])
    whole = net(x, t, y)
    assert whole.shape == (2, 8, 4, 4)
    assert torch.equal(whole, net.readout(net.features(x, net.condition(t, y))))
    assert torch.equal(net(x, t), net(x, t, torch.full((2,), 5)))
    # Token 1 is the patch of row 0 and columns 2, 3; its values are ordered row, column, channel.
    tokens = draw(1, 4, 16)
    patch = net.final_layer.linear(tokens)[0, 1].reshape(2, 2, 8)
    torch.testing.assert_close(net.readout(tokens)[0, :, :2, 2:], patch.permute(2, 0, 1))


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity():
    net = DiT(**TINY).eval()
    x, t = torch.randn(2, 4, 4, 4, generator=generator("fresh")), torch.tensor([1.0, 2.0])
    assert float(net(x, t).abs().max()) == 0.0
    tokens = net.x_embedder(x)
    assert torch.equal(net.blocks[0](tokens, net.condition(t)), tokens)


def test_errors():
    with pytest.raises(ValueError, match="null class"):
        tiny(class_dropout_prob=0.0)(draw(1, 4, 4, 4), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="4, 4, 4"):
        tiny()(draw(1, 4, 6, 6), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="patches"):
        DiT(**{**TINY, "input_size": 5})
