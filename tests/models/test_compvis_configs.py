"""latent-diffusion's 32 YAML files: every model section builds, at full width and without storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.released import read_keys
from ldm.util import instantiate_from_config
from tests.models.test_released import KEYS, count_by_hand, parameters

FILE = Path(__file__).parents[1] / "fixtures" / "compvis_models.yaml"
MODELS = yaml.safe_load(FILE.read_text())["models"]
# One file of each group with the same section.
DISTINCT = {json.dumps(section, sort_keys=True): name for name, section in reversed(MODELS.items())}
# Parameters of the UNet and of the condition's encoder, to the last digit, by the published code.
COUNTS = {
    "configs/latent-diffusion/cin256-v2": (400_920_579, 512_512),
    "configs/latent-diffusion/txt2img-1p4B-eval": (872_300_484, 581_994_042),
    "models/ldm/text2img256": (403_623_939, 186_154_682),
    "models/ldm/layout2img-openimages256": (246_277_379, 58_858_496),
    "models/ldm/bsr_sr": (113_622_563, 0),
    "models/ldm/inpainting_big": (387_245_827, 53_219_486),
    "models/ldm/semantic_synthesis256": (215_229_315, 546),
    "models/ldm/semantic_synthesis512": (215_229_315, 546),
}
# The UNet's size in millions by the paper (Rombach et al. 2022, tables 12 to 15).
MILLIONS = {"celebahq-ldm-vq-4": 274, "ffhq256": 274, "celeba256": 274, "lsun_churches": 294, "cin-ldm-vq-f8": 395}


def build(section: dict) -> nn.Module:
    """The model of a section at full width, without storage."""
    with torch.device("meta"):
        return instantiate_from_config(section)


def test_there_are_32():
    assert len(MODELS) == 32 and len(DISTINCT) == 22
    folders = [name.rpartition("/")[0] for name in MODELS]
    assert {folder: folders.count(folder) for folder in folders} == {
        "configs/autoencoder": 4,
        "configs/latent-diffusion": 7,
        "configs/retrieval-augmented-diffusion": 1,
        "models/first_stage_models": 9,
        "models/ldm": 11,
    }


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_every_model_section_builds(name):
    section = MODELS[name]
    model = build(section)
    if not isinstance(model, LatentDiffusion):
        assert parameters(model) - parameters(model.loss) == count_by_hand(section["params"])
        return
    stage = section["params"]["first_stage_config"]["params"]
    assert parameters(model.first_stage_model) == count_by_hand(stage)
    unet = parameters(model.model.diffusion_model)
    encoder = 0 if model.cond_stage_model is None else parameters(model.cond_stage_model)
    if name in COUNTS:
        assert (unet, encoder) == COUNTS[name]
    for word, millions in MILLIONS.items():
        assert word not in name or unet / 1e6 == pytest.approx(millions, abs=1)
    if name.endswith("768x768"):
        assert parameters(model) == 1_405_091_363
    assert model.latent_shape == (section["params"]["channels"], *[section["params"]["image_size"]] * 2)


def test_the_config_of_decus_published_ensemble():
    """nwaftp23/DECU, cin_ensemble.yaml: cin256-v2 with the keys that it adds, which act on nothing here."""
    section = json.loads(json.dumps(MODELS["configs/latent-diffusion/cin256-v2"]))
    section["params"]["unet_config"]["params"]["ensemble_size"] = 10
    section["params"]["cond_stage_config"]["params"] |= {"ensemble_size": 10, "lora": False}
    section["base_learning_rate"] = 1e-4
    shapes = {name: tuple(value.shape) for name, value in build(section).state_dict().items()}
    assert list(shapes.items()) == list(read_keys(KEYS).items())
