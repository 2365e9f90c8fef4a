"""Images that are wider than high: every network trains on them, samples them and maps its uncertainty of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import Sampling
from ldm.commands.line import run_command
from ldm.data.base import Crop
from ldm.data.digits import Digits
from ldm.data.folder import ImageFolder
from ldm.data.pictures import cover_size
from ldm.modules.dit import grid_positions
from ldm.pipelines import ModelPipeline, PosteriorPipeline, build_model
from ldm.pipelines.fitting import LaplacePlan
from ldm.pipelines.loading import make_pipeline
from ldm.util import generator, read_image_size
from tests.test_cross_table import NETWORKS, fill, make_config

SIZE = [8, 16]
# Where a network's arguments say the size of its images.
ARGUMENTS = {"image_size", "img_resolution", "img_size", "input_size", "resolution", "sample_size", "image_shape"}
WIDE = [kind for kind in NETWORKS if NETWORKS[kind][0]]


def widen(kind):
    """The config of a tiny network of the cross table, for images of 8 x 16 pixels."""
    config = copy.deepcopy(make_config(kind))
    params = config["model"]["params"]
    params["image_size"] = SIZE
    given = params["unet_config"]["params"]
    for name in ARGUMENTS & set(given):
        given[name] = [1, *SIZE] if name == "image_shape" else SIZE
    if "pos_embed_max_size" in given:
        given["pos_embed_max_size"] = SIZE[1] // 2  # patches
    return config


def load(kind):
    if NETWORKS[kind][0].startswith("diffusers."):
        pytest.importorskip("diffusers")
    config = widen(kind)
    model = fill(build_model(config))
    return make_pipeline(ModelPipeline, model, config, None, Sampling(steps=2), None, "cpu")


@pytest.mark.parametrize("kind", WIDE)
def test_a_network_trains_samples_and_maps(kind):
    pipeline = load(kind)
    data = [Digits("test", image_size=SIZE)[index] for index in range(2)]
    model = copy.deepcopy(pipeline.model).train()
    model.model.requires_grad_(True)
    model.seed_draws(0, 0)
    batch = {"image": torch.stack([item["image"] for item in data])}
    batch["class_label"] = torch.tensor([item["class_label"] for item in data])
    loss, _ = model.shared_step(batch, model.draws, 0, range(2))
    loss.backward()
    assert bool(loss.isfinite())
    posterior = PosteriorPipeline(pipeline, LaplacePlan(draws=1).fit(pipeline, data, range(2)), draws=2)
    *_, last = posterior.steps("persistent", [3] if pipeline.n_classes else None, [0])
    assert last.step.x_next.shape == last.var.shape == (1, 1, *SIZE)
    assert bool(last.var.isfinite().all()) and float(last.var.mean()) > 0


def test_positions_of_a_grid_are_those_of_a_square_one_that_holds_it():
    whole = grid_positions(16, 5).unflatten(0, (5, 5))
    assert torch.equal(grid_positions(16, (3, 5)).unflatten(0, (3, 5)), whole[:3])


@pytest.mark.parametrize("wrong", ["large", None, [8, 8, 8], 0, True, 8.0, [8, "16"]])
def test_what_is_no_size_is_one_sentence(wrong):
    with pytest.raises(ValueError, match="image_size must be a number of pixels, or"):
        read_image_size(OmegaConf.create({"size": wrong}).size)
    with pytest.raises(ValueError, match="image_size must be"):
        Digits("test", image_size=wrong)
    config = make_config("LDM")
    config["model"]["params"]["image_size"] = wrong
    with pytest.raises(ValueError, match="image_size must be"):
        build_model(config)


def test_files_are_scaled_to_cover_a_size_and_cut(tmp_path):
    """A ramp from left to right of 20 x 20 pixels at 8 x 16: rows are cut, columns kept."""
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.linspace(0, 255, 20), (20, 1)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a" / "1.png")
    item = ImageFolder(str(tmp_path), image_size=SIZE, channels=1)[0]["image"]
    assert item.shape == (8, 16, 1)
    expected = torch.linspace(-1, 1, 20).unflatten(0, (4, 5)).mean(1)  # of each quarter
    torch.testing.assert_close(item[0, :, 0].unflatten(0, (4, 4)).mean(1), expected, rtol=0, atol=0.02)
    assert cover_size((20, 40), (8, 16)) == (8, 16) and cover_size((40, 20), (8, 16)) == (32, 16)
    image = torch.arange(6.0).reshape(2, 3, 1)
    assert Crop((1, 2))(image, generator("crop"))[..., 0].tolist() == [[0.0, 1.0]]


def test_commands_take_and_write_images_that_are_not_square(tmp_path):
    """A training and its samples; maps are those of the pipelines above."""
    config = widen("LDM")
    data = {"target": "ldm.data.digits.Digits", "params": {"split": "test", "image_size": SIZE}}
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 4, "num_workers": 0, "train": data, "validation": data},
    }
    config["lightning"] = {"trainer": {"max_steps": 1, "limit_val_batches": 1, "enable_progress_bar": False}}
    config["model"]["base_learning_rate"] = 1e-4
    OmegaConf.save(OmegaConf.create(config), tmp_path / "wide.yaml")
    logs = tmp_path / "logs"
    words = ["-t", "--base", tmp_path / "wide.yaml", "--gpus", "0,", "--logdir", logs, "--scale_lr", "False"]
    run_command("train", list(map(str, words)))
    (run,) = logs.iterdir()
    given = ["--run", run, "--device", "cpu"]
    run_command("sample model", [*map(str, [*given, "--n", 2, "--steps", 1, "--out", tmp_path / "s"])])
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (2, *SIZE, 1)
