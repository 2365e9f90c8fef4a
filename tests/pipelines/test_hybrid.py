"""Hybrid models, which take a class or a text beside a picture: pairs as classes, guidance, members, posteriors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.commands.line import run_command
from ldm.data.picture_list import PictureList
from ldm.diffusion.denoiser import guided
from ldm.laplace.storage import save_laplace
from ldm.modules.choices import Choices, join_condition
from ldm.pipelines import build_model, load_model, observations
from ldm.pipelines.features import make_backbone
from ldm.pipelines.fitting import LaplacePlan
from ldm.pipelines.pictures import read_pictures_for, with_pictures
from ldm.settings import Sampling
from ldm.training.config import load_config
from ldm.training.joint import JointMembers, repeat_batch, start_members
from ldm.util import generator, instantiate_from_config
from tests.texts import text_params

CONFIG = Path(__file__).parents[2] / "configs" / "inpainting" / "digits-classes.yaml"


def make_model(folder, config):
    """Save a small model with its config, none of its layers zero."""
    folder.mkdir()
    config.model.params.use_ema = False
    OmegaConf.save(config, folder / "model.yaml")
    model = build_model(config)
    source = generator("hybrid")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=source)
    save_checkpoint({"state_dict": model.state_dict()}, folder / "model.ckpt")


def load(folder):
    sampling = Sampling(steps=2, scale=2.0)
    return load_model(base=folder / "model.yaml", ckpt=folder / "model.ckpt", sampling=sampling, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures with a mask each, a model of classes beside pictures, and one of texts."""
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "seen").mkdir()
    draws = np.random.Generator(np.random.PCG64(0))
    for name in "ab":
        Image.fromarray(draws.integers(0, 256, (8, 8), np.uint8)).save(folder / "seen" / f"{name}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[2:5, 3:7] = 255
        Image.fromarray(mask).save(folder / "seen" / f"{name}_mask.png")
    make_model(folder / "classes", load_config([str(CONFIG)]))
    texts = load_config([str(CONFIG)])
    given = text_params(ucg_rate=0.1)
    texts.model.params.update(given)
    texts.model.params.unet_config.params.context_dim = given["cond_stage_config"]["params"]["n_embed"]
    make_model(folder / "texts", texts)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder / "classes")


@pytest.fixture(scope="module")
def batch():
    data = instantiate_from_config(load_config([str(CONFIG)]).data.params.train)
    items = [data[index] for index in range(3)]
    images = {name: torch.stack([item[name] for item in items]) for name in ("image", "masked_image", "mask")}
    return images | {"class_label": torch.tensor([int(item["class_label"]) for item in items])}


def test_rows_of_a_batch_are_what_apply_model_takes_apart(pipeline, batch):
    model = pipeline.model
    rows = model.read_conditions(batch)
    assert rows.shape == (3, 1 + 2 * 64)
    x, t = torch.randn(3, 1, 8, 8, generator=generator("x")), torch.tensor([5, 50, 500])
    expected = model.apply_model(x, t, model.embed_condition(batch, torch.ones(3)))
    torch.testing.assert_close(model.network(x, t, rows), expected)
    null = {**batch, "class_label": torch.full((3,), 10)}
    assert torch.equal(model.null_condition(rows), model.read_conditions(null))


@torch.no_grad()
def test_every_picture_is_paired_with_every_class_and_guided_against_its_own_null(pipeline, folder):
    given = read_pictures_for(pipeline, folder / "seen")
    chosen = with_pictures(pipeline, given, [7, 3])
    assert chosen.class_names == ("a, 7", "a, 3", "b, 7", "b, 3")
    assert (chosen.n_classes, chosen.null_class, chosen.scale) == (4, 4, 2.0)
    model = pipeline.model
    picture = torch.cat([given.masked, given.masks], 1)[[1, 0]]
    conditions = [join_condition(torch.tensor(labels), picture) for labels in ([3, 7], [10, 10])]
    x = torch.randn(2, 1, 8, 8, generator=generator("x"))
    plain, null = (model.denoiser(one) for one in conditions)
    expected = guided(plain, conditions[1], 2.0)(x, 300.0).eps
    found = chosen.denoiser(torch.tensor([3, 0]))(x, 300.0).eps
    torch.testing.assert_close(found, expected)
    by_hand = null(x, 300.0).eps + 2 * (plain(x, 300.0).eps - null(x, 300.0).eps)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    assert with_pictures(pipeline, given).n_classes == 20


def test_choices_name_the_null_of_each_picture():
    choices = Choices(tuple("abcd"), tokens=torch.arange(6), null=2)
    assert choices.null_labels(torch.tensor([0, 1, 2, 3, 4, 5])).tolist() == [4, 4, 5, 5, 4, 5]
    with pytest.raises(ValueError, match="must divide 3"):
        Choices(tuple("abc"), tokens=torch.arange(5), null=2)


