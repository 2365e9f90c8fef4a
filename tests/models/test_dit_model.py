"""DiT as a latent diffusion model: its published file alone, its first stage, samples, features, fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.diffusion.noise import ImageNoise
from ldm.evaluation.finetuning import Tuning, tune
from ldm.evaluation.taps import Reading, resolve_taps
from ldm.pipelines import build_model, load_model, load_weights
from ldm.pipelines.features import DataStates, make_backbone
from ldm.settings import Speed
from ldm.training.config import read_config
from ldm.util import instantiate_from_config

CONFIG = Path(__file__).parents[2] / "configs" / "ddae" / "dit-xl-2-cifar10.yaml"
DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train", "image_size": 32}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small DiT pipeline from a file of the network alone, on digits through a small KL first stage."""
    folder = tmp_path_factory.mktemp("dit")
    config = read_config(CONFIG)
    params = config.model.params
    params.image_size = params.unet_config.params.input_size = 8
    params.unet_config.params.update({"hidden_size": 32, "depth": 3, "num_heads": 2})
    stage = params.first_stage_config.params
    stage.ddconfig.update({"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "in_channels": 1, "out_ch": 1})
    stage.ckpt_path = str(folder / "stage.ckpt")
    config.data.params.train = config.data.params.validation = DIGITS
    OmegaConf.save(config, folder / "tiny.yaml")
    fresh = build_model(config)
    save_checkpoint(fresh.model.diffusion_model.state_dict(), folder / "dit.pt")
    save_checkpoint({"state_dict": fresh.first_stage_model.state_dict()}, folder / "stage.ckpt")
    source = {"base": folder / "tiny.yaml", "ckpt": folder / "dit.pt"}
    pipeline = load_model(**source, speed=Speed(chunk=1), device="cpu")
    for name, value in fresh.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], value), name
    return pipeline


@torch.no_grad()
def test_samples_of_classes_under_guidance(pipeline):
    model = pipeline.model
    assert model.null_class == 1000
    noise = ImageNoise(0, (0, 1))
    samples = model.sample(torch.tensor([3, 7]), noise, model.sampling_times(4), scale=2.0)
    assert samples.shape == (2, 4, 8, 8)
    # A fresh network predicts no noise, so the state only loses its scale: x_0 = x / sqrt(alpha-bar).
    assert torch.allclose(samples[0] / samples[1], noise.initial((2, 4, 8, 8))[0] / noise.initial((2, 4, 8, 8))[1])


def test_features_of_its_blocks_and_fine_tuning(pipeline):
    data = instantiate_from_config(DIGITS)
    states = DataStates(pipeline.model, data, range(24))
    backbone = make_backbone(pipeline.model)
    assert backbone.cond == 1000
    taps = resolve_taps(backbone.network, ["layer-0", "layer-2"])
    reading = Reading((122.0,), taps)
    x0 = states.read(0, 5)
    found = backbone.features(x0, range(5), reading)
    assert {place: tuple(value.shape) for place, value in found.items()} == {
        (122.0, "layer-0"): (5, 32),
        (122.0, "layer-2"): (5, 32),
    }
    one = Reading((122.0,), {"layer-2": taps["layer-2"]})
    accuracy = tune(backbone, one, states, np.arange(24), states, 10, Tuning(1, 8), seed=0)
    assert 0 <= accuracy <= 1


def test_a_network_alone_needs_its_first_stage(pipeline, tmp_path):
    config = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(pipeline.config), resolve=True))
    del config.model.params.first_stage_config.params.ckpt_path
    OmegaConf.save(config, tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="first stage"):
        load_model(base=tmp_path / "none.yaml", ckpt=pipeline.checkpoint, device="cpu")
    load_weights(build_model(config), pipeline.checkpoint, config=pipeline.config)
