"""The commands of `decu evaluate`, from references to studies, on digits and a tiny model."""

import csv
import json
from dataclasses import asdict, fields
from typing import get_args

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.commands.evaluate_classifier import EvaluateClassifier
from ldm.commands.evaluate_metrics import DistortionName, EvaluateMetrics, MetricName, MetricSettings
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.sample_model import SampleModel
from ldm.commands.shared import ModelSource, Placement
from ldm.data.digits import Digits
from ldm.evaluation.classifier import Architecture, SmallClassifier, accuracy, load_classifier, save_classifier
from ldm.evaluation.distortions import DISTORTIONS
from ldm.evaluation.extraction import open_features
from ldm.evaluation.features import ClassifierFeatures
from ldm.evaluation.fid import frechet_distance
from ldm.evaluation.metrics import METRICS, Options
from ldm.evaluation.statistics import moments, save_statistics
from ldm.pipelines.images import DataSetImages
from ldm.settings import Sampling
from tests.cli import call
from tests.conftest import tiny_config, tiny_model

DIGITS = "target=ldm.data.digits.Digits"
TESTS = ImageSource(data=(DIGITS, "params.split=test"))
QUICK = MetricSettings(resamples=5, fid_resamples=2, kid_subsets=2)
CPU = Placement("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, the features of digits' test images, and those images as an array."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), folder / "a.safetensors", {})
    features = FeatureChoice("classifier", weights=str(folder / "a.safetensors"))
    EvaluateReference(TESTS, str(folder / "ref"), features=features, place=CPU).run()
    images, labels = DataSetImages(Digits("train")).everything()
    np.savez(folder / "train.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    return folder


def measure(place, out, images, ref="ref", **more):
    return EvaluateMetrics(images, str(place / ref), str(out), settings=QUICK, place=CPU, **more).run()


def array(place, **more):
    """The training images of `place` as a source."""
    return ImageSource(images=str(place / "train.npz"), **more)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def features(place, split, count=None):
    images, _ = DataSetImages(Digits(split)).everything()
    return ClassifierFeatures(place / "a.safetensors")(images[:count])


def test_all_metrics_of_an_array_with_the_references_extractor(place, tmp_path):
    rows = {row.metric: row for row in measure(place, tmp_path, array(place, n=200))}
    expected = frechet_distance(
        *(moments(features(place, *which)).statistics() for which in (("test",), ("train", 200)))
    )
    assert rows["fid"].value == pytest.approx(expected, rel=1e-5)
    assert {"sfid", "is", "kid", "cmmd", "cmmd_biased", "precision", "recall", "density", "coverage"} < set(rows)
    written = {row["metric"]: row for row in table(tmp_path / "metrics.csv")}
    assert float(written["fid"]["value"]) == rows["fid"].value and written["fid"]["features"] == "classifier"
    assert json.loads((tmp_path / "metrics.json").read_text())["kid"]["low"] == rows["kid"].low
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["images"]["count"] == 200 and record["features"]["sha256"]
    again = {row.metric: row for row in measure(place, tmp_path, array(place, n=200))}
    assert again == rows


def test_a_set_with_itself_has_distance_zero(place, tmp_path):
    rows = measure(place, tmp_path, TESTS, metrics=("fid", "cmmd_biased", "precision_recall"))
    values = {row.metric: row.value for row in rows}
    assert values["fid"] == pytest.approx(0, abs=1e-9) and values["cmmd_biased"] == pytest.approx(0, abs=1e-7)
    assert values["precision"] == values["recall"] == 1


def test_pictures_of_mixed_sizes_stand_on_either_side_at_one_image_size(place, tmp_path):
    """Pictures of one grey each stay so at any size: scaled and cut to 8 they are the 8 x 8 ones, at distance 0."""
    greys = list(range(5, 250, 6))
    np.savez(tmp_path / "small.npz", arr_0=np.stack([np.full((8, 8, 1), grey, np.uint8) for grey in greys]))
    (tmp_path / "mixed").mkdir()
    for index, grey in enumerate(greys):
        shape = (9 + index % 5, 8 + index % 7)
        Image.fromarray(np.full(shape, grey, np.uint8)).save(tmp_path / "mixed" / f"{index:02d}.png")
    mixed = ImageSource(images=str(tmp_path / "mixed"), image_size=8)
    small = ImageSource(images=str(tmp_path / "small.npz"), image_size=8)
    chosen = FeatureChoice("classifier", weights=str(place / "a.safetensors"))
    for images, ref, out in ((mixed, "small.npz", "a"), (small, "mixed", "b"), (mixed, "mixed", "c")):
        rows = measure(tmp_path, tmp_path / out, images, ref, metrics=("fid",), features=chosen)
        assert rows[0].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="image_size"):
        source = ImageSource(images=str(tmp_path / "mixed"))
        measure(tmp_path, tmp_path / "d", source, "small.npz", metrics=("fid",), features=chosen)


