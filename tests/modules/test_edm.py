"""EDM's networks: published outputs, gradients, denoisers and samples; stages, labels and parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target
from ldm.diffusion.samplers import heun, run
from ldm.diffusion.schedule import EDMSchedule, LinearVPSchedule, VESchedule, make_betas
from ldm.diffusion.times import edm_times
from ldm.diffusion.translated import TranslatedDenoiser
from ldm.evaluation.taps import activations
from ldm.modules import edm
from ldm.modules.edm import DhariwalUNet, SongUNet
from ldm.modules.parts import find_parts
from ldm.util import generator
from tests.conftest import golden_json, golden_tensors
from tests.models.toys import CosineTimes

SETS = {"song": "edm_songunet_small", "dhariwal": "edm_dhariwal_small"}
CASES = [
    ("song", name) for name in ("ddpmpp_cond_aug", "ddpmpp_uncond", "ncsnpp_uncond_aug", "ncsnpp_cond", "skip_skip")
] + [("dhariwal", name) for name in ("adm_cond", "adm_uncond_aug", "adm_no_small_attention", "adm_iddpm")]
TOLERANCE = 3e-5


@dataclass(frozen=True)
class Case:
    """A golden network with its recorded inputs and outputs."""

    net: SongUNet | DhariwalUNet
    io: dict
    spec: dict
    name: str

    @property
    def labels(self):
        return self.io.get("class_labels"), self.io.get("augment_labels")

    def network(self, x, t, cond):
        """The raw network under the labels `cond`: what the golden passes, or None for none."""
        return self.net(x, t, *(cond or ()))[:, : x.shape[1]]


@lru_cache
def case(kind, name):
    spec = golden_json(SETS[kind])
    config = dict(spec["config"][name])
    channels = config.pop("img_channels")
    out = 2 * channels if name == "adm_iddpm" else channels
    net = getattr(edm, config.pop("model_type"))(in_channels=channels, out_channels=out, **config)
    weights, source = {}, torch.Generator().manual_seed(spec["weights"][name]["seed"])
    for key, shape in spec["weights"][name]["order"]:
        draw = torch.randn(shape, generator=source)
        if draw.ndim > 1:
            weights[key] = draw / draw[0].numel() ** 0.5
        else:
            weights[key] = 1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw
    io = {key.removeprefix(f"{name}/"): value for key, value in golden_tensors(f"{SETS[kind]}_io").items()
          if key.startswith(f"{name}/")}  # fmt: skip
    buffers = {key: value for key, value in net.state_dict().items() if key not in weights}
    assert [[key, list(value.shape)] for key, value in buffers.items()] == spec["weights"][name]["buffers"]
    if "map_noise.freqs" in buffers:
        source = torch.Generator().manual_seed(spec["seeds"][name]["map_noise.freqs"])
        buffers["map_noise.freqs"] = 16 * torch.randn(buffers["map_noise.freqs"].shape, generator=source)
    net.load_state_dict(weights | buffers)
    return Case(net.eval().requires_grad_(False), io, spec, name)


def assert_close(found, expected, tolerance=TOLERANCE):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_outputs_blocks_and_gradients_are_the_published_ones(kind, name):
    one = case(kind, name)
    names = one.spec["block_names"][name]
    found = activations(one.net, {block: block for block in names}, one.io["x"], one.io["noise_labels"], *one.labels)
    for block, row in zip(names, one.io["blocks"], strict=True):
        value = found[block].double()
        stats = torch.cat([torch.stack([value.mean(), value.std(correction=0)]), value.flatten()[:8]])
        torch.testing.assert_close(stats, row, rtol=0, atol=TOLERANCE * float(value.abs().max()))
    x = one.io["x"].clone().requires_grad_()
    out = one.net(x, one.io["noise_labels"], *one.labels)
    assert_close(out.detach(), one.io["F"])
    (slope,) = torch.autograd.grad(out.square().mean(), x)
    assert_close(slope, one.io["grad_x"])


def preconditioned(one, kind, cond):
    """The denoiser of a preconditioner, a function of states x = x_0 + sigma n."""
    own = EDMSchedule()
    if kind == "edm":
        return NetworkDenoiser(one.network, own, Target("edm"), cond, dtype=torch.float32)
    if kind == "ve":  # its time u is sigma^2
        exploding = NetworkDenoiser(one.network, VESchedule(), Target("score"), cond, dtype=torch.float32)
        return lambda x, sigma: exploding(x, sigma**2)
    table = LinearVPSchedule() if kind == "vp" else CosineTimes(make_betas("cosine", 1000))
    return TranslatedDenoiser(NetworkDenoiser(one.network, table, Target("eps"), cond, dtype=torch.float32), table, own)


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_the_denoisers_of_all_preconditioners_are_the_published_ones(kind, name):
    one = case(kind, name)
    for precond in one.spec["preconditioners"][name]:
        if (precond, name) == ("vp", "ncsnpp_uncond_aug") or (precond, name) == ("vp", "ncsnpp_cond"):
            continue  # sines of 10^5 radians in float32: no two implementations agree, and no released model has it
        denoiser = preconditioned(one, precond, one.labels)
        for x, sigma, expected in zip(
            one.io[f"{precond}/D_in"], one.spec["sigmas"], one.io[f"{precond}/D"], strict=True
        ):
            found = denoiser(x, sigma).x0
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(x.abs().max()))
    plain = preconditioned(one, "edm", None)
    if "edm/D_none" in one.io:
        x = one.io["edm/D_in"][one.spec["sigmas"].index(0.5)]
        assert_close(plain(x, 0.5).x0, one.io["edm/D_none"])


@pytest.mark.parametrize(("kind", "name"), [pair for pair in CASES if pair[1] != "adm_iddpm"])
@torch.no_grad()
def test_samples_are_the_published_ones(kind, name):
    one = case(kind, name)
    if "heun/latent" not in one.io:
        return
    schedule = EDMSchedule()
    times = edm_times(schedule, 5)
    denoiser = preconditioned(one, "edm", (one.labels[0],))
    found = run(heun(denoiser, schedule, one.io["heun/latent"].double() * times[0], times))
    torch.testing.assert_close(found, one.io["heun/final"], rtol=0, atol=2e-4 * float(one.io["heun/final"].abs().max()))


@pytest.mark.parametrize(
    ("kind", "name"), [("song", "ddpmpp_cond_aug"), ("song", "skip_skip"), ("dhariwal", "adm_cond")]
)
@torch.no_grad()
def test_stages_use_the_parts_that_the_network_names(kind, name):
    one = case(kind, name)
    x, t, (labels, augment) = one.io["x"], one.io["noise_labels"], one.labels
    parts = find_parts(one.net)
    emb = one.net.condition(t, None, labels, augment)
    whole = one.net.readout(one.net.features(x, emb))
    assert torch.equal(whole, one.net(x, t, labels, augment))
    named = dict(one.net.named_parameters())
    acts_first = {key for key in named if key.startswith("map_")}
    assert {key for key in named if any(key.startswith(p.rstrip("*")) for p in parts.condition)} == acts_first
    # The output is affine in the last layer's input: another bias moves it by that bias.
    assert set(parts.taps) >= {"in_1", "mid", "out_1"}
    assert parts.last_layer == one.net.out_names[1]
    bias = f"{one.net.out_names[1]}.bias"
    moved = torch.func.functional_call(one.net, {bias: named[bias] + 1}, (x, t, labels, augment))
    torch.testing.assert_close(moved, whole + 1)
    assert set(activations(one.net, parts.taps, x, t, labels, augment)) == set(parts.taps)


@torch.no_grad()
def test_labels_are_whole_numbers_or_weights_and_the_last_is_the_null_class():
    one = case("song", "ddpmpp_cond_aug")
    x, t, augment = one.io["x"], one.io["noise_labels"], one.io["augment_labels"]
    hot = torch.zeros(2, 10)
    hot[0, 3] = 1
    by_number = one.net(x, t, y=torch.tensor([3, 10]))
    assert torch.equal(by_number, one.net(x, t, hot))
    torch.testing.assert_close(by_number[1:], one.net(x[1:], t[1:]))
    torch.testing.assert_close(one.net(x, t, y=torch.cat([hot, augment], 1)), one.net(x, t, hot, augment))
    table = find_parts(one.net).class_tables
    (axis,) = table.values()
    assert one.net.get_parameter(next(iter(table))).shape[axis] == 10
    with pytest.raises(ValueError, match=r"0\.\.10"):
        one.net(x, t, torch.tensor([3, 11]))
    with pytest.raises(ValueError, match="weights"):
        one.net(x, t, torch.zeros(2, 4))
    plain = case("dhariwal", "adm_uncond_aug")
    assert torch.equal(plain.net(x, t, y=augment), plain.net(x, t, augment_labels=augment))
    with pytest.raises(ValueError, match="no classes"):
        plain.net(x, t, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="augmentation labels must be"):
        plain.net(x, t, y=hot)
    with pytest.raises(ValueError, match="multiples of 2"):
        one.net(x[..., :7], t)


@pytest.mark.parametrize(("kind", "name"), [("song", "ncsnpp_cond"), ("dhariwal", "adm_cond")])
def test_members_and_tangents_run_under_torch_func(kind, name):
    one = case(kind, name)
    x, t, y = one.io["x"], one.io["noise_labels"], torch.tensor([1, 10])
    (key,) = find_parts(one.net).class_tables
    table = torch.stack([one.net.get_parameter(key), 2 * one.net.get_parameter(key)])

    def member(row):
        return torch.func.functional_call(one.net, {key: row}, (x, t), {"y": y})

    torch.testing.assert_close(torch.func.vmap(member)(table)[0], one.net(x, t, y=y), rtol=1e-4, atol=1e-5)
    direction = torch.randn(x.shape, generator=generator("edm tangents"))
    _, slope = torch.func.jvp(lambda z: one.net(z, t, y=y), (x,), (direction,))
    ahead, behind = (one.net.double()(x.double() + h * direction.double(), t, y=y) for h in (1e-4, -1e-4))
    one.net.float()
    torch.testing.assert_close(slope.double(), (ahead - behind) / 2e-4, rtol=0, atol=1e-3 * float(slope.abs().max()))


def test_label_dropout_drops_in_training_only():
    net = SongUNet(8, 1, 1, label_dim=2, model_channels=8, channel_mult=(1,), num_blocks=1, label_dropout=1.0)
    t = torch.ones(1)
    dropped, null = (net.train().condition(t, torch.tensor([label])) for label in (0, 2))
    assert torch.equal(dropped, null)
    assert not torch.equal(net.eval().condition(t, torch.tensor([0])), null)
    with pytest.raises(ValueError, match="encoder_type"):
        SongUNet(8, 1, 1, encoder_type="none")


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_levels_without_blocks_keep_the_width_that_came_down(kind):
    """With num_blocks 0 the lowest level has the width of the level above it, as the published loop leaves it."""
    network = kind(img_resolution=8, in_channels=3, out_channels=3, model_channels=8, channel_mult=[1, 3], num_blocks=0)
    first = network.enc["8x8_conv"].out_channels
    assert network.dec["4x4_in0"].in_channels == network.dec["4x4_in1"].out_channels == first
    assert network.dec["4x4_block0"].in_channels == 2 * first
    assert network(torch.zeros(1, 3, 8, 8), torch.zeros(1), None).shape == (1, 3, 8, 8)
