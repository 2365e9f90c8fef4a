"""DDAE's UNets against keys, counts, outputs and activations of the published implementation."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.ddpmpp import SpatialAttention, UNet
from ldm.modules.diffusionmodules.util import split_last_layer
from tests.conftest import golden_json, golden_tensors, recipe_weights

TOLERANCE = 7e-5  # of the maximum: ten times what other kernels were seen to move the published network
COUNTS = {"DDPM_ddpm": 35_746_307, "DDPM_ddpmpp": 56_524_291, "EDM_ddpm": 35_746_307}
COUNTS |= {"EDM_ddpmpp": 56_524_291, "EDM_ddpmpp_aug": 56_525_443}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def golden_net() -> UNet:
    spec = golden_json("ddae_small_ddpm")
    net = UNet(**spec["config"])
    net.load_state_dict(recipe_weights(spec))
    return net.eval()


@pytest.mark.parametrize("name", COUNTS)
def test_keys_shapes_and_counts(name):
    networks = golden_json("ddae_keys")["networks"]
    with torch.device("meta"):
        net = UNet(**networks[name]["network"])
    assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[name] == networks[name]["n_params"]
    keys = [[key, list(value.shape)] for key, value in net.state_dict().items()]
    published = networks[name].get("keys") or networks["DDPM_ddpm" if "ddpmpp" not in name else "DDPM_ddpmpp"]["keys"]
    assert [key for key in keys if key[0] != "time_emb.aug_emb.weight"] == published


@torch.no_grad()
def test_published_outputs_and_activations():
    net, io = golden_net(), golden_tensors("ddae_small_ddpm_io")
    assert_close(net(io["x"], io["t"]), io["out"])
    assert_close(net(io["x"], io["t_edm"]), io["out_edm_t"])
    seen = {}
    for tap, name in net.taps.items():
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, tap=tap: seen.update({tap: out}))
    net(io["x"], io["t"])
    assert list(seen) == ["in_1", "in_2", "mid", "out_1", "out_2", "out_3", "out_4"]
    for tap in ("out_1", "out_2", "out_3", "out_4"):
        assert_close(seen[tap], io[f"activation/{tap}"])
        assert_close(seen[tap].mean((2, 3)), io[f"activation_gap/{tap}"])


def test_stages_make_the_network():
    net, io = golden_net(), golden_tensors("ddae_small_ddpm_io")
    phi, layer = split_last_layer(net, "final")
    assert layer is net.final
    assert torch.equal(layer(phi(io["x"], io["t"])), net(io["x"], io["t"]))
    assert torch.equal(net.final(net.features(io["x"], net.condition(io["t"]))), net(io["x"], io["t"]))


def test_residual_resampling_keeps_the_size_of_the_image():
    net = UNet([3, 16, 16], 32, [1, 2, 2], [False, True, False], None, 0.1, 1, use_res_for_updown=True, augment_dim=9)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.7])
    net.eval()
    assert net(x, t).shape == x.shape
    labels = torch.zeros(2, 9)
    assert torch.equal(net(x, t, labels), net(x, t))
    labels[1, 3] = 1.0
    changed = net(x, t, labels) - net(x, t)
    assert float(changed[0].abs().max().detach()) == 0 < float(changed[1].abs().max().detach())


def test_time_scale_multiplies_the_time():
    net, io = golden_net(), golden_tensors("ddae_small_ddpm_io")
    expected = net(io["x"], 1000 * io["t"])
    net.time_emb.time_scale = 1000.0
    torch.testing.assert_close(net(io["x"], io["t"]), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_attention_with_several_heads_is_the_formula():
    block = SpatialAttention(64, head_channels=16).double()
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = block.norm(x).flatten(2).mT @ block.projection.weight.T + block.projection.bias  # [2, 9, 192]
    heads = []
    for head in tokens.split(48, dim=2):
        query, key, value = head.split(16, dim=2)
        heads.append(torch.softmax(query @ key.mT / 4, dim=-1) @ value)
    expected = torch.cat(heads, 2) @ block.output.weight.T + block.output.bias
    torch.testing.assert_close(block(x), x + expected.mT.reshape(x.shape))


def test_errors_name_what_was_expected():
    net = golden_net()
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.zeros(1, 3, 7, 8), torch.ones(1))
    with pytest.raises(ValueError, match="augment_dim"):
        net(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, 9))
    with pytest.raises(ValueError, match="level by level"):
        UNet([3, 8, 8], 32, [1, 2], [True])
