"""The commands of `decu features`, on a small untrained model of digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.evaluate_metrics import EvaluateMetrics, MetricSettings
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.features_classifier import FeaturesClassifier, FeaturesGuide, FeaturesNetwork, RecognitionOutput
from ldm.commands.features_contrastive import FeaturesContrastive
from ldm.commands.features_probe import FeaturesProbe
from ldm.commands.features_uncertainty import FeaturesUncertainty
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.shared import ModelSource, Placement
from ldm.data.digits import Digits
from ldm.diffusion.noise import keyed_normal
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.noise_conditional import WRN_TRAINING, NoisyTraining
from ldm.experiments.probes import ProbePlan, draw_probe_positions
from ldm.report.tables import read_csv, write_csv
from ldm.settings import FeatureReading
from ldm.util import instantiate_from_config
from tests.cli import call
from tests.conftest import tiny_config, tiny_model
from tests.models.test_classifier_training import ENCODER

DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
TESTS = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
TAPS = ("mid", "out_1")
CPU = Placement("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A config with digits, and a checkpoint."""
    folder = tmp_path_factory.mktemp("features")
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 8, "train": DIGITS, "validation": TESTS}}
    config = {"model": tiny_config(), "data": data, "probe": {"at": {"t": [50]}, "layer": "out_1"}}
    OmegaConf.save(OmegaConf.create(config), folder / "tiny.yaml")
    save_checkpoint({"state_dict": tiny_model().state_dict()}, folder / "model.ckpt")
    return ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))


def test_linear_probe(source, tmp_path):
    reading = FeatureReading(t=(20.0, 200.0), layers=TAPS)
    command = FeaturesProbe(
        source, str(tmp_path), grid=True, n_train=200, epochs=3, seeds=2, reading=reading, place=CPU
    )
    command = replace(command, pixels=True, untrained=True)
    results = command.run()
    assert {name: len(result.test) for name, result in results.items()} == {"trained": 2, "untrained": 2, "pixels": 2}
    rows = read_csv(tmp_path / "trained.csv")
    assert len(rows) == 4
    assert sum(row["chosen"] for row in rows) == 1
    errors = read_csv(tmp_path / "errors.csv")
    assert [str(row["name"]) for row in errors[:10]] == Digits().human_names, "classes are named"
    best = max(rows, key=lambda row: row["validation"])
    assert (best["t"], best["layer"]) == results["trained"].place
    assert (tmp_path / "trained.png").is_file()
    assert json.loads((tmp_path / "record.json").read_text())["n_train"] == 200
    again = replace(command, overwrite=True).run()
    assert [again[name].test for name in results] == [results[name].test for name in results]
    with pytest.raises(FileExistsError, match="overwrite"):
        command.run()


def test_linear_probe_takes_its_place_from_the_config_and_tunes(source, tmp_path):
    words = ["--base", source.base, "--ckpt", source.ckpt, "--device", "cpu", "--no_standardise"]
    more = ["--n_train", 64, "--epochs", 1, "--seeds", 1, "--finetune", "--out", tmp_path]
    results = call("features probe", [*words, *more])
    assert results["trained"].place == (50.0, "out_1")
    assert [row["features"] for row in read_csv(tmp_path / "results.csv")] == ["trained", "fine-tuned"]