def test_what_does_not_go_together_is_refused(pipeline, folder):
    texts = load(folder / "texts")
    given = read_pictures_for(texts, folder / "seen")
    with pytest.raises(ValueError, match="--prompt"):
        with_pictures(texts, given)
    with pytest.raises(ValueError, match="no classes"):
        with_pictures(texts, given, [3])
    with pytest.raises(ValueError, match="conditioned on pictures"):
        texts.with_prompts(["a three"]).sample()
    with pytest.raises(ValueError, match="conditioned on pictures"):
        pipeline.sample()
    with pytest.raises(ValueError, match="features are read of images alone"):
        make_backbone(pipeline.model)
    with pytest.raises(ValueError, match="11"):
        with_pictures(pipeline, given, [11])
    with pytest.raises(ValueError, match="its mask"):
        with_pictures(pipeline, PictureList(("a",), torch.zeros(1, 1, 8, 8)), [3])


def sample(folder, kind, out, *words):
    source = ("--base", folder / kind / "model.yaml", "--ckpt", folder / kind / "model.ckpt", "--device", "cpu")
    given = ("--pictures", folder / "seen", "--steps", 2, "--scale", 2, "--out", out)
    run_command("sample model", [str(word) for word in (*source, *given, *words)])
    return np.load(Path(out) / "samples.npz")


def test_the_command_samples_pairs(folder, tmp_path):
    found = sample(folder, "classes", tmp_path / "classes", "--picture_classes", 3, 8, "--n_per_class", 1)
    assert found["arr_0"].shape == (4, 8, 8, 1) and found["arr_1"].tolist() == [0, 1, 2, 3]
    prompts = ("--prompt", "a bold three", "--prompt", "a seven")
    found = sample(folder, "texts", tmp_path / "texts", *prompts, "--n_per_class", 1)
    assert found["arr_0"].shape == (4, 8, 8, 1)
    texts = load(folder / "texts").with_prompts(["a bold three", "a seven"])
    chosen = with_pictures(texts, read_pictures_for(texts, folder / "seen"))
    assert chosen.class_names[3] == "b, a seven"
    expected = chosen.decode(chosen.sample_latents([0, 1, 2, 3], [0, 1, 2, 3])).movedim(1, -1).numpy()
    assert np.abs(found["arr_0"] - 127.5 * (expected + 1)).max() <= 1


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_two_members_train_together_as_they_would_alone(folder, batch, kind):
    """Class rows, or the text's token rows, and the output layer of two members; each with its own labels dropped."""
    model = build_model(OmegaConf.load(folder / kind / "model.yaml"))
    head = "class_embedding" if kind == "classes" else "token_embedding"
    model.head_options = {"names": [head, "output"]}
    model.pretrained_path = str(folder / kind / "model.ckpt")
    if kind == "texts":
        batch = {**batch, "caption": ["a bold three", "a seven", "two small sevens"]}
    members = start_members(copy.deepcopy(model), 2, seed=5)
    joint = JointMembers(members).train()
    found = joint.losses(repeat_batch(batch, 2), [member.draws for member in members], 0, range(3))
    sum(loss for loss, _ in found).backward()
    for number, member in enumerate(members):
        rows = next(value for name, value in joint.heads[number].items() if name.startswith("cond_stage_model."))
        together = rows.grad.clone()
        rows.grad = None
        loss, _ = member.train().shared_step(batch, member.draws, 0, range(3))
        loss.backward()
        torch.testing.assert_close(loss, found[number][0])
        assert float(together.abs().max()) > 0
        torch.testing.assert_close(rows.grad, together, rtol=1e-4, atol=1e-6)


def test_a_posterior_is_fitted_to_pairs_and_its_variances_are_seen_by_all_commands(pipeline, folder, tmp_path):
    data = instantiate_from_config(load_config([str(CONFIG)]).data.params.train)
    (row, *_) = observations(pipeline.model, data, [3], draws=40)
    labels = row.cond[:, 0]
    assert set(labels.tolist()) == {float(data[3]["class_label"]), 10.0}, "some are dropped for the null class"
    assert bool((row.cond[:, 1:] == row.cond[:1, 1:]).all()), "and no picture is"
    save_laplace(LaplacePlan(draws=1).fit(pipeline, data, range(6)), tmp_path / "posterior")
    source = ("--base", folder / "classes" / "model.yaml", "--ckpt", folder / "classes" / "model.ckpt")
    given = (*source, "--posterior", tmp_path / "posterior", "--device", "cpu", "--pictures", folder / "seen")
    given = (*given, "--picture_classes", 3, 8, "--n", 2)
    for name, words in (
        ("resample", ("--cut", 1, "--variants", 2, "--kinds", "variance", "--steps", 2, "--draws", 2)),
        ("sweep", ("--sigmas", 0.1, "--precisions", 1, "--steps", 1)),
    ):
        run_command(f"laplace {name}", [str(word) for word in (*given, *words, "--out", tmp_path / name)])
    assert (tmp_path / "resample" / "variants_variance.png").exists()
    assert np.load(tmp_path / "sweep" / "sweep.npz")["maps"].min() > 0
