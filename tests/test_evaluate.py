"""scripts/evaluate.py from references to studies, on digits and a tiny model."""

import csv
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.data.digits import Digits
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.evaluation.extraction import open_features
from ldm.evaluation.features import ClassifierFeatures
from ldm.evaluation.fid import frechet_distance
from ldm.evaluation.statistics import moments, save_statistics
from ldm.pipelines.images import DataSetImages
from scripts import evaluate
from tests.cli import call
from tests.conftest import tiny_config, tiny_model

DIGITS = ["--data", "target=ldm.data.digits.Digits"]
QUICK = ["--device", "cpu", "--resamples", "5", "--fid_resamples", "2", "--kid_subsets", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, the features of digits' test images, and those images as an array."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), folder / "a.safetensors", {})
    words = [
        "ref",
        *DIGITS,
        "params.split=test",
        "--features",
        "classifier",
        "--weights",
        str(folder / "a.safetensors"),
    ]
    evaluate.main([*words, "--out", str(folder / "ref"), "--device", "cpu"])
    images, labels = DataSetImages(Digits("train")).everything()
    np.savez(folder / "train.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    return folder


def calc(place, out, *words, ref="ref"):
    return evaluate.main(["calc", "--ref", str(place / ref), "--out", str(out), *QUICK, *map(str, words)])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def features(place, split, count=None):
    images, _ = DataSetImages(Digits(split)).everything()
    return ClassifierFeatures(place / "a.safetensors")(images[:count])


def test_all_metrics_of_an_array_with_the_references_extractor(place, tmp_path):
    rows = {row.metric: row for row in calc(place, tmp_path, "--images", place / "train.npz", "--n", 200)}
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
    again = {row.metric: row for row in calc(place, tmp_path, "--images", place / "train.npz", "--n", 200)}
    assert again == rows


def test_a_set_with_itself_has_distance_zero(place, tmp_path):
    rows = calc(place, tmp_path, *DIGITS, "params.split=test", "--metrics", "fid", "cmmd_biased", "precision_recall")
    values = {row.metric: row.value for row in rows}
    assert values["fid"] == pytest.approx(0, abs=1e-9) and values["cmmd_biased"] == pytest.approx(0, abs=1e-7)
    assert values["precision"] == values["recall"] == 1


def test_a_list_keeps_the_images_it_names(place, tmp_path):
    for index, image in enumerate(np.load(place / "train.npz")["arr_0"][:12]):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(tmp_path / "p" / f"{index}.png")
    (tmp_path / "keep.txt").write_text("10.png\n3.png\n7.png\n")
    calc(place, tmp_path / "out", "--images", tmp_path / "p", "--keep", tmp_path / "keep.txt", "--metrics", "fid")
    found = open_features(tmp_path / "out").pooled
    np.testing.assert_allclose(found, features(place, "train")[[10, 3, 7]], rtol=1e-5)


def test_published_statistics_and_batches_serve_as_reference(place, tmp_path):
    own = open_features(place / "ref").given["pooled"]
    save_statistics({"pooled": own}, tmp_path / "published.npz")
    words = [
        "--images",
        place / "train.npz",
        "--n",
        50,
        "--features",
        "classifier",
        "--weights",
        place / "a.safetensors",
    ]
    rows = calc(tmp_path, tmp_path / "a", *words, ref="published.npz")
    assert [row.metric for row in rows] == ["fid", "is", "is_10_splits"]
    test_images, _ = DataSetImages(Digits("test")).everything()
    arrays = {"mu": own.mean.numpy(), "sigma": own.covariance.numpy()}
    np.savez(tmp_path / "batch.npz", arr_0=test_images.permute(0, 2, 3, 1).numpy(), **arrays)
    both = {row.metric: row.value for row in calc(tmp_path, tmp_path / "b", *words, ref="batch.npz")}
    expected = {row.metric: row.value for row in calc(place, tmp_path / "c", *words)}
    assert set(both) == set(expected) and both == pytest.approx(expected, rel=1e-5)


def test_studies_of_size_and_distortion(place, tmp_path):
    words = ["--images", place / "train.npz", "--n", 120, "--metrics", "fid", "kid"]
    studies = ["--sample_sizes", 30, 60, 120, "--repeats", 2, "--distortions", "blur", "noise", "--levels", 0, 1]
    calc(place, tmp_path, *words, *studies)
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
        assert Image.open(tmp_path / name).size[0] > 300
    (row,) = calc(place, tmp_path / "one", *words[:4], "--metrics", "fid", "--distort", "blur:1")
    assert row.value == pytest.approx(distorted["blur", "1.0", "fid"])


def test_a_model_is_sampled_as_its_own_script_does(place, tmp_path):
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "model.ckpt")
    OmegaConf.save(OmegaConf.create({"model": tiny_config()}), tmp_path / "tiny.yaml")
    model = ["--base", tmp_path / "tiny.yaml", "--ckpt", tmp_path / "model.ckpt", "--steps", 2, "--n", 20]
    calc(place, tmp_path / "out", *model, "--metrics", "fid", "--seed", 5)
    call("sample model", [*model, "--seed", 5, "--device", "cpu", "--out", tmp_path / "samples"])
    images = torch.from_numpy(np.load(tmp_path / "samples" / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    expected = ClassifierFeatures(place / "a.safetensors")(images)
    # Another batch size may round a byte differently.
    np.testing.assert_allclose(open_features(tmp_path / "out").pooled, expected, atol=0.05)


def test_processes_share_the_images(place, tmp_path, monkeypatch):
    words = ["--images", place / "train.npz", "--metrics", "fid"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert calc(place, tmp_path, *words) is None and not (tmp_path / "metrics.csv").exists()
    monkeypatch.setenv("RANK", "0")
    assert calc(place, tmp_path, *words)[0].n == 1438


def test_errors_say_what_to_do(place, tmp_path):
    array = ["--images", place / "train.npz"]
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 2), tmp_path / "b.safetensors", {})
    cases = [
        ([], "expected one of --images, --data"),
        ([*array, *DIGITS], "expected one of --images, --data"),
        ([*array, "--n", 9999], "there are 1438 images"),
        ([*array, "--weights", tmp_path / "b.safetensors"], "other weights"),
        ([*array, "--distort", "blur"], "NAME:STRENGTH"),
        ([*array, "--metrics", "kid", "--sample_sizes", 1], "no such file|sizes must lie"),
    ]
    for number, (words, match) in enumerate(cases):
        with pytest.raises(ValueError, match=match):
            calc(place, tmp_path / str(number), *words)
    with pytest.raises(FileNotFoundError, match="no images at"):
        calc(place, tmp_path / "x", "--images", tmp_path / "none")
    with pytest.raises(ValueError, match="--features is needed"):
        evaluate.main(["ref", "--images", str(place / "train.npz"), "--out", str(tmp_path / "y")])
    with pytest.raises(SystemExit):
        calc(place, tmp_path / "z", *array, "--nonsense", 3)