def as_rank(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.slow
def test_two_processes_share_a_probe_and_find_what_one_does(source, tmp_path, monkeypatch, capsys):
    reading = FeatureReading(t=(50.0,), layers=("mid",))
    common = {"grid": True, "n_train": 510, "epochs": 1, "seeds": 1, "untrained": True, "reading": reading}
    one = FeaturesProbe(source, str(tmp_path / "one"), place=CPU, **common).run()
    command = FeaturesProbe(source, str(tmp_path / "two"), place=CPU, **common)
    as_rank(monkeypatch, 0)
    assert command.run() == {}, "ten of 510 images are another process's"
    as_rank(monkeypatch, 1)
    assert command.run() == one
    for table in ("results.csv", "errors.csv", "trained.csv", "untrained.csv"):
        assert (tmp_path / "two" / table).read_bytes() == (tmp_path / "one" / table).read_bytes()
    assert command.run() == {}, "a process that comes late leaves the outputs as they are"
    assert "another one writes the outputs, or has written them" in capsys.readouterr().out
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        with pytest.raises(FileExistsError, match="overwrite"):
            replace(command, epochs=2).run()


def test_two_processes_share_the_checkpoints_of_contrastive(source, tmp_path, monkeypatch):
    reading = FeatureReading(t=(50.0,), layers=("mid",))
    command = FeaturesContrastive(source, str(tmp_path / "two"), n=40, reading=reading, place=CPU)
    as_rank(monkeypatch, 1)
    assert command.run() == []
    as_rank(monkeypatch, 0)
    rows = command.run()
    assert command.run() == rows, "the outputs are there"
    monkeypatch.delenv("WORLD_SIZE")
    assert replace(command, out=str(tmp_path / "one")).run() == rows


def test_processes_that_would_train_the_same_network_all_refuse(tmp_path, monkeypatch):
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        with pytest.raises(ValueError, match=r"step after step, is not shared between processes, and 2 were started"):
            FeaturesNetwork("none", RecognitionOutput(str(tmp_path / "out"))).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_a_head_on_noisy_images_and_find_what_one_does(source, tmp_path, monkeypatch, capsys):
    few = {"n_train": 70, "batch_size": 2, "epochs": 1, "place": CPU}
    one = RecognitionOutput(str(tmp_path / "one"), n_test=10)
    rows = FeaturesClassifier(source, one, **few).run()
    shared = replace(one, out=str(tmp_path / "two"))
    as_rank(monkeypatch, 0)
    assert FeaturesClassifier(source, shared, **few).run() == [], "half of the batches are another process's"
    as_rank(monkeypatch, 1)
    assert FeaturesClassifier(source, shared, **few).run() == rows
    weights = [load_state_dict(tmp_path / name / "classifier.safetensors") for name in ("one", "two")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    as_rank(monkeypatch, 0)
    assert FeaturesClassifier(source, shared, **few).run() == [], "a process that comes late leaves the outputs"
    assert "another one writes the outputs, or has written them" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="overwrite"):
        FeaturesClassifier(source, shared, **{**few, "epochs": 2}).run()


def test_contrastive(source, tmp_path):
    reading = FeatureReading(t=(50.0,), layers=TAPS)
    pairs = ("noise", "class")
    command = FeaturesContrastive(source, str(tmp_path), n=100, positives=pairs, reading=reading, place=CPU)
    rows = command.run()
    assert [row["layer"] for row in rows] == ["mid", "out_1"]
    assert all(0 <= row["alignment"] < row["class_alignment"] <= 4 for row in rows)
    assert all(-8 <= row["uniformity"] <= 0 for row in rows)
    assert (tmp_path / "contrastive.png").is_file()


@pytest.mark.parametrize("command", ["ddae", "wrn"])
def test_noisy_classifier(source, tmp_path, command):
    output = RecognitionOutput(str(tmp_path / command), n_test=20)
    few = {"n_train": 32, "epochs": 1, "place": CPU}
    if command == "ddae":
        rows = FeaturesClassifier(source, output, **few).run()
    else:
        rows = FeaturesNetwork(source.base, output, mode="VE", depth=10, width=1, warm_up=0, **few).run()
    assert len(rows) == (20 if command == "ddae" else 18)
    assert all(0 <= row["recognised"] <= 100 for row in rows)
    assert (tmp_path / command / "recognition.png").is_file()


def test_a_guiding_classifier_is_measured_under_the_noise_it_was_trained_on(tmp_path):
    """Against logits of images noised here by the table's own alphas, at the network's time t - 1."""
    model = {"params": {"classifier_config": ENCODER, "timesteps": 40, "beta_schedule": "cosine"}}
    model["target"] = "ldm.models.diffusion.classifier.NoisyClassifier"
    OmegaConf.save(OmegaConf.create({"model": model, "data": {"params": {"validation": TESTS}}}), tmp_path / "c.yaml")
    torch.manual_seed(0)
    classifier = instantiate_from_config(model).eval()
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint({"state_dict": classifier.state_dict()}, tmp_path / "c.ckpt")
    output = RecognitionOutput(str(tmp_path / "out"), n_test=60, seed=0)
    rows = FeaturesGuide(str(tmp_path / "c.yaml"), str(tmp_path / "c.ckpt"), output, place=CPU).run()
    assert [row["t"] for row in rows] == list(range(1, 41, 2)) and not (
        tmp_path / "out/classifier.safetensors"
    ).exists()
    tests = Digits(split="test")
    images = torch.stack([tests[place]["image"] for place in draw_probe_positions(len(tests), 60, 0)]).movedim(-1, 1)
    labels = torch.tensor([tests[place]["class_label"] for place in draw_probe_positions(len(tests), 60, 0)])
    noise = keyed_normal([("recognised", 0, row) for row in range(60)], images.shape[1:])
    for row in (rows[0], rows[9], rows[19]):
        t = int(row["t"]) - 1
        x = classifier.sqrt_alphas_cumprod[t] * images + classifier.sqrt_one_minus_alphas_cumprod[t] * noise
        with torch.no_grad():
            right = classifier.classifier(x, torch.full((60,), t)).argmax(1) == labels
        assert row["recognised"] == pytest.approx(100 * float(right.float().mean()))
    with pytest.raises(ValueError, match="expected the config of a NoisyClassifier"):
        OmegaConf.save(OmegaConf.create({"model": tiny_config(), "data": {}}), tmp_path / "d.yaml")
        other = RecognitionOutput(str(tmp_path / "no"))
        FeaturesGuide(str(tmp_path / "d.yaml"), str(tmp_path / "c.ckpt"), other, place=CPU).run()


def test_two_processes_share_the_images_of_a_guiding_classifier(tmp_path, monkeypatch):
    model = {"params": {"classifier_config": ENCODER, "timesteps": 2, "beta_schedule": "cosine"}}
    model["target"] = "ldm.models.diffusion.classifier.NoisyClassifier"
    OmegaConf.save(OmegaConf.create({"model": model, "data": {"params": {"validation": TESTS}}}), tmp_path / "c.yaml")
    save_checkpoint({"state_dict": instantiate_from_config(model).state_dict()}, tmp_path / "c.ckpt")
    outputs = [RecognitionOutput(str(tmp_path / name), n_test=260) for name in ("one", "two")]
    one, two = (FeaturesGuide(str(tmp_path / "c.yaml"), str(tmp_path / "c.ckpt"), to, place=CPU) for to in outputs)
    expected = one.run()
    as_rank(monkeypatch, 1)
    assert two.run() == [], "250 of the images are another process's"
    as_rank(monkeypatch, 0)
    assert two.run() == expected


def test_trunk_features_serve_the_metrics(source, tmp_path):
    """FID of the digits' training images from their test images, in the features of the trunk."""
    params = [f"base={source.base}", f"ckpt={source.ckpt}", "t=50", "layer=out_1"]
    extractor = make_extractor(
        "ldm.pipelines.features.BackboneFeatures",
        params=dict(word.split("=") for word in params) | {"t": 50.0},
        channels=1,
    )
    assert extractor.network.reading.times == (50.0,)
    features = FeatureChoice("ldm.pipelines.features.BackboneFeatures", features_params=tuple(params), channels=1)
    data = "target=ldm.data.digits.Digits"
    train = ImageSource(data=(data, "params.split=train"), n=200)
    EvaluateReference(train, str(tmp_path / "ref"), features=features).run()
    tests = ImageSource(data=(data, "params.split=test"), n=100)
    settings = MetricSettings(resamples=0, fid_resamples=0)
    command = EvaluateMetrics(
        tests, str(tmp_path / "ref"), str(tmp_path / "out"), metrics=("fid", "kid"), settings=settings
    )
    assert command.run() is not None


def test_probe_uncertainty_joins_by_class(tmp_path):
    errors = [{"features": "trained", "class": label, "error": float(10 - label)} for label in range(5)]
    table = [{"class": label, "name": f"c{label}", "bin": "1", "mi_mean": label / 10} for label in range(5)]
    write_csv(tmp_path / "errors.csv", errors)
    write_csv(tmp_path / "uncertainty.csv", table)
    command = FeaturesUncertainty(str(tmp_path), str(tmp_path), str(tmp_path / "out"))
    rows = command.run()
    assert [row["probe error"] for row in rows] == [10.0, 9.0, 8.0, 7.0, 6.0]
    assert "Spearman -1.00" in json.loads((tmp_path / "out" / "record.json").read_text())["result"]
    with pytest.raises(ValueError, match="only 0 classes"):
        replace(command, features="pixels").run()
    write_csv(tmp_path / "errors.csv", [{**errors[0], "error": math.nan}, *errors[1:]], overwrite=True)
    assert len(replace(command, overwrite=True).run()) == 4
    said = json.loads((tmp_path / "out" / "record.json").read_text())["result"]
    assert said.endswith("over 4 classes; without test images: c0"), "a class that nothing was tested on is named"


def test_defaults_are_those_of_the_library():
    """The head's, the network's and the probe's trainings, which the commands repeat so as not to import torch."""
    names = ("epochs", "batch_size", "learning_rate", "warm_up")
    for command, training in ((FeaturesClassifier, NoisyTraining()), (FeaturesNetwork, WRN_TRAINING)):
        assert [getattr(command, name) for name in names] == [getattr(training, name) for name in names]
    assert FeaturesProbe(ModelSource(), "out")._plan() == ProbePlan()


def test_a_table_to_draw_beside_must_be_there(source, tmp_path):
    output = RecognitionOutput(str(tmp_path), beside=(str(tmp_path / "none.csv"),))
    with pytest.raises(FileNotFoundError, match="--beside takes"):
        FeaturesClassifier(source, output, place=CPU).run()
