"""Prompts on the command line: wherever classes are taken, and in the words of txt2img.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.checkpoint import save_checkpoint, sha256
from ldm.commands.txt2img import translate_txt2img
from ldm.ensembles import storage
from ldm.report.tables import read_csv
from ldm.trust import trusting
from ldm.util import generator
from tests.cli import call
from tests.texts import CAPTIONS, text_config, text_model

TABLE = "cond_stage_model.transformer.token_emb.weight"
SPEC = {"heads": ["token_embedding"], "patterns": [TABLE], "null_class": "shared", "split": "binned_classes"}
NAMES = {"class_names": ["three", "seven"], "bins": {0: 1, 1: "all"}}
TWO = ["--prompt", "a bold three", "--prompt", "two small sevens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base checkpoint with its config, and an ensemble of token rows, in which `three` differs most."""
    path = tmp_path_factory.mktemp("texts")
    base = text_model()
    save_checkpoint({"state_dict": base.state_dict()}, path / "base.ckpt")
    config = {"model": text_config(guidance_scale=2.0), "uncertainty": {"branch_at": 0.0, "steps": 3, "n": 2}}
    OmegaConf.save(OmegaConf.create(config), path / "texts.yaml")
    spread = torch.full((10, 1), 0.001)
    spread[0], spread[5] = 0.0, 0.05
    rows = base.get_parameter(TABLE).detach()
    heads = [{TABLE: rows + spread * torch.randn(rows.shape, generator=generator("m", one))} for one in range(3)]
    members = [{"component": member, "seed": member, "run": "none", "step": 0} for member in range(3)]
    trunk = {"path": str(path / "base.ckpt"), "sha256": sha256(path / "base.ckpt")}
    spec = {"name": "texts", "trunk": trunk, "config": config, **SPEC, **NAMES, "members": members}
    storage.write_ensemble(path / "ensemble", spec, heads, overwrite=True)
    return path


def model_words(folder):
    return ["--base", folder / "texts.yaml", "--ckpt", folder / "base.ckpt", "--device", "cpu"]


