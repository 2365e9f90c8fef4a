"""Features inside a network: published ones, independence of batch and company, early ends, conditional trunks."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.denoiser import Target
from ldm.diffusion.schedule import EDMSchedule, VPSchedule, make_betas
from ldm.diffusion.times import edm_times
from ldm.evaluation.grid_features import load_or_make_features, read_features
from ldm.evaluation.taps import Backbone, Reading, activations, named_taps, pool_activation, resolve_taps
from ldm.modules.ddpmpp import UNet
from ldm.util import generator
from tests.conftest import golden_json, golden_tensors, recipe_weights, tiny_model

LAYERS = ("out_1", "out_2", "out_3", "out_4")


class Unconditional(torch.nn.Module):
    """A UNet as a network of (x, t, cond)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, cond):
        return self.net(x, t)


class Given:
    """States held in memory."""

    def __init__(self, states, labels):
        self.states, self.labels = states, labels

    def __len__(self):
        return len(self.states)

    def read(self, start, stop):
        return self.states[start:stop]

    def at(self, rows, epoch=0):
        return self.states[list(rows)]

    def describe(self):
        return {"count": len(self)}


def golden_trunk(schedule, target):
    spec = golden_json("ddae_small_ddpm")
    net = UNet(**spec["config"])
    net.load_state_dict(recipe_weights(spec))
    return Backbone(Unconditional(net.eval()), schedule, target)


def conditional_trunk():
    model = tiny_model()
    return Backbone(model.network.eval(), model.schedule, model.target, model.null_class)


def states(count=6, shape=(1, 8, 8), seed=0):
    x = torch.randn(count, *shape, generator=generator("states", seed))
    return Given(x, torch.arange(count) % 3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpm", "edm"])
def test_published_features(name):
    io = golden_tensors("ddae_small_ddpm_io")
    if name == "ddpm":
        trunk, u = golden_trunk(VPSchedule(make_betas("sqrt_linear", 1000), unit_time=True), Target("eps")), 11.0
    else:
        trunk, u = golden_trunk(EDMSchedule(), Target("edm")), float(edm_times(EDMSchedule(), 18).flip(0)[4])
        assert u == pytest.approx(0.05995, abs=1e-5)
    x0, case = 2 * io["ddpm/image01"] - 1, "ddpm/feature_t11" if name == "ddpm" else "edm/feature_t4"
    found = trunk.read(resolve_taps(trunk.network, LAYERS), x0, io[f"{name}/feature_noise"], u)
    for layer in LAYERS:
        expected = io[f"{case}/{layer}"]
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=7e-5 * expected.abs().max().item())


def test_a_pass_ends_at_its_last_tap():
    trunk, ran = golden_trunk(EDMSchedule(), Target("edm")), []
    trunk.network.net.final.register_forward_hook(lambda *_: ran.append("final"))
    taps = resolve_taps(trunk.network, ["in_1", "out_2"])
    inputs = trunk.inputs(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), 0.5)
    assert list(activations(trunk.network, taps, *inputs)) == ["in_1", "out_2"]
    assert not ran
    activations(trunk.network, {"final": "net.final"}, *inputs)
    assert ran == ["final"]
    assert not any(module._forward_hooks for name, module in trunk.network.named_modules() if name != "net.final")


def test_features_do_not_depend_on_the_batch_or_on_company():
    trunk = conditional_trunk()
    data = states()
    taps = resolve_taps(trunk.network, ["all"])
    reading = Reading((11.0, 300.0), taps, draws=(0, 1), seed=5)
    together = read_features(data, trunk, reading, batch_size=6).arrays
    apart = read_features(data, trunk, reading, batch_size=1).arrays
    alone = read_features(data, trunk, Reading((300.0,), {"mid": taps["mid"]}, draws=(0, 1), seed=5)).arrays
    for place, values in together.items():
        torch.testing.assert_close(*map(torch.from_numpy, (apart[place], values)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*map(torch.from_numpy, (alone[300.0, "mid"], together[300.0, "mid"])))


def test_draws_are_averaged_and_need_no_gradients():
    trunk, data = conditional_trunk(), states(2)
    taps = resolve_taps(trunk.network, ["mid"])
    read = {draws: read_features(data, trunk, Reading((100.0,), taps, draws=draws)) for draws in ((0,), (1,), (0, 1))}
    first, second, both = (torch.from_numpy(found.arrays[100.0, "mid"]) for found in read.values())
    torch.testing.assert_close(both, (first + second) / 2)
    assert not torch.equal(first, second)
    assert not trunk.features(data.read(0, 2), [0, 1], Reading((100.0,), taps))[100.0, "mid"].requires_grad


def test_the_null_class_of_a_trained_trunk_changes_its_features():
    trunk, data = conditional_trunk(), states(2)
    reading = Reading((100.0,), resolve_taps(trunk.network, ["mid"]))
    null = read_features(data, trunk, reading).arrays
    other = read_features(data, Backbone(trunk.network, trunk.schedule, trunk.target, 3), reading).arrays
    assert abs(null[100.0, "mid"] - other[100.0, "mid"]).max() > 1e-4


def test_pools():
    maps = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert torch.equal(pool_activation(maps), maps.mean((2, 3)))
    assert torch.equal(pool_activation(maps, None), maps.flatten(1))
    assert torch.equal(pool_activation(maps, 2)[0, 0], maps[0, 0, :2, :2].mean())
    tokens = maps.flatten(2).mT  # [1, 16, 2]
    assert torch.equal(pool_activation(tokens), pool_activation(maps))
    assert torch.equal(pool_activation(tokens, 2), pool_activation(maps, 2))
    with pytest.raises(ValueError, match="no square"):
        pool_activation(tokens[:, :5], 2)


def test_cache_is_what_memory_holds_continues_and_refuses_other_settings(tmp_path):
    trunk, data = conditional_trunk(), states(7)
    reading = Reading((11.0, 300.0), resolve_taps(trunk.network, ["mid", "model.diffusion_model.out.0"]))
    wanted = read_features(data, trunk, reading)
    seen = []
    found = load_or_make_features(data, trunk, reading, tmp_path, {"weights": "a"}, progress=seen.append)
    again = load_or_make_features(data, trunk, reading, tmp_path, {"weights": "a"}, progress=seen.append)
    assert seen == [7]
    for place in reading.places:
        assert (found.arrays[place] == wanted.arrays[place]).all()
        assert (again.arrays[place] == wanted.arrays[place]).all()
    assert found.labels.tolist() == data.labels.tolist()
    with pytest.raises(ValueError, match="other settings"):
        load_or_make_features(data, trunk, reading, tmp_path, {"weights": "b"})


def test_unknown_layers_are_named():
    trunk = conditional_trunk()
    assert named_taps(trunk.network)["out_1"] == "model.diffusion_model.output_blocks.0"
    with pytest.raises(ValueError, match="out_9"):
        resolve_taps(trunk.network, ["out_9"])
