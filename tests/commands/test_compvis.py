"""scripts/sample_diffusion.py with latent-diffusion's words: what they become, and that they sample."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.compvis import translate_words
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from tests.conftest import tiny_config, tiny_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "sample_diffusion.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a released model as CompVis' zips unpack: model.ckpt with config.yaml beside it; 20 times."""
    folder = tmp_path_factory.mktemp("models") / "ldm" / "tiny256"
    config = tiny_config(timesteps=20, guidance_scale=1.0)
    state = tiny_model(timesteps=20, guidance_scale=1.0).state_dict()
    save_checkpoint({"state_dict": state, "global_step": 7}, folder / "model.ckpt")
    OmegaConf.save(OmegaConf.create({"model": config}), folder / "config.yaml")
    return folder


def options(words):
    """{option: value} of translated words, True for switches."""
    found = {}
    for place, word in enumerate(words):
        if word.startswith("-"):
            following = words[place + 1] if place + 1 < len(words) else "-"
            found[word] = True if following.startswith("-") else following
    return found


def test_their_words_in_ours(model, tmp_path):
    files = {"--base": str(model / "config.yaml"), "--ckpt": str(model / "model.ckpt")}
    found = options(translate_words(["-r", str(model / "model.ckpt")]))
    assert found == {
        **files,
        "--n": "50000",
        "--batch_size": "10",
        "--eta": "1.0",
        "--steps": "50",
        "--spacing": "published",
        "--pngs": True,
        "--out": str(model / "samples" / "ddim50_eta1"),
    }
    short = ["-r", str(model), "-l", str(tmp_path), "-n", "4", "--batch_size", "2", "-c", "5", "-e", "0"]
    long = ["--resume", str(model), "--logdir", str(tmp_path), "--n_samples", "4", "--batch_size", "2"]
    long += ["--custom_steps", "5", "--eta", "0"]
    assert translate_words(short) == translate_words(long)
    found = options(translate_words(short))
    assert found["--out"] == str(tmp_path / "tiny256" / "samples" / "ddim5_eta0")
    assert files.items() <= found.items()
    assert (found["--n"], found["--batch_size"], found["--steps"], found["--eta"]) == ("4", "2", "5", "0.0")
    vanilla = options(translate_words(["-r", str(model), "-v", "-n", "4"]))
    assert (vanilla["--sampler"], vanilla["--steps"]) == ("DDPM", "20") and "--eta" not in vanilla
    assert vanilla["--out"].endswith("samples/ddpm20")


def test_ours_stay_as_they_are_and_go_with_theirs(model, tmp_path):
    words = ["--run", "logs/x", "--n", "3", "--steps", "5", "--out", "out", "--classes", "1", "2"]
    assert options(translate_words(words)) == options(words)
    assert translate_words(["--help"]) == ["--help"]
    mixed = ["-r", str(model), "--n_per_class", "2", "--steps", "7", "--sampler", "Heun", "--seed", "3"]
    found = options(translate_words([*mixed, "--out", "out"]))
    assert "--n" not in found and "--eta" not in found and "--spacing" not in found and "--pngs" not in found
    assert (found["--steps"], found["--seed"], found["--out"]) == ("7", "3", "out")


def test_runs_of_trainings(tmp_path):
    """configs/*-project.yaml in the run of a checkpoint, in place of config.yaml beside it."""
    run_folder = tmp_path / "2026-01-01T00-00-00_x"
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, checkpoint)
    project = run_folder / "configs" / "2026-01-01T00-00-00-project.yaml"
    project.parent.mkdir()
    OmegaConf.save(OmegaConf.create({"model": tiny_config(timesteps=30)}), project)
    for given in (run_folder, checkpoint):
        found = options(translate_words(["-r", str(given), "-v", "-l", "logs"]))
        assert (found["--run"], found["--steps"]) == (str(given), "30")
        assert found["--out"] == "logs/2026-01-01T00-00-00_x/samples/ddpm30"
    with pytest.raises(ValueError, match="found neither"):
        translate_words(["-r", str(tmp_path / "absent.ckpt")])


def script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_released_model_is_sampled_on_their_times(model, tmp_path, monkeypatch):
    words = ["-r", model / "model.ckpt", "-l", tmp_path, "-n", 3, "-c", 5, "-e", 0, "--batch_size", 2]
    script(monkeypatch, *words, "--latents", "--device", "cpu")
    out = tmp_path / "tiny256" / "samples" / "ddim5_eta0"
    assert len(list((out / "pngs").iterdir())) == 3
    # make_ddim_timesteps gives range(0, 20, 4) + 1 and ends at alphas_cumprod[0]; times count from 1 here.
    times = torch.tensor([18.0, 14.0, 10.0, 6.0, 2.0, 1.0], dtype=torch.float64)
    same = tiny_model(timesteps=20, guidance_scale=1.0)
    denoiser = same.denoiser(torch.tensor([0, 1, 2]))
    x = ImageNoise(42, (0, 1, 2)).initial((3, 1, 8, 8))
    expected = run(ddim(denoiser, same.schedule, x, times))
    found = load_state_dict(out / "latents.safetensors")["latents"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_vanilla_sampling_takes_every_time(model, tmp_path, monkeypatch):
    script(monkeypatch, "-r", model, "-l", tmp_path, "-n", 2, "-v", "--latents", "--device", "cpu")
    out = tmp_path / "tiny256" / "samples" / "ddpm20"
    ours = ["--base", model / "config.yaml", "--ckpt", model / "model.ckpt", "--sampler", "DDPM", "--steps", 20]
    script(monkeypatch, *ours, "--n", 2, "--latents", "--device", "cpu", "--out", tmp_path / "ours")
    theirs, own = (np.load(folder / "samples.npz") for folder in (out, tmp_path / "ours"))
    np.testing.assert_array_equal(theirs["arr_0"], own["arr_0"])
    with pytest.raises(SystemExit, match="found neither"):
        script(monkeypatch, "-r", tmp_path / "absent.ckpt", "-v")
