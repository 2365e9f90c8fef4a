"""Nats in standard deviations of the data, on a tiny ensemble: what is compared, what is recorded, what is refused."""

import json
import math

import pytest
import torch

from ldm import load_ensemble
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.commands.uncertainty_pixels import UncertaintyPixels
from ldm.modules.distributions.gaussian import Gaussian
from ldm.pipelines.noise_levels import DATA_SAMPLES, measure_data_deviation
from ldm.report.class_pages import summarise_table
from ldm.report.tables import read_comments, read_csv
from ldm.settings import Sampling
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.quantities import Estimator, pixel_maps
from ldm.uncertainty.results import ClassInformation
from tests.ensembles import write_ensemble

CPU = Placement("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ensemble(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ensemble(folder):
    return load_ensemble(folder, device="cpu")


def made(folder, name):
    (folder / name).mkdir()
    return folder / name


def measure(folder, out, **options):
    return UncertaintyClasses(EnsembleSource(str(folder)), (0, 1, 2), n=2, out=str(out), place=CPU, **options).run()


def test_the_unit_is_the_deviation_of_the_base_models_samples(ensemble):
    labels = [index % 10 for index in range(DATA_SAMPLES)]
    parts = [range(start, start + 16) for start in range(0, DATA_SAMPLES, 16)]
    latents = torch.cat([ensemble.sample_latents([labels[index] for index in part], part) for part in parts])
    for image in (False, True):
        samples = ensemble.decode(latents) if image else latents
        around = samples.double() - samples.double().mean(0)
        expected = (around.square().sum() / (DATA_SAMPLES - 1) / around[0].numel()).sqrt().item()
        assert measure_data_deviation(ensemble, image) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("compared", [None, "image", "x0"])
@pytest.mark.parametrize("distance", ["kl", "bhattacharyya"])
def test_predictions_are_seen_through_the_noise(ensemble, compared, distance):
    found = ensemble.information([3], n=2, noise=0.2, compared=compared, estimator=Estimator(distance))
    step = ensemble.sample_branched([3] * 2, range(2), (0,), only_first=True).first
    seen = step.x0 if compared == "x0" else ensemble.decode(step.x0)
    deviation = 0.2 * measure_data_deviation(ensemble, compared != "x0") * math.sqrt(seen[0, 0].numel())
    expected = mutual_information(Gaussian(seen, deviation**2), distance)
    torch.testing.assert_close(found.results[0].mi, expected, rtol=1e-4, atol=1e-10)


def test_nothing_changes_where_no_noise_is_asked_for(ensemble):
    plan = ensemble.make_plan()
    assert plan.describe() == {"n": 3, "distance": "wasserstein", "distance_scale": "sum"}
    assert "deviation 0.7071 in each" in plan.meaning(ensemble)


@pytest.mark.slow
def test_reports_say_what_the_nats_are(folder, tmp_path):
    plain, noisy = measure(folder, tmp_path / "plain"), measure(folder, tmp_path / "noisy", noise=0.1, data_sd=0.5)
    assert "deviation 0.7071 in each" in (plain / "summary.md").read_text()
    words = (noisy / "summary.md").read_text()
    assert "0.1 standard deviations of the data (0.5)" in words and "is at most this" in words
    assert f"deviation {0.1 * 0.5 * 8:.4g} in each" in words, "images of 8x8 pixels"
    assert any("nats: the information about the member" in line for line in read_comments(plain / "uncertainty.csv"))
    settings = json.loads((noisy / "record.json").read_text())["settings"]
    chosen = {name: settings[name] for name in ("distance", "distance_of", "noise", "data_sd")}
    assert chosen == {"distance": "kl", "distance_of": "image", "noise": 0.1, "data_sd": 0.5}
    lower = measure(folder, tmp_path / "lower", noise=0.1, data_sd=0.5, distance="bhattacharyya")
    for low, high in zip(*(read_csv(each / "uncertainty.csv") for each in (lower, noisy)), strict=True):
        assert 0 < low["mi_mean"] < high["mi_mean"]


@pytest.mark.slow
def test_maps_of_pixels_through_noise(ensemble, folder, tmp_path):
    latents = ensemble.member_latents([1], [0])
    deviation = 0.3 * measure_data_deviation(ensemble, True)
    images = ensemble.decode(latents)  # one channel
    expected = pixel_maps(images.double() / deviation, 0.5)[:, 0]
    found = ensemble.pixel_information([1], noise=0.3, spaces=("image", "latent"))
    torch.testing.assert_close(found.maps["image"][0], expected, rtol=2e-3, atol=1e-8)
    own = pixel_maps(latents.double() / (0.3 * measure_data_deviation(ensemble, False)), 0.5)[:, 0]
    torch.testing.assert_close(found.maps["latent"][0], own.cpu(), rtol=2e-3, atol=1e-8)
    source = EnsembleSource(str(folder))
    out = UncertaintyPixels(source, classes=(1,), noise=0.3, out=str(tmp_path), place=CPU).run()
    assert json.loads(next(out.glob("record*.json")).read_text())["settings"]["noise"] == 0.3
    with pytest.raises(ValueError, match="no --distance_scale beside it"):
        UncertaintyPixels(source, noise=0.3, distance_scale="mean")
    with pytest.raises(ValueError, match="decides the scale"):
        ensemble.pixel_information([1], noise=0.3, scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.1, "distance": "wasserstein"}, "--distance kl"),
        ({"noise": 0.1, "distance_scale": "mean"}, "summed"),
        ({"noise": 0.1, "distance_of": "state"}, "length"),
        ({"noise": 0.0}, "above 0"),
        ({"noise": 0.1, "data_sd": -1.0}, "above 0"),
        ({"data_sd": 1.0}, "unit of --noise"),
        ({"distance": "bhattacharyya", "distance_scale": 0.5}, "bounds nothing"),
    ],
)
def test_what_the_command_refuses_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        UncertaintyClasses(EnsembleSource("nowhere"), **options)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"noise": 0.1, "compared": "state"}, "length of the step"),
        ({"noise": -1.0}, "above 0"),
        ({"data_sd": 1.0}, "unit of noise"),
        ({"noise": 0.1, "estimator": Estimator(scale="mean")}, "bounded by kl"),
        ({"compared": "image", "estimator": Estimator("kl")}, "needs variances"),
    ],
)
def test_what_a_plan_refuses(ensemble, plan, message):
    with pytest.raises(ValueError, match=message):
        ensemble.make_plan(**plan)


