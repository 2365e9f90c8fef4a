"""Epsilon scaling, clipping and guidance by a classifier of the values that say so, against their library calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble
from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.sample_model import SampleModel
from ldm.commands.shared import ModelSource, Placement
from ldm.diffusion.classifier_guidance import ClassifierScore, classifier_guided
from ldm.diffusion.denoiser import clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, save_scaling, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ancestral, ddim, run
from ldm.models.diffusion.classifier import NoisyClassifier
from ldm.settings import ClassifierGuidance, Scaling
from tests.conftest import tiny_config, tiny_model
from tests.ensembles import write_ensemble
from tests.models.test_classifier_training import ENCODER

ROUNDING = {"atol": 2e-4, "rtol": 2e-4}
RESPACED = Sampling(steps=5, spacing="respace")


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
    """(source, model, classifier): the files of guided-diffusion, a UNet and an encoder alone."""
    folder, config = tmp_path_factory.mktemp("adm"), adm_config()
    published = [{"steps": 5, "b": 1.1}, {"steps": 5, "b": 1.02, "k": 0.01}]
    OmegaConf.save(OmegaConf.create({"model": config, "epsilon_scaling": published}), folder / "adm.yaml")
    OmegaConf.save(OmegaConf.create({"model": ENCODER}), folder / "classifier.yaml")
    model = drawn(tiny_model(**config["params"]))
    classifier = drawn(NoisyClassifier(ENCODER, beta_schedule="cosine").classifier)
    save_checkpoint(model.model.diffusion_model.state_dict(), folder / "adm.pt")
    save_checkpoint(classifier.state_dict(), folder / "classifier.pt")
    return ModelSource(base=str(folder / "adm.yaml"), ckpt=str(folder / "adm.pt")), model, classifier


def sample(source, out, sampling=RESPACED, n=2, **options):
    """Latents of images that the command samples."""
    place = Placement("cpu")
    SampleModel(source, str(out), n=n, latents=True, sampling=sampling, place=place, **options).run()
    return load_state_dict(out / "latents.safetensors")["latents"]


def guiding(source, scale):
    folder = Path(source.base).parent
    return ClassifierGuidance(str(folder / "classifier.yaml"), str(folder / "classifier.pt"), scale)


@pytest.mark.parametrize("scaling", [Scaling(1.1), Scaling("published")])
def test_an_adm_model_with_scaling(adm, tmp_path, scaling):
    released, model, _ = adm
    noise = ImageNoise(42, (0, 1))
    ancestral_sampling = replace(RESPACED, sampler="DDPM")
    x, times = noise.initial((2, 1, 8, 8)), model.sampling_times("5")
    denoiser = clipped(scaled(model.denoiser(), model.schedule, EpsilonScaling(1.1), times), model.schedule)
    expected = run(ancestral(denoiser, model.schedule, x, times, variance="learned_range", noise=noise))
    found = sample(released, tmp_path / "out", replace(ancestral_sampling, scaling=scaling))
    torch.testing.assert_close(found, expected, **ROUNDING)
    plain = sample(released, tmp_path / "plain", ancestral_sampling)
    assert not torch.allclose(plain, found, atol=1e-2)
    assert torch.equal(sample(released, tmp_path / "one", replace(ancestral_sampling, scaling=Scaling(1.0))), plain)


def test_slopes_windows_files_and_directions(adm, tmp_path):
    released, model, _ = adm
    noise = ImageNoise(42, (0, 1))
    x, times = noise.initial((2, 1, 8, 8)), model.sampling_times("5")
    slope = EpsilonScaling(1.02, 0.01)
    window = EpsilonScaling(1.02, 0.01, unit="log_snr", window=(0.0, 3.0), direction="x0_only")
    save_scaling(slope, tmp_path / "schedule.yaml")
    file = str(tmp_path / "schedule.yaml")
    changed = Scaling(schedule=file, window=(0, 3), unit="log_snr", direction="x0_only")
    for number, (scaling, clip, given) in enumerate(
        [
            (slope, True, Scaling(1.02, 0.01)),
            (slope, True, Scaling("published-linear")),
            (slope, True, Scaling(schedule=file)),
            (window, False, changed),
        ]
    ):
        denoiser = scaled(model.denoiser(), model.schedule, scaling, times)
        denoiser = clipped(denoiser, model.schedule) if clip else denoiser
        expected = run(ddim(denoiser, model.schedule, x, times))
        sampling = replace(RESPACED, scaling=given, clip=None if clip else False)
        torch.testing.assert_close(sample(released, tmp_path / str(number), sampling), expected, **ROUNDING)
    only_x0 = Scaling(1.1, direction="x0_only")
    five = Sampling(steps=5)
    for sampling, reason in (
        (replace(five, scaling=Scaling(1.1, schedule=file)), "replaces --eps_scaler"),
        (replace(five, scaling=Scaling("published", 0.1)), "brings its own slope"),
        (Sampling(steps="2,3", scaling=Scaling("published")), "needs a config with a section epsilon_scaling"),
        (replace(five, scaling=only_x0), "is full on clipped models"),
        (replace(five, scaling=only_x0, sampler="PLMS"), "PLMS derives one of them from the other"),
        (replace(five, scaling=Scaling(0.0)), "b must be positive"),
        (replace(five, classifier=ClassifierGuidance(scale=2.0)), "needs --classifier_config"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(released, tmp_path / "wrong", sampling)


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
    sampling = replace(RESPACED, sampler=sampler, scaling=Scaling(1.1), classifier=guiding(released, 4.0))
    found = sample(released, tmp_path / "out", sampling, classes=(7, 2))
    torch.testing.assert_close(found, expected, **ROUNDING)
    content = np.load(tmp_path / "out" / "samples.npz")
    assert content["arr_1"].tolist() == [7, 2] and content["arr_0"].shape == (2, 8, 8, 1)


def test_a_classifier_of_other_noise_levels_is_refused(adm, tmp_path):
    released = adm[0]
    target = "ldm.models.diffusion.classifier.NoisyClassifier"
    for schedule, reason in (("linear", "other noise levels"), ("cosine", None)):
        params = {"classifier_config": ENCODER, "beta_schedule": schedule}
        file = tmp_path / f"{schedule}.yaml"
        OmegaConf.save(OmegaConf.create({"model": {"target": target, "params": params}}), file)
        sampling = replace(RESPACED, classifier=replace(guiding(released, 1.0), config=str(file)))
        if reason is None:
            assert sample(released, tmp_path / schedule, sampling, classes=(1,)).isfinite().all()
            continue
        with pytest.raises(ValueError, match=reason):
            sample(released, tmp_path / schedule, sampling, classes=(1,))


def test_labels_are_given_balanced_or_drawn(adm, tmp_path):
    released = adm[0]
    guided = replace(RESPACED, classifier=guiding(released, 1.0))
    (tmp_path / "labels.txt").write_text("3 3 9\n0\n")
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((4, 2)), arr_1=np.array([3, 3, 9, 0]))
    for number, file in enumerate(("labels.txt", "labels.npz")):
        sample(released, tmp_path / str(number), guided, 3, labels=str(tmp_path / file))
        assert np.load(tmp_path / str(number) / "samples.npz")["arr_1"].tolist() == [3, 3, 9]
    sample(released, tmp_path / "random", guided, 12, labels="random")
    drawn_labels = np.load(tmp_path / "random" / "samples.npz")["arr_1"].tolist()
    assert len(drawn_labels) == 12 and set(drawn_labels) <= set(range(10)) and len(set(drawn_labels)) > 3
    (tmp_path / "wrong.txt").write_text("3 cat")
    for file, reason in (
        ("wrong.txt", "is not a file of labels"),
        ("absent", "expected a file of labels"),
        ("labels.txt", "4 labels for the 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(released, tmp_path / "wrong", guided, 5, labels=str(tmp_path / file))
    with pytest.raises(ValueError, match="goes with --n and a model of classes"):
        sample(released, tmp_path / "wrong", labels="random")


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
