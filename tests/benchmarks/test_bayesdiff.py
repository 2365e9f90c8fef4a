"""Propagated variances and posteriors are compared with the truth that a tiny model allows."""

import json
from dataclasses import replace

import pytest

from benchmarks.bayesdiff import PosteriorStudy
from ldm.commands.line import parse
from tests.posteriors import write_posterior


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_posterior(tmp_path_factory.mktemp("laplace"))


@pytest.mark.slow
def test_the_tables(place, tmp_path):
    shared = {**place.shared, "published": str(place.folder / "published"), "out": str(tmp_path)}
    few = {"n": 3, "grids": (3,), "truth": (4,), "methods": ("tangents", "bayesdiff")}
    study = PosteriorStudy("propagation", **shared, **few)
    rows = study.run()
    assert rows[0]["method"] == "truth" and len(rows) == 4
    assert (rows[0]["total"], rows[0]["pixel"]) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="Heun is not first order"):
        replace(study, sampling=replace(study.sampling, sampler="Heun")).run()
    rows = PosteriorStudy("calibration", **shared, bootstraps=5, tests=8).run()
    assert {"sandwich, sigma from residuals", "published (ef doubled, sigma 1, precision 1)"} <= {
        row["posterior"] for row in rows
    }
    assert json.loads((tmp_path / "record.json").read_text())["options"]["study"] == "calibration"


def test_words_make_the_study(place):
    words = ["calibration", *place.words, "--out", "OUT", "--curvatures", "full", "diag", "--bootstraps", "5"]
    found = parse(PosteriorStudy, words, "bayesdiff.py")
    assert (found.study, found.curvatures, found.bootstraps) == ("calibration", ("full", "diag"), 5)
    assert (found.posterior.draws, found.sampling.steps, found.place.device) == (3, 4, "cpu")