def test_a_list_keeps_the_images_it_names(place, tmp_path):
    for index, image in enumerate(np.load(place / "train.npz")["arr_0"][:12]):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(tmp_path / "p" / f"{index}.png")
    (tmp_path / "keep.txt").write_text("10.png\n3.png\n7.png\n")
    source = ImageSource(images=str(tmp_path / "p"), keep=str(tmp_path / "keep.txt"))
    measure(place, tmp_path / "out", source, metrics=("fid",))
    found = open_features(tmp_path / "out").pooled
    np.testing.assert_allclose(found, features(place, "train")[[10, 3, 7]], rtol=1e-5)


def test_published_statistics_and_batches_serve_as_reference(place, tmp_path):
    own = open_features(place / "ref").given["pooled"]
    save_statistics({"pooled": own}, tmp_path / "published.npz")
    images = array(place, n=50)
    chosen = FeatureChoice("classifier", weights=str(place / "a.safetensors"))
    rows = measure(tmp_path, tmp_path / "a", images, "published.npz", features=chosen)
    assert [row.metric for row in rows] == ["fid", "is", "is_corrected", "is_10_splits"]
    test_images, _ = DataSetImages(Digits("test")).everything()
    arrays = {"mu": own.mean.numpy(), "sigma": own.covariance.numpy()}
    np.savez(tmp_path / "batch.npz", arr_0=test_images.permute(0, 2, 3, 1).numpy(), **arrays)
    both = {row.metric: row.value for row in measure(tmp_path, tmp_path / "b", images, "batch.npz", features=chosen)}
    expected = {row.metric: row.value for row in measure(place, tmp_path / "c", images, features=chosen)}
    assert set(both) == set(expected) and both == pytest.approx(expected, rel=1e-5)


def test_studies_of_size_and_distortion(place, tmp_path):
    images = array(place, n=120)
    studies = {"sample_sizes": (30, 60, 120), "repeats": 2, "distortions": ("blur", "noise"), "levels": (0.0, 1.0)}
    measure(place, tmp_path, images, metrics=("fid", "kid"), **studies)
    sizes = table(tmp_path / "sample_sizes.csv")
    assert [(row["metric"], row["size"]) for row in sizes[:3]] == [("fid", "30"), ("fid", "60"), ("fid", "120")]
    assert sizes[2]["percent"] == "100.0" and float(sizes[0]["mean"]) > float(sizes[2]["mean"])
    distorted = {
        (r["distortion"], r["strength"], r["metric"]): float(r["value"]) for r in table(tmp_path / "distortions.csv")
    }
    assert len(distorted) == 2 * 2 * 3
    plain = json.loads((tmp_path / "metrics.json").read_text())["fid"]["value"]
    assert distorted["blur", "0.0", "fid"] == plain == distorted["noise", "0.0", "fid"]
    assert distorted["blur", "1.0", "fid"] > 2 * plain
    for name in ("sample_sizes.png", "distortions.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 300
    (row,) = measure(place, tmp_path / "one", images, metrics=("fid",), distort="blur:1")
    assert row.value == pytest.approx(distorted["blur", "1.0", "fid"])


def test_a_model_is_sampled_as_its_own_command_does(place, tmp_path):
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "model.ckpt")
    OmegaConf.save(OmegaConf.create({"model": tiny_config()}), tmp_path / "tiny.yaml")
    model = ModelSource(base=str(tmp_path / "tiny.yaml"), ckpt=str(tmp_path / "model.ckpt"))
    sampling = Sampling(steps=2, seed=5)
    images = ImageSource(n=20, model=model, sampling=sampling)
    measure(place, tmp_path / "out", images, metrics=("fid",))
    SampleModel(source=model, out=str(tmp_path / "samples"), n=20, sampling=sampling, place=CPU).run()
    images = torch.from_numpy(np.load(tmp_path / "samples" / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    expected = ClassifierFeatures(place / "a.safetensors")(images)
    # Another batch size may round a byte differently.
    np.testing.assert_allclose(open_features(tmp_path / "out").pooled, expected, atol=0.05)


def test_processes_share_the_images(place, tmp_path, monkeypatch):
    images = array(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert measure(place, tmp_path, images, metrics=("fid",)) is None and not (tmp_path / "metrics.csv").exists()
    monkeypatch.setenv("RANK", "0")
    assert measure(place, tmp_path, images, metrics=("fid",))[0].n == 1438


def test_errors_say_what_to_do(place, tmp_path):
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 2), tmp_path / "b.safetensors", {})
    images = array(place)
    cases = [
        (array(place, n=9999), {}, "there are 1438 images"),
        (images, {"features": FeatureChoice(weights=str(tmp_path / "b.safetensors"))}, "other weights"),
        (images, {"distort": "blur"}, "NAME:STRENGTH"),
        (images, {"metrics": ("kid",), "sample_sizes": (1,)}, "no such file|sizes must lie"),
    ]
    for number, (source, more, match) in enumerate(cases):
        with pytest.raises(ValueError, match=match):
            measure(place, tmp_path / str(number), source, **more)
    with pytest.raises(FileNotFoundError, match="no images at"):
        measure(place, tmp_path / "x", ImageSource(images=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="--features is needed"):
        EvaluateReference(images, str(tmp_path / "y")).run()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "expected one of --images, --data"),
        ({"images": "a.npz", "data": (DIGITS,)}, "expected one of --images, --data"),
        ({"images": "a.npz", "n": 0}, "at least 1, got 0"),
        ({"model": ModelSource(run="logs/a")}, "--n is needed"),
        ({"images": "a.npz", "sampling": Sampling(steps=10)}, "give --run"),
    ],
)
def test_an_image_source_names_one_set_of_images(given, match):
    with pytest.raises(ValueError, match=match):
        ImageSource(**given)


