"""`decu exposure measure` and `decu exposure choose` on an exact Gaussian and on a tiny network."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.exposure_choose import ChooseScaling
from ldm.commands.exposure_measure import MeasureExposure
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.shared import ModelSource, Placement
from ldm.data.base import LabelledImages
from ldm.diffusion.epsilon_scaling import load_scaling
from ldm.evaluation.exposure import StepMoments
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.report.tables import read_csv
from ldm.settings import Sampling, Scaling
from ldm.trust import trusting
from ldm.util import generator
from tests.conftest import tiny_config, tiny_model
from tests.exact import ExactNetwork

FACTOR = 1.03


class Gaussians(LabelledImages):
    """Images of N(0.2, 0.5^2), the same for every class."""

    def __init__(self, count: int = 200, image_size: int = 8):
        super().__init__(torch.arange(count) % 10, [str(k) for k in range(10)], (image_size, image_size, 1))

    def read(self, index):
        source = generator("gaussian", index)
        return 0.2 + 0.5 * torch.randn(self.image_shape, generator=source)


class Exact(LatentDiffusion):
    """Its network is exact, but for a noise that is `factor` times too long."""

    factor = 1.0

    @property
    def network(self):
        return ExactNetwork(self, 0.2, 0.25, self.factor)


class TooLong(Exact):
    factor = FACTOR


RESPACED = Sampling(steps=10, spacing="respace")
SMALL = {"n": 200, "batch_size": 50, "place": Placement("cpu")}
SEARCH = {"method": "search", "rounds": 1, "points": 3, "low": 1.0, "high": 1.06}


def write_model(folder, target, schedule="cosine", **params):
    """The config and the checkpoint of a model with an exact denoiser, and its data."""
    config = tiny_config(beta_schedule=schedule, guidance_scale=1.0, **params)
    config["target"] = f"tests.commands.test_exposure.{target}"
    data = {"params": {"train": {"target": "tests.commands.test_exposure.Gaussians"}}}
    OmegaConf.save(OmegaConf.create({"model": config, "data": data}), folder / "exact.yaml")
    save_checkpoint({"state_dict": tiny_model(beta_schedule=schedule).state_dict()}, folder / "model.ckpt")
    return ModelSource(base=str(folder / "exact.yaml"), ckpt=str(folder / "model.ckpt"))


def measured(source, out, sampling):
    """Measure the exposure bias, and return the folder."""
    return MeasureExposure(source, str(out), sampling=sampling, **SMALL).run()


def chosen(source, out, sampling, **options):
    """Choose a scaling, and return it."""
    return ChooseScaling(source, str(out), sampling=sampling, **SMALL, **options).run()


@pytest.mark.slow
def test_an_exact_sampler_has_no_bias(tmp_path, monkeypatch):
    """Norms as in training, delta_t at its floor; parts are shared by two processes and merge to the same numbers."""
    source = write_model(tmp_path, "Exact", "linear")
    many = replace(RESPACED, steps=50, sampler="Heun")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        out = measured(source, tmp_path / "two", many)
        assert (out / "norms.csv").exists() == (rank == "1")
    monkeypatch.delenv("WORLD_SIZE")
    one = measured(source, tmp_path / "one", many)
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


@pytest.mark.slow
def test_the_estimate_finds_how_much_too_long_the_noise_is(tmp_path):
    """A noise that is FACTOR times the exact one everywhere: where lambda is FACTOR nothing is left to correct."""
    source = write_model(tmp_path, "TooLong")
    sampling = replace(RESPACED, sampler="DDPM")
    plain = measured(source, tmp_path / "bias", replace(sampling, scaling=Scaling(FACTOR)))
    rows = read_csv(plain / "norms.csv")
    assert rows[-1]["scaled_lambda"] == FACTOR and rows[-1]["sampling_over_training"] > 1.001
    states = read_csv(plain / "states.csv")
    assert states[-1]["scaled_w2"] < 0.5 * states[-1]["sampling_w2"], "the correction brings x_t back"
    found = chosen(source, tmp_path / "norms", sampling, rounds=2)
    assert len(found.table) == 10 and load_scaling(tmp_path / "norms" / "schedule.yaml") == found
    table = read_csv(tmp_path / "norms" / "choice.csv")
    schedule = Scaling(schedule=str(tmp_path / "norms" / "schedule.yaml"))
    again = measured(source, tmp_path / "after", replace(sampling, scaling=schedule))
    after = read_csv(again / "norms.csv")
    assert {row["lambda_1"] for row in table} == {row["scaled_lambda"] for row in after} or len(after) == 10
    errors = [[abs(row[f"{kind}"] / row["training"] - 1) for row in after] for kind in ("sampling", "scaled_corrected")]
    assert sum(errors[1]) < 0.5 * sum(errors[0]), "corrected norms come nearer to training's"
    with pytest.raises(FileExistsError, match="choose another --out"):
        chosen(source, tmp_path / "norms", sampling)
    with pytest.raises(ValueError, match="this command chooses lambda"):
        chosen(source, tmp_path / "wrong", replace(sampling, scaling=Scaling(1.1)))


@pytest.mark.slow
def test_the_search_finds_the_b_that_undoes_the_excess(tmp_path):
    """By the Frechet distance of pixels, whose reference is the data itself."""
    source = write_model(tmp_path, "TooLong", clip_denoised=False)
    sampling = replace(RESPACED, sampler="DDPM")
    features = "tests.commands.test_exposure.PixelFeatures"
    ref = tmp_path / "ref"
    data = ImageSource(data=("target=tests.commands.test_exposure.Gaussians",))
    EvaluateReference(data, str(ref), features=FeatureChoice(features, channels=1), place=Placement("cpu")).run()
    with trusting(["tests"]):  # the reference names a network of the tests
        found = chosen(source, tmp_path / "search", sampling, ref=str(ref), **SEARCH)
    scores = {row["b"]: row["fid"] for row in read_csv(tmp_path / "search" / "choice.csv")}
    assert set(scores) == {1.0, 1.03, 1.06} and found.b == FACTOR == min(scores, key=scores.get)
    assert json.loads((tmp_path / "search" / "record.json").read_text())["scaling"]["b"] == FACTOR
    assert chosen(source, tmp_path / "by_norms", sampling, metric="norms", **SEARCH).b > 1
    by_states = chosen(source, tmp_path / "by_states", sampling, metric="states", **SEARCH)
    assert by_states.b == FACTOR, "x_t comes back to where it should be"
    with pytest.raises(ValueError, match="needs --ref"):
        chosen(source, tmp_path / "wrong", sampling, **SEARCH)


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
    source = write_model(tmp_path, "Exact", "linear", **flow)
    save_checkpoint({"state_dict": tiny_model(**flow).state_dict()}, tmp_path / "model.ckpt", overwrite=True)
    sampling = Sampling("Heun", 10)
    found = chosen(source, tmp_path / "norms", sampling, rounds=1)
    assert len(found.table) == 9 and all(abs(factor - 1) < 0.02 for _, factor in found.table)
    schedule = Scaling(schedule=str(tmp_path / "norms" / "schedule.yaml"))
    out = measured(source, tmp_path / "bias", replace(sampling, scaling=schedule))
    rows = read_csv(out / "norms.csv")
    assert rows[0]["minus_log_snr"] == float("inf") and rows[0]["scaled_lambda"] == 1.0
    assert all(abs(row["scaled_over_training"] - 1) < 0.02 for row in rows)
