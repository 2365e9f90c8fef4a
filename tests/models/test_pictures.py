"""Training on conditions that are pictures: steps, averages, logged images, hybrid conditions, joint members."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.diffusion.noise import ImageNoise
from ldm.models.diffusion.pictures import picture_condition
from ldm.training.config import load_config
from ldm.util import generator, instantiate_from_config
from tests.conftest import assert_near, tiny_model

CONFIG = Path(__file__).parents[2] / "configs" / "inpainting" / "digits.yaml"


@pytest.fixture(scope="module")
def model():
    """The digits' inpainting network, none of whose layers is zero."""
    model = instantiate_from_config(load_config([str(CONFIG)]).model).eval()
    source = generator("pictures")
    for parameter in model.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.fixture(scope="module")
def batch():
    data = instantiate_from_config(load_config([str(CONFIG)]).data.params.train)
    items = [data[index] for index in range(3)]
    return {name: torch.stack([item[name] for item in items]) for name in ("image", "masked_image", "mask")}


def test_in_pixels_the_condition_is_the_picture_and_its_mask(model, batch):
    c = model.embed_condition(batch, torch.ones(3))
    assert torch.equal(c, torch.cat([batch["masked_image"], batch["mask"]], 3).movedim(-1, 1))
    x, t = torch.randn(3, 1, 8, 8, generator=generator("x")), torch.tensor([5, 50, 500])
    direct = model.model.diffusion_model(torch.cat([x, c], 1), t)
    assert_near(model.apply_model(x, t, c), direct)
    assert_near(model.network(x, t, c), direct)


@torch.no_grad()
def test_logged_images_show_the_condition_and_what_is_filled_in(model, batch):
    shown = model.log_images(batch, ddim_steps=2)
    assert list(shown) == ["inputs", "reconstruction", "conditioning", "samples"]
    assert torch.equal(shown["conditioning"], batch["masked_image"].movedim(-1, 1))
    c = model.embed_condition(batch, torch.ones(3))
    noise = ImageNoise(0, (0, 1, 2))
    with model.ema_scope():
        assert_near(shown["samples"], model.sample(c, noise, model.sampling_times(2)))


def test_a_hybrid_model_takes_a_context_and_a_picture(batch):
    params = {"conditioning_key": "hybrid", "picture_key": "masked_image"}
    spec = {"image_size": 8, "in_channels": 3, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1,
            "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
            "context_dim": 8}  # fmt: skip
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": 4, "embed_dim": 8}}
    model = instantiate_from_config({
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            **params, "cond_stage_key": "class_label", "channels": 1, "image_size": 8, "use_ema": False,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": spec},
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}, "cond_stage_config": stage,
        },
    }).eval()  # fmt: skip
    batch = {**batch, "class_label": torch.tensor([0, 1, 2])}
    cond = model.embed_condition(batch, torch.ones(3))
    picture = torch.cat([batch["masked_image"], batch["mask"]], 3).movedim(-1, 1)
    assert torch.equal(cond["c_concat"][0], picture)
    assert torch.equal(cond["c_crossattn"][0], model.cond_stage_model.embed(batch["class_label"]))
    loss, _ = model.p_losses(model.get_input(batch, "image"), cond, torch.tensor([1, 2, 3]), torch.ones(3, 1, 8, 8))
    loss.backward()
    assert model.cond_stage_model.embedding.weight.grad is None, "this stage does not train"
    assert model.log_images(batch, ddim_steps=1)["samples"].shape == (3, 1, 8, 8)
    model.picture_key = None
    with pytest.raises(ValueError, match="picture_key"):
        model.embed_condition(batch, torch.ones(3))


def test_a_model_of_classes_takes_no_pictures():
    with pytest.raises(ValueError, match="takes no pictures"):
        picture_condition(tiny_model())
