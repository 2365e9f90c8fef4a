"""DDPM's UNet against outputs, keys and parameter counts of the published implementations."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm.ensembles.heads import select
from ldm.modules.diffusionmodules.model import Model
from tests.conftest import assert_near, golden_json, golden_tensors, listed_weights

SPEC = golden_json("ddim_model_small")
VARIANTS = sorted(SPEC["config"])


def golden_net(variant: str) -> Model:
    net = Model(**{name: value for name, value in SPEC["config"][variant].items() if name != "context_channels"})
    weights = listed_weights(SPEC["weights"][variant])
    assert list(weights) == [name for name, _ in net.named_parameters()]
    net.load_state_dict(weights)
    return net.eval()


def golden_io(variant: str) -> dict[str, torch.Tensor]:
    tensors = golden_tensors("ddim_model_small_io")
    return {name.removeprefix(f"{variant}/"): t for name, t in tensors.items() if name.startswith(f"{variant}/")}


def record(net: Model, names: list[str]) -> dict[str, torch.Tensor]:
    """Let a network keep the outputs of submodules in the dictionary that is returned."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.update({name: out}))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_blocks_and_gradients_are_the_published_ones(variant):
    net, io = golden_net(variant), golden_io(variant)
    outputs = {"temb.dense.1": "temb", "down.0.downsample": "down_sample", "mid.block_2": "mid"}
    outputs["up.1.upsample"] = "up_sample"
    blocks = SPEC["block_names"][variant]
    found = record(net, [*blocks, *outputs])
    x = io["x"].requires_grad_()
    output = net(x, io["t"], io.get("context"))
    for name, golden in outputs.items():
        assert_near(found[name], io[golden])
    for name, (mean, deviation, *first) in zip(blocks, io["blocks"].tolist(), strict=True):
        value = found[name].detach().double()
        bound = 3e-5 * float(value.abs().max())
        assert float(value.mean()) == pytest.approx(mean, abs=bound), name
        assert float(value.std(correction=0)) == pytest.approx(deviation, abs=bound), name
        assert value.flatten()[:8].tolist() == pytest.approx(first, abs=bound), name
    assert_near(output, io["output"])
    output.square().mean().backward()
    assert_near(x.grad, io["grad_x"])


def test_the_network_of_celeba_has_the_published_keys_and_size():
    keys = golden_json("keys_celeba64")
    own = {
        name: value for name, value in keys["config"]["model"].items() if name not in ("type", "var_type", "ema_rate")
    }
    with torch.device("meta"):
        net = Model(**own)
    assert [[name, list(value.shape)] for name, value in net.state_dict().items()] == keys["keys"]
    assert sum(parameter.numel() for parameter in net.parameters()) == keys["counts"]["parameters"]


@torch.no_grad()
def test_stages_parts_and_taps():
    net, io = golden_net("celeba_like"), golden_io("celeba_like")
    names = [name for name, _ in net.named_parameters()]
    features = net.features(io["x"], net.condition(io["t"]))
    assert_near(net.readout(features), io["output"])
    with torch.enable_grad():
        for output, patterns in (
            (net.condition(io["t"]), net.parts.condition),
            (net.readout(features), net.parts.output),
        ):
            used = torch.autograd.grad(output.sum(), list(net.parameters()), allow_unused=True)
            assert select(names, patterns) == [name for name, grad in zip(names, used, strict=True) if grad is not None]
    assert net.get_submodule(net.parts.last_layer) is net.conv_out
    found = record(net, list(net.taps.values()))
    net(io["x"], io["t"])
    assert list(found) == list(net.taps.values()), "taps are in the order of computation"
    assert net.taps["in_5"] == "down.1.attn.1"


@torch.no_grad()
def test_members_and_tangents_pass_through_it():
    net, io = golden_net("no_resample_conv"), golden_io("no_resample_conv")
    weights = torch.stack([net.conv_out.weight, 2 * net.conv_out.weight])
    run = vmap(lambda weight: functional_call(net, {"conv_out.weight": weight}, (io["x"], io["t"])))
    assert_near(run(weights)[0], io["output"])
    bias = net.conv_out.bias[:, None, None]
    assert_near(run(weights)[1] - bias, 2 * (io["output"] - bias))
    net, x, times = net.double(), io["x"].double(), io["t"].double()
    v, step = torch.ones_like(x), 1e-3
    slope = jvp(lambda x: net(x, times), (x,), (v,))[1]
    assert_near(slope, (net(x + step * v, times) - net(x - step * v, times)) / (2 * step), 1e-4)


def test_a_network_that_is_told_no_time():
    """Its blocks hold the maps of the time, as published: of the keys it lacks the two linear maps alone."""
    kinds = {"ch": 32, "out_ch": 1, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 1}
    kinds |= {"resolution": 4, "use_linear_attn": True}
    net, told = Model(**kinds, use_timestep=False), Model(**kinds)
    assert net.parts.condition == () and told.state_dict().keys() - net.state_dict().keys() == {
        f"temb.dense.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    x = torch.ones(1, 1, 4, 4)
    before = net(x)
    for name, parameter in net.named_parameters():
        if "temb_proj" in name:
            torch.nn.init.ones_(parameter)
    assert torch.equal(net(x), before)


def test_errors():
    with pytest.raises(ValueError, match="num_res_blocks must be 1 or more"):
        Model(ch=32, out_ch=3, num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=8)
    net, io = golden_net("context"), golden_io("context")
    with pytest.raises(ValueError, match="5, H, W"):
        net(io["x"], io["t"])
    with pytest.raises(ValueError, match="times"):
        net(io["x"], None, io["context"])
    with pytest.raises(ValueError, match="labels"):
        net.condition(io["t"], io["t"])