def test_prompts_are_sampled_as_their_tokens_are(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a faint seven\n")
    words = [*model_words(folder), *TWO, "--prompts", tmp_path / "prompts.txt"]
    call("sample model", [*words, "--n_per_class", 2, "--steps", 2, "--latents", "--out", tmp_path / "out"])
    found = np.load(tmp_path / "out" / "samples.npz")["arr_1"]
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["settings"]["choices"] == ["a bold three", "two small sevens", "a faint seven"]
    pipeline = load_model(base=folder / "texts.yaml", ckpt=folder / "base.ckpt", sampling=Sampling(steps=2))
    labelled = pipeline.with_prompts(CAPTIONS).sample_latents([1], [0])
    model = pipeline.model
    tokens = model.cond_stage_model.tokenize(CAPTIONS[1:2])
    expected = model.sample(tokens, pipeline.noise([0]), pipeline.times, 2.0)
    assert torch.allclose(labelled, expected, atol=1e-4)
    with pytest.raises(ValueError, match="conditioned on prompts: give them"):
        call("sample model", [*model_words(folder), "--n", 1, "--out", tmp_path / "none"])


@pytest.mark.slow
def test_members_of_token_rows_disagree_on_prompts_of_the_words_that_differ(folder, tmp_path):
    words = ["--path", folder / "ensemble", "--device", "cpu", "--steps", 3, "--out", tmp_path / "out"]
    call("uncertainty classes", [*words, *TWO, "--prompt", "a faint seven"])
    rows = read_csv(tmp_path / "out" / "uncertainty.csv")
    assert [row["name"] for row in rows] == ["a bold three", "two small sevens", "a faint seven"]
    assert [str(row["bin"]) for row in rows] == ["1", "all", "all"], "a prompt has the images of its words"
    mi = [float(row["mi_mean"]) for row in rows]
    assert mi[0] > 2 * max(mi[1:])
    pipeline = load_ensemble(folder / "ensemble", Sampling(steps=3), Branching(at=0.0)).with_prompts(CAPTIONS)
    assert pipeline.choose_classes(["a three"]) == [3]
    context = pipeline.model.choices.context
    assert context is None and pipeline.model.choices.tokens.shape == (5, 5), "each member embeds its own"


@pytest.mark.slow
def test_laplace_is_sampled_per_prompt(folder, tmp_path):
    (tmp_path / "images").mkdir()
    data = ["target=tests.models.test_text_model.Pairs"]
    fit = [*model_words(folder), "--data", *data, "--draws", 1, "--prior_precision", 1.0]
    call("laplace fit", [*fit, "--out", tmp_path / "posterior"])
    words = [*model_words(folder), *TWO, "--posterior", tmp_path / "posterior", "--n", 4, "--steps", 2]
    with trusting(["tests"]):  # the posterior's record names the data of this test
        call("laplace sample", [*words, "--draws", 2, "--method", "persistent", "--out", tmp_path / "samples"])
    found = np.load(tmp_path / "samples" / "samples.npz")
    assert found["arr_1"].tolist() == [0, 1, 0, 1] and (found["map"] > 0).all()


def test_txt2img_speaks_latent_diffusions_words(folder, tmp_path):
    known = ["--config", str(folder / "texts.yaml"), "--ckpt", "x.ckpt", "--prompt", "a three", "--H", "8", "--W", "8"]
    words = translate_txt2img([*known, "--plms", "--n_iter", "2", "--n_samples", "3", "--outdir", "o", "--chunk"])
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    assert pairs["--n_per_class"] == "6" and pairs["--batch_size"] == "3" and pairs["--sampler"] == "PLMS"
    assert pairs["--steps"] == "50" and pairs["--scale"] == "7.5" and pairs["--prompt"] == "a three"
    assert words[-2:] == ["--pngs", "--chunk"] and "--eta" not in words
    assert "--size" not in words
    other = translate_txt2img([*known[:4], "--H", "16"])
    assert other[other.index("--size") + 1 :][:2] == ["16", "8"]
    stable = translate_txt2img([*known, "--dpm_solver", "--skip_save", "--precision", "full", "--C", "1", "--f", "1"])
    assert stable[stable.index("--sampler") + 1] == "DPM-Solver++" and "--pngs" not in stable
    assert stable[stable.index("--precision") + 1] == "float32" and "--eta" not in stable
    laion = translate_txt2img(["--laion400m"])
    assert laion[laion.index("--out") + 1] == "outputs/txt2img-samples-laion400m"
    for wrong in (["--fixed_code"], ["--n_rows", "2"], ["--plms", "--dpm_solver"], ["--f", "8"], ["--laion400m"]):
        with pytest.raises(ValueError, match=r"leave (it|one|them) out|leave out --config"):
            translate_txt2img([*known, *wrong])
    theirs = translate_txt2img([])
    assert theirs[theirs.index("--steps") + 1] == "200" and theirs[theirs.index("--scale") + 1] == "5.0"


def test_other_sizes_are_sampled_where_the_network_takes_them(folder, tmp_path):
    words = [*model_words(folder), "--prompt", "a three", "--n_per_class", 1, "--steps", 2]
    call("sample model", [*words, "--size", 8, 16, "--out", tmp_path / "wide"])
    assert np.load(tmp_path / "wide" / "samples.npz")["arr_0"].shape == (1, 8, 16, 1)
    with pytest.raises(SystemExit):
        call("sample model", [*words, "--size", 8, 0, "--out", tmp_path / "none"])
    whole = load_model(base=folder / "texts.yaml", ckpt=folder / "base.ckpt", sampling=Sampling(steps=2))
    assert whole.with_size(8, 8).model is whole.model
    with pytest.raises(ValueError, match="must be multiples of"):
        whole.with_size(8, 0)
