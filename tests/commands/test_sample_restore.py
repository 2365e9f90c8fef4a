"""Restored pictures and their intervals, against an exact model and against the law of a linear one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.sample_restore import SampleRestore
from ldm.data.digits import Digits
from ldm.data.own import splits_of
from ldm.pipelines import load_posterior
from ldm.pipelines.restoring import restore_pictures
from tests.posteriors import CPU, table, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guided model and a posterior of a few digits."""
    folder = tmp_path_factory.mktemp("restore")
    model = write_model(folder, guidance_scale=2.0)
    FitLaplace(model, str(folder / "fit"), n=12, draws=1, prior_precision=50.0, place=CPU).run()
    return SampleRestore(
        model, str(folder / "out"), n=30, calibrate=20, posterior=str(folder / "fit"), risk=0.3, place=CPU
    )


def test_pictures_that_were_trained_on_are_said_to_be(place, tmp_path, capsys):
    """However they are named, by the run's split or by the words of its data set; others are not."""
    config = splits_of(place.source.load(device="cpu").config)["train"]
    words = (f"target={config['target']}", *(f"params.{name}={value}" for name, value in config["params"].items()))
    asked = (("split", {"split": "train"}, True), ("words", {"data": words}, True), ("others", {}, False))
    for name, given, said in asked:
        replace(place, n=10, calibrate=8, posterior=None, out=str(tmp_path / name), **given).run()
        assert ("restores too well" in capsys.readouterr().out) is said
        assert ("restores too well" in (tmp_path / name / "intervals.csv").read_text()) is said


@pytest.mark.slow
def test_intervals_hold_on_other_pictures(place):
    rows = place.run()
    assert [row["map"] for row in rows] == ["unscaled", "data", "weights", "both"]
    content = np.load(f"{place.out}/restored.npz")
    inside = (content["clean"] >= content["low"]) & (content["clean"] <= content["high"])
    best = min(rows, key=lambda row: row["mean length"])
    assert inside.reshape(10, -1).mean() == pytest.approx(best["coverage"])
    assert (content["high"] - content["low"]).mean() == pytest.approx(best["mean length"])
    assert all(row["coverage"] > 0.6 for row in rows)  # 0.7 is promised, of the law; these are 10 pictures
    assert len(table(f"{place.out}/intervals.csv")) == 4
    with pytest.raises(FileExistsError, match="--overwrite"):
        place.run()


def test_maps_and_means_are_those_of_their_definitions(place):
    pipeline = place.source.load(device="cpu")
    laplace = load_posterior(place.posterior, pipeline).laplace
    found = restore_pictures(pipeline, Digits(split="test"), [3, 5], 0.5, laplace=laplace)
    model = pipeline.model
    u = float(model.schedule.time_at(0.5))
    alpha = float(model.schedule.alpha(u))
    x = torch.from_numpy(found.noisy).float() * alpha
    added = found.noisy - found.clean
    assert 0.3 < added.std() < 0.7
    labels = torch.tensor([Digits(split="test")[place]["class_label"] for place in (3, 5)])
    with torch.no_grad():
        mean = model.denoiser(labels)(x, u).x0
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-4)
    alone = restore_pictures(pipeline, Digits(split="test"), [5], 0.5)
    np.testing.assert_allclose(alone.mean[0], found.mean[1], rtol=1e-4, atol=1e-4)  # noise is each picture's own
    draws = laplace.sample(150, torch.Generator().manual_seed(0)).overrides
    name = f"{laplace.name}.weight"
    restored = []
    own = dict(model.network.named_parameters())
    kept = {key: own[key].detach().clone() for key in draws}
    for number in range(150):
        with torch.no_grad():
            for key, value in draws.items():
                own[key].copy_(value[number])
            restored.append(model.denoiser(labels)(x, u).x0)
    with torch.no_grad():
        for key, value in kept.items():
            own[key].copy_(value)
    spread = torch.stack(restored).double().var(0).numpy()
    assert name in draws
    assert np.corrcoef(spread.ravel(), found.variances["weights"].ravel())[0, 1] > 0.9
    assert spread.mean() == pytest.approx(found.variances["weights"].mean(), rel=0.3)
    np.testing.assert_allclose(found.variances["both"], found.variances["data"] + found.variances["weights"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate": 29}, "leaves fewer than two"),
        ({"noise": 1e9}, "noise of 1e\\+09 to one of data is beyond the model's schedule"),
        ({"n": 8, "calibrate": 4, "risk": 0.1}, "4 pictures calibrate nothing.* needs at least 22"),
        ({"split": "nothing"}, "name the pictures with --data"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        replace(place, out=str(tmp_path / "no"), **change).run()
    with pytest.raises(ValueError, match="--noise must be above 0"):
        replace(place, noise=0.0)
