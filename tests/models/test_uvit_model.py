"""U-ViT as a latent diffusion model: its published file alone, its first stage, samples under guidance, heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.diffusion.noise import ImageNoise
from ldm.pipelines import build_model, load_model
from ldm.settings import Speed
from ldm.training.config import load_config, read_config
from ldm.util import instantiate_from_config

CONFIGS = Path(__file__).parents[2] / "configs" / "uvit"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small pipeline of the released layout: the network's file alone, and that of a small KL first stage."""
    folder = tmp_path_factory.mktemp("uvit")
    config = read_config(CONFIGS / "imagenet256.yaml")
    params = config.model.params
    params.image_size = params.unet_config.params.img_size = 8
    params.unet_config.params.update({"embed_dim": 32, "depth": 2, "num_heads": 2})
    stage = params.first_stage_config.params
    stage.ddconfig.update({"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1})
    stage.ckpt_path = str(folder / "stage.pth")
    OmegaConf.save(config, folder / "tiny.yaml")
    fresh = build_model(config)
    save_checkpoint(fresh.model.diffusion_model.state_dict(), folder / "uvit.pth")
    save_checkpoint(fresh.first_stage_model.state_dict(), folder / "stage.pth")
    pipeline = load_model(base=folder / "tiny.yaml", ckpt=folder / "uvit.pth", speed=Speed(chunk=2), device="cpu")
    for name, value in fresh.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], value), name
    return pipeline


@torch.no_grad()
def test_the_network_alone_samples_with_its_guidance(pipeline):
    """The config's scale 1.4 is the published eps_c + 0.4 (eps_c - eps_u), and the last step is told time 1."""
    model, labels = pipeline.model, torch.tensor([3, 7])
    assert pipeline.scale == 1.4
    assert model.null_class == 1000
    x = ImageNoise(0, (0, 1)).initial((2, 4, 8, 8))
    net, time = model.model.diffusion_model, torch.ones(2)
    conditional, null = net(x, time, labels), net(x, time)
    expected = conditional + 0.4 * (conditional - null)
    found = model.denoiser(labels, pipeline.scale)(x, 1.0).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_its_digits_train_one_class_row_at_a_time():
    """One step of the small config: the loss reaches every parameter of the network but the null class's row."""
    config = load_config([str(CONFIGS / "digits.yaml")])
    config.model.params.use_ema = False
    model = instantiate_from_config(config.model).eval()
    data = instantiate_from_config(config.data.params.train)
    items = [data[index] for index in range(4)]
    x0 = torch.stack([torch.as_tensor(item["image"]).float() for item in items]).movedim(-1, 1)
    labels = torch.tensor([int(item["class_label"]) for item in items])
    loss, _ = model.p_losses(x0, labels, torch.tensor([0, 99, 500, 999]), torch.ones_like(x0))
    loss.backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    rows = gradients["diffusion_model.label_emb.weight"].abs().sum(1)
    assert (rows > 0).nonzero().flatten().tolist() == sorted(set(labels.tolist()))