def test_words_give_the_same_numbers(place, tmp_path, capsys):
    words = ["--images", place / "train.npz", "--n", 60, "--ref", place / "ref", "--metrics", "fid", "--seed", 3]
    quick = ["--fid_resamples", 2, "--device", "cpu"]
    found = call("evaluate metrics", [*words, *quick, "--out", tmp_path / "words"])
    images = array(place, n=60, sampling=Sampling(seed=3))
    assert found == measure(place, tmp_path / "value", images, metrics=("fid",))
    with pytest.raises(SystemExit):
        call("evaluate metrics", [*words, "--out", tmp_path / "z", "--nonsense", 3])
    assert "nonsense" in capsys.readouterr().err


def test_options_name_what_the_library_has():
    assert get_args(MetricName) == tuple(METRICS) and get_args(DistortionName) == tuple(DISTORTIONS)
    own = asdict(MetricSettings())
    assert own == {name: value for name, value in asdict(Options()).items() if name in own}
    assert {field.name for field in fields(MetricSettings)} < {field.name for field in fields(Options)}


def test_a_classifier_is_trained_with_its_record(tmp_path):
    out = tmp_path / "digits.safetensors"
    command = {"base": ("configs/evaluation/digits.yaml",), "out": str(out), "epochs": 1, "place": CPU}
    rate = EvaluateClassifier(**command, changes=("classifier.width=4",)).run()
    spec = OmegaConf.load(tmp_path / "digits.yaml")
    assert spec.test_accuracy == rate and spec.test_images == 359 and spec.architecture.width == 4
    assert spec.training.epochs == 1
    images, labels = DataSetImages(Digits("test")).everything()
    assert accuracy(load_classifier(out), images, labels) == rate
    with pytest.raises(FileExistsError):
        EvaluateClassifier(**command).run()
    with pytest.raises(ValueError, match="unknown key 'depth'"):
        EvaluateClassifier(**command, overwrite=True, changes=("classifier.depth=4",)).run()


def test_words_change_the_config_of_a_classifier(tmp_path):
    words = ["--base", "configs/evaluation/digits.yaml", "--out", tmp_path / "d.safetensors", "--epochs", 1]
    call("evaluate classifier", [*words, "--device", "cpu", "classifier.width=4", "classifier.num_features=8"])
    spec = OmegaConf.load(tmp_path / "d.yaml")
    assert spec.architecture.width == 4 and spec.architecture.num_features == 8
