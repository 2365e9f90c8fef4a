"""Exposure bias and the choice of lambda from the command line, on an exact Gaussian and on a tiny network."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.shared import Placement
from ldm.data.base import LabelledImages
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.epsilon_scaling import load_scaling
from ldm.evaluation.exposure import StepMoments
from ldm.experiments.toy import GaussianDenoiser
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.report.tables import read_csv
from ldm.util import generator
from scripts import choose_eps_scaling, exposure_bias
from tests.conftest import tiny_config, tiny_model

FACTOR = 1.03


class Gaussians(LabelledImages):
    """Images of N(0.2, 0.5^2), the same for every class."""

    def __init__(self, count: int = 200, image_size: int = 8):
        super().__init__(torch.arange(count) % 10, [str(k) for k in range(10)], (image_size, image_size, 1))

    def read(self, index):
        source = generator("gaussian", index)
        return 0.2 + 0.5 * torch.randn(self.image_shape, generator=source)


class Exact(LatentDiffusion):
    """Its denoiser is exact, but for a noise that is too long by `FACTOR` where that acts."""

    factor = 1.0

    def denoiser(self, cond=None, scale=1.0, network=None):
        mean = torch.full(self.latent_shape, 0.2)
        exact = GaussianDenoiser(self.schedule, mean, torch.full(self.latent_shape, 0.25))

        def longer(x, u):
            alpha, sigma = self.schedule.coefficients(u, x)
            eps = self.factor * exact(x, u).eps
            return Prediction((x - sigma * eps) / alpha, eps)

        return exact if self.factor == 1 else longer


class TooLong(Exact):
    factor = FACTOR


def words_of(folder, target, schedule="cosine", **params):
    config = tiny_config(beta_schedule=schedule, guidance_scale=1.0, **params)
    config["target"] = target
    data = {"params": {"train": {"target": "tests.test_exposure_scripts.Gaussians"}}}
    OmegaConf.save(OmegaConf.create({"model": config, "data": data}), folder / "exact.yaml")
    save_checkpoint({"state_dict": tiny_model(beta_schedule=schedule).state_dict()}, folder / "model.ckpt")
    words = ["--base", str(folder / "exact.yaml"), "--ckpt", str(folder / "model.ckpt"), "--device", "cpu"]
    return [*words, "--steps", "10", "--spacing", "respace", "--n", "200", "--batch_size", "50"]


def test_an_exact_sampler_has_no_bias(tmp_path, monkeypatch):
    """Norms as in training, delta_t at its floor; parts are shared by two processes and merge to the same numbers."""
    words = words_of(tmp_path, "tests.test_exposure_scripts.Exact", "linear")
    many = [word if word != "10" else "50" for word in words] + ["--sampler", "Heun"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        out = exposure_bias.main([*many, "--out", str(tmp_path / "two")])
        assert (out / "norms.csv").exists() == (rank == "1")
    monkeypatch.delenv("WORLD_SIZE")
    one = exposure_bias.main([*many, "--out", str(tmp_path / "one")])
    assert (one / "norms.csv").read_text() == (out / "norms.csv").read_text()
    norms, states = read_csv(out / "norms.csv"), read_csv(out / "states.csv")
    for row in norms:
        assert abs(row["sampling_over_training"] - 1) < 5 * row["sampling_over_training_se"] + 0.005
    # 64 elements of 200 images: a standard deviation is known to 200^-0.5 / 8 / 2^0.5, the floor's own slope is 2.
    last = states[-1]
    assert last["floor"] == pytest.approx(0.5, rel=0.05)
    assert all(abs(row["sampling_excess"]) < 0.03 for row in states)
    assert all(row["sampling_w2"] < 0.02 for row in states), "means of 200 images of variance 1 differ by 0.01 squared"
    assert {"norms.png", "ratios.png", "delta.png", "distance.png", "record.json"} <= {
        file.name for file in out.iterdir()
    }
    tensors = load_state_dict(out / "moments.safetensors")
    assert tensors["training.count"].tolist() == [200.0] * 50
    assert tensors["sampling/later.count"].tolist() == [200.0] * 49 + [0.0], "Heun's second evaluations"


def test_the_estimate_finds_how_much_too_long_the_noise_is(tmp_path):
    """A noise that is FACTOR times the exact one everywhere: where lambda is FACTOR nothing is left to correct."""
    words = words_of(tmp_path, "tests.test_exposure_scripts.TooLong")
    common = [*words, "--sampler", "DDPM"]
    plain = exposure_bias.main([*common, "--eps_scaler", str(FACTOR), "--out", str(tmp_path / "bias")])
    rows = read_csv(plain / "norms.csv")
    assert rows[-1]["scaled_lambda"] == FACTOR and rows[-1]["sampling_over_training"] > 1.001
    states = read_csv(plain / "states.csv")
    assert states[-1]["scaled_w2"] < 0.5 * states[-1]["sampling_w2"], "the correction brings x_t back"
    found = choose_eps_scaling.main([*common, "--method", "norms", "--rounds", "2", "--out", str(tmp_path / "norms")])
    assert len(found.table) == 10 and load_scaling(tmp_path / "norms" / "schedule.yaml") == found
    table = read_csv(tmp_path / "norms" / "choice.csv")
    again = exposure_bias.main(
        [*common, "--eps_schedule", str(tmp_path / "norms" / "schedule.yaml"), "--out", str(tmp_path / "after")]
    )
    after = read_csv(again / "norms.csv")
    assert {row["lambda_1"] for row in table} == {row["scaled_lambda"] for row in after} or len(after) == 10
    errors = [[abs(row[f"{kind}"] / row["training"] - 1) for row in after] for kind in ("sampling", "scaled_corrected")]
    assert sum(errors[1]) < 0.5 * sum(errors[0]), "corrected norms come nearer to training's"
    with pytest.raises(FileExistsError, match="choose another --out"):
        choose_eps_scaling.main([*common, "--method", "norms", "--out", str(tmp_path / "norms")])
    with pytest.raises(ValueError, match="this script chooses lambda"):
        choose_eps_scaling.main([*common, "--eps_scaler", "1.1", "--out", str(tmp_path / "wrong")])


def test_the_search_finds_the_b_that_undoes_the_excess(tmp_path):
    """By the Frechet distance of pixels, whose reference is the data itself."""
    words = words_of(tmp_path, "tests.test_exposure_scripts.TooLong", clip_denoised=False)
    features = "tests.test_exposure_scripts.PixelFeatures"
    ref = tmp_path / "ref"
    data = "target=tests.test_exposure_scripts.Gaussians"
    chosen = FeatureChoice(features, channels=1)
    EvaluateReference(ImageSource(data=(data,)), str(ref), features=chosen, place=Placement("cpu")).run()
    more = [
        "--method",
        "search",
        "--sampler",
        "DDPM",
        "--rounds",
        "1",
        "--points",
        "3",
        "--low",
        "1.0",
        "--high",
        "1.06",
    ]
    found = choose_eps_scaling.main([*words, *more, "--ref", str(ref), "--out", str(tmp_path / "search")])
    scores = {row["b"]: row["fid"] for row in read_csv(tmp_path / "search" / "choice.csv")}
    assert set(scores) == {1.0, 1.03, 1.06} and found.b == FACTOR == min(scores, key=scores.get)
    assert json.loads((tmp_path / "search" / "record.json").read_text())["scaling"]["b"] == FACTOR
    by_norms = [
        *words,
        *more[:2],
        "--metric",
        "norms",
        *more[4:],
        "--sampler",
        "DDPM",
        "--out",
        str(tmp_path / "by_norms"),
    ]
    assert choose_eps_scaling.main(by_norms).b > 1
    by_states = ["states" if word == "norms" else word.replace("by_norms", "by_states") for word in by_norms]
    assert choose_eps_scaling.main(by_states).b == FACTOR, "x_t comes back to where it should be"
    with pytest.raises(ValueError, match="needs --ref"):
        choose_eps_scaling.main([*words, *more, "--out", str(tmp_path / "wrong")])


class PixelFeatures(torch.nn.Module):
    """Mean and contrast of an image."""

    def forward(self, images):
        flat = images.flatten(1).float()
        return torch.stack([flat.mean(1), flat.std(1)], 1)


def test_classes_counted_as_steps_pool_to_the_whole():
    source = torch.Generator().manual_seed(0)
    values, labels = torch.randn(60, 2, generator=source, dtype=torch.float64), torch.arange(60) % 3
    values = values + labels[:, None]
    moments = StepMoments(4, (2,))
    for label in range(3):
        moments.add(label, values[labels == label])
    whole = moments.pooled()
    torch.testing.assert_close(whole.mean[0], values.mean(0))
    torch.testing.assert_close(whole.var[0], values.var(0, correction=0))
    away = values - torch.stack([values[labels == label].mean(0) for label in range(3)])[labels]
    torch.testing.assert_close(moments.within, away.square().sum(0) / 57)


def test_a_flow_is_measured_but_for_its_first_point(tmp_path):
    """At pure noise -log SNR is infinite and lambda is 1: the table has no row for it."""
    flow = {"path_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
    words = words_of(tmp_path, "tests.test_exposure_scripts.Exact", "linear", **flow)
    words = [word for word in words if word not in ("--spacing", "respace")]
    save_checkpoint({"state_dict": tiny_model(**flow).state_dict()}, tmp_path / "model.ckpt", overwrite=True)
    common = [*words, "--sampler", "Heun"]
    found = choose_eps_scaling.main([*common, "--method", "norms", "--rounds", "1", "--out", str(tmp_path / "norms")])
    assert len(found.table) == 9 and all(abs(factor - 1) < 0.02 for _, factor in found.table)
    schedule = str(tmp_path / "norms" / "schedule.yaml")
    out = exposure_bias.main([*common, "--eps_schedule", schedule, "--out", str(tmp_path / "bias")])
    rows = read_csv(out / "norms.csv")
    assert rows[0]["minus_log_snr"] == float("inf") and rows[0]["scaled_lambda"] == 1.0
    assert all(abs(row["scaled_over_training"] - 1) < 0.02 for row in rows)
