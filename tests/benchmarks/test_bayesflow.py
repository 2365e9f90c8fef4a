"""The benchmarks of flows in one call: from a tiny flow to the table, and what is not done again."""

from dataclasses import replace

import pytest
import torch

from benchmarks.bayesflow import ROTATIONS, FlowVariances
from ldm import Sampling
from ldm.commands.line import parse
from ldm.commands.shared import Placement
from ldm.experiments import low_data
from ldm.report.benchmark_table import benchmark_overview
from ldm.report.tables import read_csv
from tests.conftest import smallest_unet
from tests.experiments.test_variance_benchmarks import FLOW
from tests.posteriors import write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("flow"), **FLOW, unet_config=smallest_unet())


@pytest.mark.slow
def test_one_command_from_a_flow_to_the_table(source, tmp_path):
    parts = ("consistency", "calibration", "alignment", "scaling", "cost")
    small = {"n": 1, "truth": 4, "images": 30, "draws": 2, "bootstraps": 5, "tests": 6, "probes": 2, "grids": (1, 2)}
    place = {"sampling": Sampling(steps=1), "place": Placement("cpu")}
    benchmark = FlowVariances(str(tmp_path), source, only=parts, **small, **place)
    benchmark.run()
    report = (tmp_path / "report.md").read_text()
    assert all(f"| Y{number}" in report for number in (2, 3, 6, 8, 9)) and "nan" not in report
    assert report.count("BayesFlow as published, S = 100") == 2
    kept = {part: (tmp_path / f"{part}.csv").stat().st_mtime_ns for part in parts}
    replace(benchmark).run()
    assert kept == {part: (tmp_path / f"{part}.csv").stat().st_mtime_ns for part in parts}
    assert (tmp_path / "report.md").read_text() == report
    assert benchmark_overview({"unknown": []}) == []


def test_low_data_models_that_were_scored_are_not_trained_again(source, tmp_path):
    """Five tables of scores and the control's: a report, with nothing loaded or trained; a further seed adds to it."""
    place = {"sampling": Sampling(steps=3), "place": Placement("cpu")}
    benchmark = FlowVariances(str(tmp_path), source, only=("low_data",), seeds=(0,), **place)
    work = benchmark.open_scores()
    labels, rising = list(range(10)), {"gamma^2 along": torch.arange(10.0), "BayesFlow": torch.ones(10)}
    rising |= {"gamma^2 of": rising["BayesFlow"], "tangents": rising["BayesFlow"], "distance": -rising["gamma^2 along"]}
    for seed in (0, 1):
        for rotation in ("control", *ROTATIONS):
            few = [] if rotation == "control" else [8, 9]
            scores = {name: values * (rotation != "control") for name, values in rising.items()}
            rows = low_data.score_rows(scores, labels, few)
            work.save(f"scores_{rotation}_{seed}", {"rows": rows})
        replace(benchmark, seeds=tuple(range(seed + 1))).run()
        table = read_csv(tmp_path / "low_data.csv")
        assert len(table) == 5 * 5 * (seed + 1) and {row["classes"] for row in table} == {"8 9"}
    differences = {row["score"]: row["difference"] for row in table}
    assert differences == {**dict.fromkeys(rising, 0), "gamma^2 along": 0.5, "distance": -0.5}
    assert "+0.500 [+0.500, +0.500] (1.000)" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"results of other settings .*per_class: 24 -> 8"):
        replace(benchmark, per_class=8).run()


def test_a_rotation_trains_on_two_classes_with_eight_images(tmp_path):
    words = FlowVariances(str(tmp_path)).make_changes(tmp_path / "bins", rotation=2)
    assert words[0] == "data.params.train.target=ldm.data.subsets.ComponentSubset"
    assert "data.params.train.params.dataset.target=ldm.data.digits.Digits" in words
    lines = (tmp_path / "bins" / "subsets_binned_classes.yaml").read_text().splitlines()
    (few,) = [line for line in lines if line.strip().startswith("8:") or "{8:" in line]
    assert few.count(",") >= 1


def test_words_make_the_benchmark():
    words = ["--run", "RUN", "--out", "OUT", "--only", "fidelity", "cost", "--grids", "3", "5", "--steps", "7"]
    found = parse(FlowVariances, [*words, "--low_data_base", "a.yaml"], "bayesflow.py")
    assert (found.source.run, found.only, found.grids) == ("RUN", ("fidelity", "cost"), (3, 5))
    assert (found.sampling.steps, found.low_data_configs) == (7, ("a.yaml",))
