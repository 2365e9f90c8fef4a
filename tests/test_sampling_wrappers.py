"""Epsilon scaling, clipping and guidance by a classifier from the command line, against their library calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble
from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.diffusion.classifier_guidance import ClassifierScore, classifier_guided
from ldm.diffusion.denoiser import clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, save_scaling, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ancestral, ddim, run
from ldm.models.diffusion.classifier import NoisyClassifier
from ldm.settings import Scaling
from scripts import sample_diffusion
from tests.conftest import tiny_config, tiny_model
from tests.ensembles import write_ensemble
from tests.models.test_classifier_training import ENCODER

ROUNDING = {"atol": 2e-4, "rtol": 2e-4}


def adm_config():
    """A tiny unconditional model of pixels that learns its variance, with published scaling for 5 steps."""
    config = tiny_config(beta_schedule="cosine", learned_variance="hybrid", clip_denoised=True)
    unet = config["params"]["unet_config"]["params"]
    unet.pop("context_dim")
    unet.update(use_spatial_transformer=False, out_channels=2)
    config["params"]["cond_stage_config"] = "__is_unconditional__"
    return config


def drawn(module, seed=0):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(
                torch.randn(value.shape, generator=source) * (0.1 if value.ndim < 2 else value[0].numel() ** -0.5)
            )
    return module.eval()


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """(words, model, classifier): the files of guided-diffusion, a UNet and an encoder alone."""
    folder, config = tmp_path_factory.mktemp("adm"), adm_config()
    published = [{"steps": 5, "b": 1.1}, {"steps": 5, "b": 1.02, "k": 0.01}]
    OmegaConf.save(OmegaConf.create({"model": config, "epsilon_scaling": published}), folder / "adm.yaml")
    OmegaConf.save(OmegaConf.create({"model": ENCODER}), folder / "classifier.yaml")
    model = drawn(tiny_model(**config["params"]))
    classifier = drawn(NoisyClassifier(ENCODER, beta_schedule="cosine").classifier)
    save_checkpoint(model.model.diffusion_model.state_dict(), folder / "adm.pt")
    save_checkpoint(classifier.state_dict(), folder / "classifier.pt")
    words = ["--base", str(folder / "adm.yaml"), "--ckpt", str(folder / "adm.pt"), "--device", "cpu", "--n", "2"]
    return [*words, "--steps", "5", "--spacing", "respace"], model, classifier


def sample(words, out, *more):
    out = sample_diffusion.main([*words, "--out", str(out), "--latents", *map(str, more)])
    return load_state_dict(out / "latents.safetensors")["latents"]


def guiding(words, scale):
    return ["--classifier_config", words[1].replace("adm.yaml", "classifier.yaml"), "--classifier_ckpt",
            words[3].replace("adm.pt", "classifier.pt"), "--classifier_scale", scale]  # fmt: skip


@pytest.mark.parametrize("words", [("--eps_scaler", 1.1), ("--eps_scaler", "published")])
def test_an_adm_model_with_scaling(adm, tmp_path, words):
    released, model, _ = adm
    noise = ImageNoise(42, (0, 1))
    x, times = noise.initial((2, 1, 8, 8)), model.sampling_times("5")
    denoiser = clipped(scaled(model.denoiser(), model.schedule, EpsilonScaling(1.1), times), model.schedule)
    expected = run(ancestral(denoiser, model.schedule, x, times, variance="learned_range", noise=noise))
    found = sample(released, tmp_path / "out", "--sampler", "DDPM", *words)
    torch.testing.assert_close(found, expected, **ROUNDING)
    plain = sample(released, tmp_path / "plain", "--sampler", "DDPM")
    assert not torch.allclose(plain, found, atol=1e-2)
    assert torch.equal(sample(released, tmp_path / "one", "--sampler", "DDPM", "--eps_scaler", 1), plain)


def test_slopes_windows_files_and_directions(adm, tmp_path):
    released, model, _ = adm
    noise = ImageNoise(42, (0, 1))
    x, times = noise.initial((2, 1, 8, 8)), model.sampling_times("5")
    slope = EpsilonScaling(1.02, 0.01)
    window = EpsilonScaling(1.02, 0.01, unit="log_snr", window=(0.0, 3.0), direction="x0_only")
    save_scaling(slope, tmp_path / "schedule.yaml")
    for number, (scaling, clip, words) in enumerate(
        [
            (slope, True, ["--eps_scaler", 1.02, "--eps_slope", 0.01]),
            (slope, True, ["--eps_scaler", "published-linear"]),
            (slope, True, ["--eps_schedule", tmp_path / "schedule.yaml"]),
            (window, False, ["--eps_schedule", tmp_path / "schedule.yaml", "--eps_window", 0, 3, "--no-clip_denoised",
                             "--eps_unit", "log_snr", "--eps_direction", "x0_only"]),
        ]
    ):  # fmt: skip
        denoiser = scaled(model.denoiser(), model.schedule, scaling, times)
        denoiser = clipped(denoiser, model.schedule) if clip else denoiser
        expected = run(ddim(denoiser, model.schedule, x, times))
        torch.testing.assert_close(sample(released, tmp_path / str(number), *words), expected, **ROUNDING)
    for words, reason in (
        (["--eps_schedule", tmp_path / "schedule.yaml", "--eps_scaler", 1.1], "replaces --eps_scaler"),
        (["--eps_scaler", "published", "--eps_slope", 0.1], "brings its own slope"),
        (["--eps_scaler", "published", "--steps", "2,3"], "needs a config with a section epsilon_scaling"),
        (["--eps_scaler", 1.1, "--eps_direction", "x0_only"], "no effect on clipped models"),
        (["--eps_scaler", 1.1, "--eps_direction", "x0_only", "--sampler", "PLMS"], "acts in DDIM and DDPM only"),
        (["--eps_scaler", 0], "b must be positive"),
        (["--classifier_scale", 2], "needs --classifier_config"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample([word for word in released if word not in ("--spacing", "respace")], tmp_path / "wrong", *words)


@pytest.mark.parametrize("sampler", ["DDPM", "DDIM"])
def test_a_classifier_guides_an_unconditional_model_unscaled(adm, tmp_path, sampler):
    released, model, classifier = adm
    noise, labels = ImageNoise(42, (0, 1)), torch.tensor([7, 2])
    x, times = noise.initial((2, 1, 8, 8)), model.sampling_times("5")
    score = ClassifierScore(classifier, model.schedule, labels, 4.0)
    denoiser = clipped(scaled(model.denoiser(), model.schedule, EpsilonScaling(1.1), times), model.schedule)
    if sampler == "DDPM":
        options = {"variance": "learned_range", "mean_shift": score.mean_shift, "noise": noise}
        expected = run(ancestral(denoiser, model.schedule, x, times, **options))
    else:
        expected = run(ddim(classifier_guided(denoiser, score), model.schedule, x, times))
    words = [*guiding(released, 4.0), "--eps_scaler", 1.1, "--sampler", sampler, "--classes", 7, 2]
    torch.testing.assert_close(sample(released, tmp_path / "out", *words), expected, **ROUNDING)
    content = np.load(tmp_path / "out" / "samples.npz")
    assert content["arr_1"].tolist() == [7, 2] and content["arr_0"].shape == (2, 8, 8, 1)


def test_a_classifier_of_other_noise_levels_is_refused(adm, tmp_path):
    released = adm[0]
    target = "ldm.models.diffusion.classifier.NoisyClassifier"
    for schedule, reason in (("linear", "other noise levels"), ("cosine", None)):
        params = {"classifier_config": ENCODER, "beta_schedule": schedule}
        file = tmp_path / f"{schedule}.yaml"
        OmegaConf.save(OmegaConf.create({"model": {"target": target, "params": params}}), file)
        words = [*released, *map(str, guiding(released, 1.0))]
        words[words.index("--classifier_config") + 1] = str(file)
        if reason is None:
            assert sample(words, tmp_path / schedule, "--classes", 1).isfinite().all()
            continue
        with pytest.raises(ValueError, match=reason):
            sample(words, tmp_path / schedule, "--classes", 1)


def test_labels_are_given_balanced_or_drawn(adm, tmp_path):
    released, words = adm[0], guiding(adm[0], 1.0)
    (tmp_path / "labels.txt").write_text("3 3 9\n0\n")
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((4, 2)), arr_1=np.array([3, 3, 9, 0]))
    for number, file in enumerate(("labels.txt", "labels.npz")):
        sample(released, tmp_path / str(number), *words, "--n", 3, "--labels", tmp_path / file)
        assert np.load(tmp_path / str(number) / "samples.npz")["arr_1"].tolist() == [3, 3, 9]
    sample(released, tmp_path / "random", *words, "--n", 12, "--labels", "random")
    drawn_labels = np.load(tmp_path / "random" / "samples.npz")["arr_1"].tolist()
    assert len(drawn_labels) == 12 and set(drawn_labels) <= set(range(10)) and len(set(drawn_labels)) > 3
    (tmp_path / "wrong.txt").write_text("3 cat")
    for file, reason in (
        ("wrong.txt", "holds no labels"),
        ("absent", "no file of labels"),
        ("labels.txt", "4 labels for the 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(released, tmp_path / "wrong", *words, "--n", 5, "--labels", tmp_path / file)
    with pytest.raises(ValueError, match="goes with --n and a model of classes"):
        sample(released, tmp_path / "wrong", "--labels", "random")


def test_members_of_an_ensemble_are_scaled_one_by_one(tmp_path):
    write_ensemble(tmp_path)
    sampling = Sampling(scaling=Scaling(b=1.05), clip=True)
    pipeline = load_ensemble(tmp_path, sampling, Branching(at=0.0), device="cpu")
    found = pipeline.member_latents([4, 5], [0, 1])[:, :, 0]
    assert pipeline.describe()["epsilon_scaling"]["b"] == 1.05 and pipeline.describe()["clip_denoised"]
    model, labels, noise = pipeline.model, torch.tensor([4, 5]), ImageNoise(42, (0, 1))
    for member in range(3):
        weights = {name: value[member] for name, value in pipeline.ensemble.members.overrides.items()}
        network = lambda *args, own=weights: torch.func.functional_call(model.network, own, args)  # noqa: E731
        denoiser = scaled(
            model.denoiser(labels, pipeline.scale, network), model.schedule, EpsilonScaling(1.05), pipeline.times
        )
        x = noise.initial((2, 1, 8, 8)) * model.schedule.prior_std
        expected = run(ddim(clipped(denoiser, model.schedule), model.schedule, x, pipeline.times))
        torch.testing.assert_close(found[member], expected, **ROUNDING)
