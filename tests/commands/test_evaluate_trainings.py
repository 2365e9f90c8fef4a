"""Several trainings measured together, against each measured alone."""

import numpy as np
import pytest
import torch

from ldm.commands.evaluate_metrics import EvaluateMetrics, MetricSettings
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.evaluate_trainings import EvaluateTrainings, name_trainings
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.pipelines import load_ensemble
from ldm.pipelines.images import as_bytes
from ldm.pipelines.member_images import MemberImages
from ldm.settings import Branching, Sampling
from tests.ensembles import write_ensemble
from tests.posteriors import CPU, table


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    """Features of some digits by a small classifier."""
    folder = tmp_path_factory.mktemp("reference")
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), folder / "c.safetensors", {})
    images = ImageSource(data=("target=ldm.data.digits.Digits", "params.split=test"), n=60)
    features = FeatureChoice("classifier", weights=str(folder / "c.safetensors"))
    EvaluateReference(images, str(folder / "ref"), features=features, place=CPU).run()
    return str(folder / "ref")


def test_members_are_measured_as_each_alone(ref, tmp_path):
    write_ensemble(tmp_path, members=2, spread=torch.full((11,), 0.5))
    sampling = Sampling(steps=2)
    common = {"settings": MetricSettings(fid_resamples=4, kid_subset_size=10, resamples=4), "place": CPU}
    command = EvaluateTrainings(
        ref,
        str(tmp_path / "out"),
        25,
        ensemble=str(tmp_path),
        metrics=("fid",),
        sampling=sampling,
        batch_size=7,
        **common,
    )
    (band,) = command.run()
    pipeline = load_ensemble(tmp_path, sampling, Branching(step=0), device="cpu")
    numbers = list(range(25))
    latents = pipeline.member_latents([number % 10 for number in numbers], numbers)[:, :, 0]
    alone = []
    for member, own in enumerate(latents):
        pictures = as_bytes(pipeline.decode(own), "samples").permute(0, 2, 3, 1).numpy()
        file = tmp_path / f"member_{member}.npz"
        np.savez(file, arr_0=pictures)
        (row,) = EvaluateMetrics(
            ImageSource(images=str(file)), ref, str(tmp_path / f"alone_{member}"), metrics=("fid",), **common
        ).run()
        alone.append(row.value)
    assert band.values == pytest.approx(alone, rel=1e-4) and alone[0] != alone[1]
    written = table(tmp_path / "out" / "trainings.csv")
    assert float(written[0]["sd over trainings"]) == pytest.approx(abs(alone[0] - alone[1]) / 2**0.5, rel=1e-3)
    assert len(table(tmp_path / "out" / "each.csv")) == 2 and (tmp_path / "out" / "trainings.png").exists()
    parts = MemberImages(pipeline, 25)
    assert torch.equal(parts.read(3, 9), torch.cat([parts.read(3, 4), parts.read(4, 9)]))


def test_words_that_do_not_fit_are_refused(ref):
    with pytest.raises(ValueError, match="members of one --ensemble"):
        EvaluateTrainings(ref, "out", 10)
    for runs in (("a",), ("a", "a"), ("a", "b", "b/../a")):
        with pytest.raises(ValueError, match=f"two or more --runs, each once, got {' '.join(runs)}"):
            EvaluateTrainings(ref, "out", 10, runs=runs)


def test_trainings_of_one_name_are_told_apart():
    assert name_trainings(["logs/a", "logs/b/"]) == ["a", "b"]
    checkpoints = ["logs/a/checkpoints/last.ckpt", "logs/b/checkpoints/last.ckpt"]
    assert name_trainings(checkpoints) == checkpoints
