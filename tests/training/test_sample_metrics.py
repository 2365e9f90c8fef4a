"""Metrics of samples in a training: the numbers of a pipeline's own samples, their table, and the best checkpoint."""

import base64
import csv
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm import Sampling, load_model
from ldm.checkpoint import load_checkpoint
from ldm.commands.report import WritePage
from ldm.data.digits import Digits
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.evaluation.features import ClassifierFeatures
from ldm.evaluation.fid import fid
from ldm.evaluation.statistics import moments
from ldm.images import to_uint8
from ldm.training.config_keys import check_config
from ldm.training.runs import RunDirectory
from tests.training.conftest import write_config
from tests.training.runs import run_training
from tests.training.test_parallel import SAME, call

PLACE = "lightning.callbacks.sample_metrics.params"


def words(weights, **params):
    given = {"n": 12, "steps": 2, "features": "classifier", "weights": weights, "batch_size": 5, "scale": 2.0, **params}
    return [f"{PLACE}.{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), path, {})
    return path


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """Eight steps, two validations, the best checkpoint by FID."""
    folder = tmp_path_factory.mktemp("metrics")
    given = words(weights, metrics="[fid,recognised]")
    monitored = ["model.params.monitor=sample/fid", "lightning.modelcheckpoint.params.save_top_k=2"]
    return RunDirectory(run_training(write_config(folder), folder, *given, *monitored))


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_numbers_are_those_of_the_pipelines_samples(run, weights):
    """FID by its own function, of images that `load_model` samples from the kept checkpoint, with averaged weights."""
    extractor = ClassifierFeatures(weights)
    rows = {(row["step"], row["metric"]): float(row["value"]) for row in read_rows(run.path / "sample_metrics.csv")}
    real = Digits(split="test")
    pixels = torch.stack([torch.as_tensor(real[place]["image"]) for place in range(len(real))]).permute(0, 3, 1, 2)

    def features(images):
        found = extractor.activations(torch.from_numpy(to_uint8(images.float())).permute(0, 3, 1, 2))
        return found.pooled, found.logits

    statistics = moments(features(pixels)[0].numpy()).statistics()
    (best,) = run.checkpoints.glob("best-*step=00000005.ckpt")
    model = load_model(best, Sampling(steps=2, scale=2.0, seed=0), device="cpu")
    labels = [image % 10 for image in range(12)]
    pooled, logits = features(model.decode(model.sample_latents(labels, range(12))))
    assert rows["5", "fid"] == pytest.approx(fid(statistics, pooled.numpy()).estimate, rel=1e-4)
    assert rows["5", "recognised"] == pytest.approx(float((logits.argmax(1) == torch.tensor(labels)).float().mean()))
    assert rows["real", "fid"] < rows["5", "fid"]
    assert {row["n"] for row in read_rows(run.path / "sample_metrics.csv")} == {"12"}


def test_curves_are_logged_and_choose_the_best_checkpoint(run):
    logged = [row for row in read_rows(run.path / "csv" / "metrics.csv") if row.get("sample/fid")]
    table = [row for row in read_rows(run.path / "sample_metrics.csv") if row["metric"] == "fid"][1:]
    expected = [float(row["value"]) for row in table]
    assert [float(row["sample/fid"]) for row in logged] == pytest.approx(expected, rel=1e-5)
    kept = load_checkpoint(run.checkpoints / "last.ckpt")["callbacks"]
    assert (run.path / "sample_metrics.png").stat().st_size > 5000
    (best,) = [state["best"] for state in kept.values() if "best" in state]
    assert sorted(best.values()) == pytest.approx(sorted(float(row["value"]) for row in table), rel=1e-5)


def test_curves_are_in_tensorboard_and_on_the_page(run):
    """The values of the table at its steps, as TensorBoard's own reader and the page of the run have them."""
    table = read_rows(run.path / "sample_metrics.csv")
    rows = [row for row in table if row["step"] != "real"]
    assert {row["metric"] for row in rows} == {"fid", "recognised"}
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("fid", "recognised"):
        own = [row for row in rows if row["metric"] == name]
        logged = events.Scalars(f"sample/{name}")
        assert [one.value for one in logged] == pytest.approx([float(row["value"]) for row in own], rel=1e-5)
        assert [one.step for one in logged] == [int(row["step"]) - 1 for row in own]
    (path,) = WritePage((str(run.path),)).run()
    page = path.read_text()
    assert all(f"{float(row['value']):.4g}" in page for row in rows)
    (kind, content) = re.findall(r'src="data:image/(\w+);base64,([^"]+)" alt="sample metrics"', page)[0]
    assert kind == "webp" or base64.b64decode(content) == (run.path / "sample_metrics.png").read_bytes()


@pytest.mark.slow
def test_two_processes_measure_the_samples_of_one(weights, tmp_path):
    """Each samples a share of the images, which have their own noises: one table."""
    given = [*words(weights, metrics="[fid,recognised]"), "--strategy", "ddp", *SAME]
    tables = []
    for name, cpus, size in (("one", "1", 16), ("two", "2", 8)):
        made = ["--cpus", cpus, *given, f"data.params.batch_size={size}"]
        run, code, printed = call(write_config(tmp_path), tmp_path, name, *made)
        assert code == 0, printed
        tables.append(read_rows(run / "sample_metrics.csv"))
    assert [row["step"] for row in tables[1]] == [row["step"] for row in tables[0]]
    values = [[float(row["value"]) for row in table] for table in tables]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_measurements_wait_for_their_steps_and_leave_the_training_alone(run, weights, tmp_path):
    given = words(weights, metrics="[kid]", every_n_steps=6)
    other = RunDirectory(run_training(write_config(tmp_path), tmp_path, *given))
    assert [row["step"] for row in read_rows(other.path / "sample_metrics.csv")] == ["real", "5"]
    states = [load_checkpoint(one.checkpoints / "last.ckpt")["state_dict"] for one in (run, other)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"metrics": "[fidd]"}, "sample_metrics knows fid"),
        ({"metrics": "[fid]", "split": "test"}, r"data\.params\.test"),
        ({"metrics": "[precision_recall]", "n": 3}, "needs at least 4 images"),
        ({"n": 1}, "n of at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(weights, tmp_path, params, reason):
    with pytest.raises(ValueError, match=reason):
        run_training(write_config(tmp_path), tmp_path, *words(weights, **params))
    assert not list((tmp_path / "logs").glob("*"))


def test_a_misspelt_key_is_refused():
    with pytest.raises(ValueError, match="did you mean 'metrics'"):
        check_config({"lightning": {"callbacks": {"sample_metrics": {"params": {"metric": ["fid"]}}}}})
