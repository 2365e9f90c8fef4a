"""Configs of ADM models: sizes as published, schedules, scaling by number of steps, and sampling at a tiny width."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.diffusion.denoiser import NetworkDenoiser, clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, published_scaling, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ancestral, run
from ldm.training.config import load_config, read_config
from ldm.util import instantiate_from_config
from tests.conftest import golden_tensors
from tests.models.test_released import CONFIGS, meta_model, parameters

FOLDER = CONFIGS / "guided-diffusion"
# name -> (parameters of the published network, labels, mean lambda of the published 20-step slope).
MODELS = {
    "cifar10-32": (57_094_662, False, 1.02375),
    "lsun-tower-64": (295_136_454, False, 1.0110),
    "ffhq-128": (542_811_398, False, 1.0080),
    "imagenet-64": (295_904_454, True, 1.0060),
    "imagenet-128": (421_529_606, True, 1.0050),
}
TINY = ["model.params.unet_config.params.model_channels=32", "model.params.image_size=32", "model.params.use_ema=false"]
TINY += ["model.params.unet_config.params.num_res_blocks=1", "model.params.unet_config.params.num_head_channels=32"]


# name -> (channels, multiples by level, residual blocks a level, downsamplings with attention), from the commands.
BUILT = {
    "cifar10-32": (128, (1, 2, 2, 2), 3, (2, 4)),
    "lsun-tower-64": (192, (1, 2, 3, 4), 3, (2, 4, 8)),
    "ffhq-128": (256, (1, 1, 2, 3, 4), 3, (4, 8, 16)),
    "imagenet-64": (192, (1, 2, 3, 4), 3, (2, 4, 8)),
    "imagenet-128": (256, (1, 1, 2, 3, 4), 2, (4, 8, 16)),
}


def published_keys(width, multiples, blocks, attended, classes):
    """{key: shape} of guided-diffusion's UNet with resblock_updown, scale and shift, and six output channels."""
    keys = {}

    def put(name, *shape):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = shape, shape[:1]

    def block(name, inner, outer, attention=False):
        put(f"{name}.0.in_layers.0", inner)
        put(f"{name}.0.in_layers.2", outer, inner, 3, 3)
        put(f"{name}.0.emb_layers.1", 2 * outer, 4 * width)
        put(f"{name}.0.out_layers.0", outer)
        put(f"{name}.0.out_layers.3", outer, outer, 3, 3)
        if inner != outer:
            put(f"{name}.0.skip_connection", outer, inner, 1, 1)
        if attention:
            put(f"{name}.1.norm", outer)
            put(f"{name}.1.qkv", 3 * outer, outer, 1)
            put(f"{name}.1.proj_out", outer, outer, 1)

    def renamed(old, new):
        for key in [key for key in keys if key.startswith(old)]:
            keys[new + key.removeprefix(old)] = keys.pop(key)

    put("time_embed.0", 4 * width, width)
    put("time_embed.2", 4 * width, 4 * width)
    if classes:
        keys["label_emb.weight"] = (classes, 4 * width)
    put("input_blocks.0.0", width, 3, 3, 3)
    here, skips = width, [width]
    for level, multiple in enumerate(multiples):
        for _ in range(blocks):
            block(f"input_blocks.{len(skips)}", here, multiple * width, 2**level in attended)
            here = multiple * width
            skips.append(here)
        if level + 1 < len(multiples):
            block(f"input_blocks.{len(skips)}", here, here)
            skips.append(here)
    block("middle_block", here, here, attention=True)
    block("last", here, here)
    renamed("last.0.", "middle_block.2.")
    number = 0
    for level, multiple in reversed(list(enumerate(multiples))):
        for place in range(blocks + 1):
            attention = 2**level in attended
            block(f"output_blocks.{number}", here + skips.pop(), multiple * width, attention)
            here = multiple * width
            if level and place == blocks:
                block("up", here, here)
                renamed("up.0.", f"output_blocks.{number}.{1 + attention}.")
            number += 1
    put("out.0", here)
    put("out.2", 6, here, 3, 3)
    return keys


@pytest.mark.parametrize("name", MODELS)
def test_keys_shapes_and_sizes_are_the_published_ones(name):
    model = meta_model(FOLDER / f"{name}.yaml")
    count, labelled, _ = MODELS[name]
    assert parameters(model.model) == count
    found = {key: tuple(value.shape) for key, value in model.model.diffusion_model.state_dict().items()}
    assert found == published_keys(*BUILT[name], 1000 if labelled else None)
    assert (model.n_classes, model.null_class) == ((1000 if labelled else None), None)
    assert parameters(model.cond_stage_model or torch.nn.Identity()) == 0, "labels are embedded by the network"


@pytest.mark.parametrize("name", MODELS)
def test_scaling_is_published_for_20_50_and_100_steps(name):
    config = read_config(FOLDER / f"{name}.yaml")
    entries = OmegaConf.to_container(config.epsilon_scaling)
    assert all(1 < published_scaling(entries, steps).b < 1.02 for steps in (20, 50, 100))
    slope = published_scaling(entries, 20, linear=True)
    assert slope.b + 9.5 * slope.k == pytest.approx(MODELS[name][2], abs=5e-5)


@pytest.mark.parametrize(("name", "schedule"), [("cifar10-32", "cosine"), ("imagenet-128", "linear")])
def test_an_adm_model_samples_with_learned_variance_and_scaling(name, schedule):
    """Every part in order at a tiny width: network, scaling, clipping, ancestral steps; the schedule is ADM's."""
    model = instantiate_from_config(load_config([str(FOLDER / f"{name}.yaml")], TINY).model).eval()
    expected = golden_tensors("es")[f"schedule/betas_{schedule}_1000"]
    torch.testing.assert_close(model.schedule.betas, expected.double(), rtol=1e-6, atol=1e-9)
    cond, times = (torch.tensor([3]) if MODELS[name][1] else None), model.sampling_times("2")
    denoiser = NetworkDenoiser(model.network, model.schedule, model.target, cond, learned_range=True)
    wrapped = clipped(scaled(denoiser, model.schedule, EpsilonScaling(1.017), times), model.schedule)
    noise = ImageNoise(0, (0,))
    x = noise.initial((1, *model.latent_shape))
    images = run(ancestral(wrapped, model.schedule, x, times, variance="learned_range", noise=noise))
    assert images.shape == (1, 3, 32, 32) and float(images.abs().max()) <= 1


def test_the_published_classifier_and_the_one_that_trains_are_the_same():
    published, trains = (
        load_config([str(FOLDER / f"imagenet-128-classifier{name}.yaml")]).model for name in ("", "-training")
    )
    own = OmegaConf.to_container(trains.params.classifier_config)
    given = OmegaConf.to_container(published)
    given["params"].pop("use_fp16")
    assert own == given
    guided = load_config([str(FOLDER / "imagenet-128.yaml")]).model.params
    assert (trains.params.beta_schedule, trains.params.timesteps) == (guided.beta_schedule, guided.timesteps)


def test_the_classifier_is_the_published_one():
    """128 to 8 pixels in five levels of widths 128, 128, 256, 384, 512; 1,000 logits from an attention pool."""
    model = meta_model(FOLDER / "imagenet-128-classifier.yaml")
    assert model.out[2].positional_embedding.shape == (512, 8 * 8 + 1)
    assert model.out[2].c_proj.weight.shape == (1000, 512, 1)
    assert model.out[2].heads == 8 and model.input_blocks[0][0].weight.shape == (128, 3, 3, 3)
