"""DDPM's UNet as a pixel model: the list that DDIM's training writes, read safely; sampling; its small variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict
from ldm.diffusion.noise import ImageNoise
from ldm.pipelines import build_model, load_model
from ldm.training.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "ddim" / "celeba64.yaml"
SMALL = [
    "model.params.image_size=8",
    "model.params.unet_config.params.ch=32",
    "model.params.unet_config.params.ch_mult=[1,1]",
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.attn_resolutions=[4]",
    "model.params.unet_config.params.resolution=8",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small config and file in DDIM's layout, where the averages are half of the weights."""
    folder = tmp_path_factory.mktemp("ddim")
    config = load_config([str(CONFIG)], SMALL)
    OmegaConf.save(config, folder / "small.yaml")
    state = build_model(config).model.diffusion_model.state_dict()
    optimiser = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    averages = {name: value / 2 for name, value in state.items()}
    content = [{f"module.{name}": value for name, value in state.items()}, optimiser, 7, 4000]
    torch.save([*content, averages], folder / "ckpt.pth")
    torch.save(content, folder / "plain.pth")
    torch.save(state, folder / "bare.pth")
    torch.save([1, 2], folder / "list.pth")
    return folder, state


def load(folder: Path, name: str, **options):
    return load_model(base=folder / "small.yaml", ckpt=folder / name, device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "ema", "factor"),
    [("ckpt.pth", True, 0.5), ("ckpt.pth", False, 1.0), ("plain.pth", True, 1.0), ("bare.pth", True, 1.0)],
)
def test_its_published_files_load_as_they_are(files, name, ema, factor):
    folder, state = files
    found = load(folder, name, ema=ema).model.model.diffusion_model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], factor * state[key]) for key in state)


@torch.no_grad()
def test_ddim_steps_are_the_published_ones(files):
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps from times 500 to 0, betas in equal steps, times from 0."""
    model = load(files[0], "bare.pth").model
    noise = ImageNoise(0, (0,))
    found = model.sample(None, noise, model.sampling_times(2, "published"))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x, times = noise.initial((1, 3, 8, 8)), [501, 1]  # latent-diffusion's times of two steps
    for time, after in zip(times, [abar[1], abar[0]], strict=True):
        eps = model.model.diffusion_model(x, torch.tensor([float(time)]))
        x0 = (x - (1 - abar[time]).sqrt() * eps) / abar[time].sqrt()
        x = (after.sqrt() * x0 + (1 - after).sqrt() * eps).float()
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_list_of_something_else_is_refused(files):
    with pytest.raises(ValueError, match="DDIM's training"):
        load(files[0], "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_state_dict(files[0] / "ckpt.pth")
