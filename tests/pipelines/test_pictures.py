"""Pictures in place of classes: lists of files with masks, pipelines whose k-th class is the k-th picture, commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.commands.conditions import PictureConditions
from ldm.commands.laplace_sample import SampleLaplace
from ldm.commands.sample_inpaint import SampleInpaint
from ldm.commands.sample_model import SampleModel
from ldm.commands.shared import ModelSource, Placement, PosteriorSource
from ldm.data.picture_list import PictureList, read_picture_list, read_pictures_apart
from ldm.laplace.storage import save_laplace
from ldm.pipelines import build_model, load_model, observations
from ldm.pipelines.fitting import LaplacePlan
from ldm.pipelines.pictures import read_pictures_for, with_pictures
from ldm.settings import Sampling
from ldm.training.config import load_config
from ldm.util import generator, instantiate_from_config

CONFIG = Path(__file__).parents[2] / "configs" / "inpainting" / "digits.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three grey pictures of 8x8 with a mask each, one picture without, and a small model's config and file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "masks").mkdir()
    (folder / "seen").mkdir()
    draws = np.random.Generator(np.random.PCG64(0))
    for name in ("a", "b", "c", "whole"):
        Image.fromarray(draws.integers(0, 256, (8, 8), np.uint8)).save(folder / "seen" / f"{name}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[2:5, 3:7] = 255
        if name != "whole":
            Image.fromarray(mask).save(folder / "seen" / f"{name}_mask.png")
        Image.fromarray(mask.T).save(folder / "masks" / f"{name}.png")
    config = load_config([str(CONFIG)])
    OmegaConf.save(config, folder / "model.yaml")
    model = build_model(config)
    source = generator("pictures in place of classes")
    for parameter in model.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=source)
    save_checkpoint({"state_dict": model.state_dict()}, folder / "model.ckpt")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    sampling = Sampling(steps=3)
    return load_model(base=folder / "model.yaml", ckpt=folder / "model.ckpt", sampling=sampling, device="cpu")


def test_pictures_are_read_with_the_masks_beside_them_or_in_another_folder(folder):
    found = read_picture_list(folder / "seen", channels=1)
    assert found.names == ("a", "b", "c")
    assert found.pictures.shape == (3, 1, 8, 8) and int((found.masks > 0).sum()) == 3 * 12
    hole = found.masks > 0
    assert bool((found.masked[hole] == -1).all()) and torch.equal(found.masked[~hole], found.pictures[~hole])
    filled = found.fill_in(torch.zeros(3, 1, 8, 8))
    assert torch.equal(filled, torch.where(hole, 0.0, found.pictures))
    other = read_picture_list(folder / "seen", 3, masks=folder / "masks")
    assert other.names == ("a", "b", "c", "whole") and other.pictures.shape == (4, 3, 8, 8)
    assert torch.equal(other.masks[:3], found.masks.mT)
    assert read_picture_list(folder / "seen", 1, size=4).pictures.shape == (3, 1, 4, 4)


def test_label_maps_have_a_channel_a_label():
    values = torch.tensor([[[[0, 1], [2, 1]]]])
    found = PictureList(("one",), values / 127.5 - 1).one_hot(3)
    assert torch.equal(found.pictures, torch.nn.functional.one_hot(values[:, 0], 3).movedim(-1, 1).float())
    with pytest.raises(ValueError, match="2 labels"):
        PictureList(("one",), values / 127.5 - 1).one_hot(2)


def test_lists_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="as many masks"):
        PictureList(("a",), torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no mask of b, c, whole"):
        read_picture_list(folder / "seen", 1, masks=tmp_path)
    Image.new("L", (16, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="several sizes"):
        read_picture_list(tmp_path, 1)
    with pytest.raises(ValueError, match="go with --pictures"):
        PictureConditions(picture_size=8)


@torch.no_grad()
def test_class_k_of_a_pipeline_is_the_kth_picture(pipeline, folder):
    given = read_pictures_for(pipeline, folder / "seen")
    chosen = with_pictures(pipeline, given)
    assert (chosen.n_classes, chosen.class_names, chosen.scale) == (3, ("a", "b", "c"), 1.0)
    found = chosen.sample_latents([2, 0], [0, 1])
    model = pipeline.model
    condition = torch.cat([given.masked, given.masks], 1)[[2, 0]]
    expected = model.sample(condition, pipeline.noise([0, 1]), pipeline.times)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (
        chosen.describe() != with_pictures(pipeline, PictureList(given.names, -given.pictures, given.masks)).describe()
    )


def test_other_sizes_and_models_of_other_conditions(pipeline, folder):
    larger = read_picture_list(folder / "seen", 1, size=16)
    assert with_pictures(pipeline, larger).sample(["b"]).shape == (1, 1, 16, 16)
    assert pipeline.model.image_size == 8
    with pytest.raises(ValueError, match="--pictures"):
        pipeline.sample()
    wide = PictureList(("a",), torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16))
    assert with_pictures(pipeline, wide).sample(["a"]).shape == (1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"pictures of 9 x 8 pixels: height and width must be multiples of 2"):
        with_pictures(pipeline, PictureList(("a",), torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)))
    with pytest.raises(ValueError, match="its mask"):
        with_pictures(pipeline, PictureList(("a",), torch.zeros(1, 1, 8, 8)))


def test_the_command_samples_a_picture_each(pipeline, folder, tmp_path):
    SampleModel(
        ModelSource(base=str(folder / "model.yaml"), ckpt=str(folder / "model.ckpt")),
        str(tmp_path / "out"),
        n_per_class=1,
        conditions=PictureConditions(str(folder / "seen")),
        sampling=Sampling(steps=3),
        place=Placement("cpu"),
    ).run()
    written = np.load(tmp_path / "out" / "samples.npz")
    assert written["arr_0"].shape == (3, 8, 8, 1) and written["arr_1"].tolist() == [0, 1, 2]
    chosen = with_pictures(pipeline, read_pictures_for(pipeline, folder / "seen"))
    expected = chosen.decode(chosen.sample_latents([0, 1, 2], [0, 1, 2]))
    difference = written["arr_0"].astype(float) - 127.5 * (expected.movedim(1, -1).numpy() + 1)
    assert np.abs(difference).max() <= 1


def test_a_posterior_is_fitted_to_pictures_and_seen_per_picture(pipeline, folder, tmp_path):
    """Its rows are the network's on the picture that each image was cut to, and variances exist per picture."""
    data = instantiate_from_config(load_config([str(CONFIG)]).data.params.train)
    (row, *_) = observations(pipeline.model, data, [3, 5], draws=2)
    item = data[5]
    expected = torch.cat([item["masked_image"], item["mask"]], 2).movedim(-1, 0)
    assert torch.equal(row.cond[2], expected) and torch.equal(row.cond[3], expected)
    posterior = LaplacePlan(draws=1).fit(pipeline, data, range(8))
    save_laplace(posterior, tmp_path / "posterior")
    SampleLaplace(
        ModelSource(base=str(folder / "model.yaml"), ckpt=str(folder / "model.ckpt")),
        PosteriorSource(str(tmp_path / "posterior"), draws=2),
        str(tmp_path / "out"),
        n=2,
        conditions=PictureConditions(str(folder / "seen")),
        sampling=Sampling(steps=2),
        place=Placement("cpu"),
    ).run()
    written = np.load(tmp_path / "out" / "samples.npz")
    assert written["arr_1"].tolist() == [0, 1] and written["map"].shape == (2, 8, 8)
    assert bool((written["map"] > 0).all())


def test_holes_are_filled_in_and_the_rest_stays(pipeline, folder, tmp_path):
    source = ModelSource(base=str(folder / "model.yaml"), ckpt=str(folder / "model.ckpt"))
    SampleInpaint(str(folder / "seen"), str(tmp_path), source, sampling=Sampling(steps=2), place=Placement("cpu")).run()
    names = ("a", "b", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{name}.png" for name in names), "record.json"]
    given = read_pictures_for(pipeline, folder / "seen")
    chosen = with_pictures(pipeline.with_(steps=2), given)
    filled = given.fill_in(chosen.decode(chosen.sample_latents([0, 1, 2], [0, 1, 2])))
    for name, picture in zip(names, filled, strict=True):
        written = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(float)
        assert np.abs(written - 127.5 * (picture[0].numpy() + 1)).max() <= 1
    released = SampleInpaint("pictures", "filled").model
    assert released.base == "configs/latent-diffusion/inpainting_big.yaml"
    assert released.ckpt == "models/ldm/inpainting_big/last.ckpt"
    with pytest.raises(ValueError, match="no masks"):
        read_pictures_apart(folder / "masks", 1)
