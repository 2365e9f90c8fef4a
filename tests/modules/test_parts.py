"""The parts that networks name, and those that are found of a module that names none."""

import pytest
import torch
from torch import nn

from ldm.ensembles.heads import select
from ldm.modules import ddpmpp
from ldm.modules.diffusionmodules.ddpm_unet import Model
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.modules.dit import DiT
from ldm.modules.edm import DhariwalUNet, SongUNet
from ldm.modules.parts import LAYERS, Parts, find_parts
from ldm.util import generator


def test_a_module_that_names_nothing_has_its_last_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 1, 3), nn.Tanh())
    assert find_parts(network) == Parts(output=("2.*",), last_layer="2")
    assert find_parts(nn.Tanh()) == Parts()


def test_parts_of_a_network_inside_another_module_have_its_names():
    inner = Parts({"label.weight": 1}, ("time.*",), ("time.*", "label.*"), ("out.*",), "out.2", taps={"mid": "middle"})
    outer = inner.below("model.")
    assert outer.class_tables == {"model.label.weight": 1}
    assert outer.condition == ("model.time.*", "model.label.*")
    assert (outer.last_layer, outer.taps) == ("model.out.2", {"mid": "model.middle"})
    assert inner.below("") == inner


UNET = {
    "image_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
    "num_heads": 1,
    "use_scale_shift_norm": True,
}
NETWORKS = {
    "ldm": lambda: UNetModel(**UNET),
    "adm": lambda: UNetModel(**UNET, num_classes=5),
    "codes": lambda: UNetModel(**UNET, n_embed=7),
    "ddae": lambda: ddpmpp.UNet([1, 8, 8], 32, [1], [False], n_blocks=1, augment_dim=3),
    "dit": lambda: DiT(8, 2, 1, 16, 1, 2, num_classes=4),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_named_parts_are_those_that_act(kind):
    """By autograd: a stage's patterns are the parameters that its output depends on, those of the others not."""
    network = NETWORKS[kind]().eval().requires_grad_(True)
    draw_parameters(network)
    parts = find_parts(network)
    x, t = torch.randn(2, 1, 8, 8, generator=generator("x")), torch.tensor([3.0, 40.0])
    labels = {"adm": torch.tensor([1, 2]), "dit": torch.tensor([1, 4]), "ddae": torch.ones(2, 3)}.get(kind)
    emb = network.condition(t, labels)
    features = network.features(x, emb.detach())
    output = network.readout(features.detach())
    assert torch.equal(output, network(x, t, y=labels))
    names = dict(network.named_parameters())
    assert reached(network, emb) == set(select(names, parts.condition))
    assert reached(network, output) == set(select(names, parts.output)) >= {f"{parts.last_layer}.weight"}
    assert set(parts.time_embedding) <= set(parts.condition)
    assert set(parts.class_tables) <= set(select(names, parts.condition))
    assert isinstance(network.get_submodule(parts.last_layer), LAYERS)
    modules = dict(network.named_modules())
    assert parts.taps and all(name in modules for name in parts.taps.values())


def draw_parameters(network):
    """Give a network parameters none of which is zero."""
    source = generator("parts")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) / parameter[0].numel() ** 0.5)


def reached(network, value):
    """Names of the parameters that a value depends on."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value.square().sum(), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def test_a_classifier_names_its_readout():
    classifier = EncoderUNetModel(**{**UNET, "out_channels": 5})
    parts = find_parts(classifier)
    assert parts.last_layer == "out.3" and parts.output == ("out.*",) and list(parts.taps) == ["in_0", "in_1", "mid"]


SIZED = {
    "UNetModel": lambda: UNetModel(
        image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1, num_heads=1,
        attention_resolutions=[2], channel_mult=[1, 2, 2],
    ),
    "Model": lambda: Model(
        ch=32, out_ch=1, ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[4], in_channels=1, resolution=8
    ),
    "SongUNet": lambda: SongUNet(8, 1, 1, model_channels=8, channel_mult=[1, 1, 2], num_blocks=1, attn_resolutions=[4]),
    "DhariwalUNet": lambda: DhariwalUNet(8, 1, 1, model_channels=8, channel_mult=[1, 1, 2], num_blocks=1),
    "UNet": lambda: ddpmpp.UNet([1, 8, 8], 32, ch_mults=[1, 1, 2], is_attn=[False, False, True], n_blocks=1),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_unets_say_what_they_halve_sizes_by(name):
    """They take every multiple of it, square or not, and no other size."""
    network, t = SIZED[name](), torch.ones(1)
    given = (None,) if name in ("SongUNet", "DhariwalUNet") else ()
    assert network.size_multiple == 4
    assert network(torch.zeros(1, 1, 4, 12), t, *given).shape == (1, 1, 4, 12)
    with pytest.raises(ValueError, match="multiples of 4"):
        network(torch.zeros(1, 1, 8, 6), t, *given)
