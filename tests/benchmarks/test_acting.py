"""Studies of promises and of intervals, on samples and pictures whose answer is known."""

import csv

import numpy as np
import pytest
import torch
from scipy.stats import norm

from benchmarks.intervals import split_pictures, summarise
from benchmarks.promises import PromiseStudy
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.pipelines.restoring import RestoredPictures
from tests.commands.test_promise import write_samples


def test_promises_of_several_folders_are_averaged(tmp_path):
    """A judge whose logits are all 0 takes every digit for class 0: bad is every other one."""
    network = SmallClassifier(Architecture(1, 8, 10, width=8, num_features=16)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    save_classifier(network, tmp_path / "judge.safetensors", {})
    folders = tuple(write_samples(tmp_path / f"samples_{seed}", seed=seed) for seed in range(2))
    study = PromiseStudy(folders, str(tmp_path / "judge.safetensors"), str(tmp_path / "out"), 0.5, scores=("sum",))
    rows = study.run()
    assert [row["score"] for row in rows] == ["sum", "random"]
    assert all(row["promised"] == row["accepted share"] == 0 and row["bad of the accepted"] is None for row in rows)
    assert (tmp_path / "out" / "promises.png").exists()
    with open(tmp_path / "out" / "promises.csv") as file:
        assert "30 + 30 samples" in next(csv.reader(file))[0]


def restored(count, scale_known):
    """Errors whose deviation differs from pixel to pixel, and a map that is that deviation, or one of nothing."""
    source = np.random.default_rng(0)
    deviations = source.uniform(0.1, 1.0, (count, 1, 5, 5))
    mean = np.zeros((count, 1, 5, 5))
    clean = deviations * source.standard_normal(mean.shape)
    var = deviations**2 if scale_known else source.uniform(0.1, 1.0, mean.shape) ** 2
    return RestoredPictures(clean, clean, mean, {"map": var})


def test_the_right_map_covers_with_shorter_intervals_and_another_one_with_longer():
    known, other = (split_pictures(restored(300, which), 0.1, 0.9, 20, 0) for which in (True, False))
    for found in (known, other):
        for own in found.values():
            assert own["coverage"].mean() >= 0.9 and own["broken"].mean() <= 0.2 and own["below"].mean() <= 0.1
    ratio = summarise("map", [known["map"], known["map"]])["length over unscaled"]
    # At coverage c the map s needs the normal quantile times the mean of s, equal lengths that of the mixture.
    draws = np.random.default_rng(1)
    mixture = np.abs(draws.uniform(0.1, 1, 400_000) * draws.standard_normal(400_000))
    scaled, equal = (float(known[name]["coverage"].mean()) for name in ("map", "unscaled"))
    assert ratio == pytest.approx(norm.ppf((1 + scaled) / 2) * 0.55 / np.quantile(mixture, equal), rel=0.03)
    assert other["map"]["over"].mean() > 1
    assert np.all(known["unscaled"]["over"] == 1)
