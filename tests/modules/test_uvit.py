"""U-ViT against outputs, keys and parameter counts of the published implementation."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm.ensembles.heads import select
from ldm.modules.uvit import UViT
from tests.conftest import assert_near, golden_json, golden_tensors, listed_weights

SPEC = golden_json("uvit_small")
VARIANTS = sorted(SPEC["config"])


def golden_net(variant: str) -> UViT:
    net = UViT(**SPEC["config"][variant])
    weights = listed_weights(SPEC["weights"][variant])
    assert list(weights) == [name for name, _ in net.named_parameters()]
    net.load_state_dict(weights)
    return net.eval()


def golden_io(variant: str) -> dict[str, torch.Tensor]:
    tensors = golden_tensors("uvit_small_io")
    return {name.removeprefix(f"{variant}/"): t for name, t in tensors.items() if name.startswith(f"{variant}/")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_blocks_and_gradients_are_the_published_ones(variant):
    net, io = golden_net(variant), golden_io(variant)
    blocks = {}
    for tap, name in net.taps.items():
        net.get_submodule(name).register_forward_hook(lambda m, i, out, tap=tap: blocks.update({tap: out}))
    x = io["x"].requires_grad_()
    emb = net.condition(io["t"], io.get("y"))
    features = net.features(x, emb)
    output = net.readout(features)
    if not SPEC["config"][variant]["mlp_time_embed"]:
        assert_near(emb[:, -1], io["time_sinusoid"])
    assert_near(torch.stack(list(blocks.values())), io["blocks"])
    assert_near(features, io["decoder_in"])
    assert_near(output, io["output"])
    output.square().mean().backward()
    assert_near(x.grad, io["grad_x"])
    assert_near(net.decoder_pred.weight.grad, io["grad_decoder_pred"])


@pytest.mark.parametrize("variant", ["cond_released_form", "cond_noskip"])
@torch.no_grad()
def test_the_null_class_is_the_last_row_and_the_published_scale_counts_from_the_condition(variant):
    net, io = golden_net(variant), golden_io(variant)
    uncond = net(io["x"], io["t"])
    assert_near(uncond, io["uncond"])
    scale = 0.4 + 1  # published: eps_c + s (eps_c - eps_u)
    assert_near(uncond + scale * (net(io["x"], io["t"], io["y"]) - uncond), io["guided"])


@pytest.mark.parametrize("size", [256, 512])
def test_the_released_networks_have_the_published_keys_and_size(size):
    keys = golden_json("keys_uvit")
    shapes = {name: tuple(shape) for name, shape in keys["keys"]}
    if size == 512:
        shapes.update({name: tuple(shape) for name, _, shape in keys["differences_512"]["[key, 256, 512]"]})
    with torch.device("meta"):
        net = UViT(**keys["config"][f"imagenet{size}_uvit_huge"])
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == shapes
    assert sum(p.numel() for p in net.parameters()) == keys["counts"][f"imagenet{size}_uvit_huge"]


def test_its_parts_are_parameters_of_the_stages_that_they_name():
    for variant in VARIANTS:
        net, io = golden_net(variant), golden_io(variant)
        names = [name for name, _ in net.named_parameters()]
        parts = net.parts
        args = (io["t"],) if "y" not in io else (io["t"], io["y"])
        condition = net.condition(*args)
        if parts.condition:
            used = torch.autograd.grad(condition.sum(), list(net.parameters()), allow_unused=True)
            assert select(names, parts.condition) == [n for n, g in zip(names, used, strict=True) if g is not None]
        read = torch.autograd.grad(net.readout(io["decoder_in"]).sum(), list(net.parameters()), allow_unused=True)
        assert select(names, parts.output) == [n for n, g in zip(names, read, strict=True) if g is not None]
        assert isinstance(net.get_submodule(parts.last_layer), (torch.nn.Linear, torch.nn.Conv2d))
        assert set(parts.class_tables) <= set(names)


@torch.no_grad()
def test_members_and_tangents_pass_through_it():
    net, io = golden_net("cond_released_form"), golden_io("cond_released_form")
    rows = torch.stack([net.label_emb.weight, 2 * net.label_emb.weight])
    run = vmap(lambda table: functional_call(net, {"label_emb.weight": table}, (io["x"], io["t"], io["y"])))
    assert_near(run(rows)[0], io["output"])
    assert not torch.allclose(run(rows)[1], io["output"])
    step = 1e-2
    double, x, v = net.double(), io["x"].double(), torch.ones_like(io["x"]).double()
    call = lambda x: double(x, io["t"].double(), io["y"])  # noqa: E731
    slope = jvp(call, (x,), (v,))[1]
    assert_near(slope, (call(x + step * v) - call(x - step * v)) / (2 * step), 1e-3)


def test_a_scale_of_the_scores_and_recomputed_activations_change_what_they_say():
    io, spec = golden_io("cond_noskip"), SPEC["config"]["cond_noskip"]
    weights = listed_weights(SPEC["weights"]["cond_noskip"])
    nets = [UViT(**spec, **extra) for extra in ({"qk_scale": 12**-0.5}, {"use_checkpoint": True}, {"qk_scale": 1.0})]
    for net in nets:
        net.load_state_dict(weights)
    outputs = [net(io["x"], io["t"], io["y"]) for net in nets]
    assert_near(outputs[0], io["output"])
    assert_near(outputs[1], io["output"])
    assert not torch.allclose(outputs[2], io["output"])
    outputs[1].square().mean().backward()
    assert_near(nets[1].decoder_pred.weight.grad, io["grad_decoder_pred"])


def test_errors():
    with pytest.raises(ValueError, match="does not divide into 2 heads"):
        UViT(img_size=8, patch_size=2, embed_dim=9, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="patches"):
        UViT(img_size=9, patch_size=2, embed_dim=8, depth=2, num_heads=2)
    net = UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=8, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="unconditional"):
        net(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="1, 8, 8"):
        net(torch.zeros(1, 1, 6, 8), torch.ones(1))


def test_an_odd_depth_is_one_block_less():
    """As published: half the depth, rounded down, before and after the block in the middle."""
    given = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
    keys = [list(UViT(**given, depth=depth).state_dict()) for depth in (5, 4)]
    assert keys[0] == keys[1]


@torch.no_grad()
def test_odd_widths_and_a_scale_of_none_are_the_published_ones():
    """A time of an odd width ends with a zero, and a scale of 0 is the default, as `qk_scale or ...` has it."""
    given = {"img_size": 8, "patch_size": 4, "embed_dim": 9, "depth": 2, "num_heads": 3}
    net, same = UViT(**given), UViT(**given, qk_scale=0)
    same.load_state_dict(net.state_dict())
    t = torch.tensor([3.0, 977.0])
    angles = t[:, None] * 10000 ** (-torch.arange(4) / 4)
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(net.condition(t)[:, 0], expected, atol=1e-4, rtol=0)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same(x, t), net(x, t))