@pytest.mark.slow
def test_one_member_and_members_that_agree_rank_nothing(tmp_path, capsys):
    alone = measure(write_ensemble(made(tmp_path, "one"), members=1), tmp_path / "alone")
    same = measure(write_ensemble(made(tmp_path, "two"), spread=torch.zeros(11)), tmp_path / "same", noise=0.1)
    for out, words in ((alone, "one member cannot disagree"), (same, "all 3 members have the same weights")):
        summary = (out / "summary.md").read_text()
        assert words in summary and "Spearman" not in summary and "AUROC" not in summary
        found = json.loads((out / "summary.json").read_text())
        assert "spearman" not in found and "auroc" not in found
        said = summarise_table(out / "uncertainty.csv")
        assert words[4:] in said[0] and "Nats: the information" in said[1] and len(said) == 2
        assert {row["mi_mean"] for row in read_csv(out / "uncertainty.csv")} == {0}
    printed = capsys.readouterr().out
    assert "0.500" not in printed and "[0" not in printed


def test_hidden_classes_of_members_that_agree_are_not_compared(tmp_path):
    sees = {0: [0, 1, 2], 1: [0, 1, 2], 2: [1, 2], 3: [1, 2]}
    record = {"split": "masked_classes", "bins": dict.fromkeys(range(10), "all"), "sees": sees}
    folder = write_ensemble(made(tmp_path, "masked"), members=4, spread=torch.zeros(11), **record)
    summary = (measure(folder, tmp_path / "out") / "summary.md").read_text()
    assert "have the same weights" in summary and "AUROC" not in summary


def test_results_of_the_first_version_are_read_with_their_divisor(ensemble):
    found = ensemble.information([2], n=2).results[0]
    content = json.loads(json.dumps(found.to_json()))
    again = ClassInformation.from_json(2, content, members=3)
    assert torch.equal(again.epistemic_variance, found.epistemic_variance)
    del content["divisor"]
    old = ClassInformation.from_json(2, content, members=3)
    torch.testing.assert_close(old.epistemic_variance, found.epistemic_variance * 3 / 2)
    assert torch.equal(old.mi, found.mi)
    whole = ensemble.with_(sampling=Sampling(steps=4)).sample_branched([2] * 2, range(2), (0,), only_first=True)
    spread = whole.first.distribution.mean.double().var(0).sum((1, 2, 3))
    torch.testing.assert_close(found.epistemic_variance, spread, rtol=1e-4, atol=0)
