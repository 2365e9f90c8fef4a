"""`decu benchmark`, tiny: what it writes, that it goes on, methods and rows of others, and what it refuses."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ldm.benchmark.cells import read_cell, read_oracle
from ldm.benchmark.measures import HALF
from ldm.benchmark.outcome import OVERVIEW, list_gaps
from ldm.commands.benchmark import BenchmarkMethods
from ldm.report.pages import write_page
from ldm.report.tables import read_csv

SMALL = {
    "seeds": 1,
    "steps": 6,
    "head_steps": 3,
    "retrainings": 4,
    "control_retrainings": 4,
    "noises": 2,
    "check_noises": 1,
    "draws": 2,
    "particles": 2,
    "fit_draws": 1,
    "refit_draws": 1,
    "refits": 2,
    "sampler_steps": 3,
    "other_steps": [2, 4],
    "left_out_retrainings": 4,
    "reals": 4,
    "members": 2,
}
METHODS = ["epistemic.DeepEnsemble", "aleatoric.NearestNeighbour", "aleatoric.RandomScores"]
DOCS = Path(__file__).parents[2] / "docs" / "benchmark.md"
# The method of the page, as it stands there.
OWN = DOCS.read_text().split("```python\n")[1].split("```")[0]


OTHER_CLASS = {"target": "ldm.benchmark.settings.World", "params": {"data": "few", "seed": 0}}


def write_config(folder, **more):
    methods = [{"target": f"ldm.benchmark.{name}"} for name in METHODS]
    content = {"benchmark": SMALL, "benchmark_methods": [*methods, *more.pop("methods", [])], **more}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with a method and a row of others."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "own_method_of_a_test.py").write_text(OWN)
    row = {"name": "given", "kind": "control", "worlds": {name: {"values": [1] * 20} for name in ("few_0", "all_0")}}
    (folder / "row.json").write_text(json.dumps(row))
    methods = [{"target": "own_method_of_a_test.PredictedNorm"}]
    config = write_config(folder, methods=methods, benchmark_rows=[str(folder / "row.json")])
    sys.path.insert(0, str(folder))
    yield BenchmarkMethods(config, str(folder / "out")).run()
    sys.path.remove(str(folder))


def test_tables_hold_every_method_with_its_controls(written):
    rows = read_csv(written / "benchmark.csv")
    names = {"deep ensemble", "nearest neighbour", "random", "size of the predicted noise"}
    assert {*names, "given"} <= {row["method"] for row in rows}
    own = [row for row in rows if row["benchmark"] == "few-image AUROC minus control"]
    assert names <= {row["method"] for row in own}
    assert not any(row["best"] or row["beats_neighbour"] for row in rows)  # one seed bears nothing
    costs = {row.pop("method"): row for row in read_csv(written / "costs.csv")}
    assert set(costs) == {*names, "given"} and costs["given"].pop("kind") == "control"
    assert not any(costs["given"].values()) and all(costs["deep ensemble"].values())
    assert json.loads((written / "benchmark.json").read_text())["sentences"]
    assert (written / "detection.png").exists()
    assert {row["weights"] for row in read_csv(written / "levels.csv")} >= {"Laplace full, last layer", HALF}
    assert {row["ensemble"] for row in read_csv(written / "averaging.csv")} >= {"deep ensemble", "DECU LoRA"}


def test_left_out_and_other_data_are_asked_for(written):
    rows = read_csv(written / "benchmark.csv")
    names = {row["benchmark"] for row in rows if row["method"] == "nearest neighbour"}
    assert {"other data, photographs: AUROC", "left-out class, real images: AUROC minus control"} <= names
    assert {"picture ranks: retrained from scratch, a class left out", "FD gain, a fifth dropped"} <= names
    reals = read_cell(written / "cells" / "out_0" / "nearest-neighbour.safetensors").reals
    assert len(reals) == 6 * SMALL["reals"]


def test_cells_are_the_variance_of_the_members(written):
    cell = read_cell(written / "cells" / "few_0" / "deep-ensemble.safetensors")
    assert cell.values.shape == (20,)
    torch.testing.assert_close(cell.map.double().sum(1), cell.values, rtol=1e-5, atol=1e-8)
    assert cell.record["command"].endswith("--only few_0/deep-ensemble")
    assert cell.record["cost"]["evaluations"] >= 2 * SMALL["sampler_steps"]
    oracle = read_oracle(written / "cells" / "few_0" / "oracle-retrained-from-scratch.safetensors")
    assert oracle.pictures.shape == (4, 20, 64)


def test_page_says_what_was_found(written):
    page = write_page(written).read_text()
    assert "networks were trained from scratch" in page
    assert "Who follows the oracle" in page


def test_goes_on_and_refuses_other_settings(written, capsys):
    config = str(written.parent / "tiny.yaml")
    assert BenchmarkMethods(config, str(written)).choose_cells() == []
    BenchmarkMethods(config, str(written), dry_run=True).run()
    assert "nothing is missing" in capsys.readouterr().out
    more = BenchmarkMethods(config, str(written), changes=("benchmark.seeds=2",)).choose_cells()
    assert {cell.world.seed for cell in more} == {1}
    with pytest.raises(ValueError, match="results of other settings"):
        BenchmarkMethods(config, str(written), changes=("benchmark.steps=7",)).run()


def test_dry_run_prints_every_command_and_a_time(tmp_path, capsys):
    BenchmarkMethods(write_config(tmp_path), str(tmp_path / "out"), dry_run=True).run()
    said = capsys.readouterr().out
    assert said.count("decu benchmark --config") == 3 * (1 + len(METHODS)) + 5
    assert "minutes of one core" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": [{"target": "ldm.benchmark.settings.World", "params": {"data": "few", "seed": 0}}]}, "expected a"),
        ({"methods": [{"target": "ldm.benchmark.aleatoric.RandomScores"}]}, "two methods are called 'random'"),
    ],
)
def test_what_is_no_method_is_refused(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        BenchmarkMethods(write_config(tmp_path, **more), str(tmp_path / "out")).run()


def test_a_section_that_does_nothing_is_refused(tmp_path):
    command = BenchmarkMethods(write_config(tmp_path), str(tmp_path / "out"), dry_run=True)
    with pytest.raises(ValueError, match="no section 'benchmark_row': did you mean 'benchmark_rows'"):
        command.add_words(["benchmark_row=[]"]).run()


class NeedsWhatIsMissing:
    """A method of a library that nobody has."""

    name = "method of a missing library"
    kind = "epistemic"
    needs = ("no_such_library", "laplace")

    def score(self, problem):
        raise AssertionError("a method whose library is missing must not run")


def test_a_missing_library_is_a_stated_gap(tmp_path):
    command = BenchmarkMethods(write_config(tmp_path), str(tmp_path / "out"))
    plan = replace(command.plan, methods=[*command.plan.methods, NeedsWhatIsMissing()])
    assert not any(cell.name == NeedsWhatIsMissing.name for cell in plan.cells)
    (row,) = list_gaps(plan)
    assert row["method"] == NeedsWhatIsMissing.name
    assert "not run: no_such_library is not installed" in row[OVERVIEW[0]]


def test_a_killed_run_goes_on_with_what_it_had(tmp_path):
    """The first cells are made alone, as before a kill; then the rest, and the first are the same files."""
    config = write_config(tmp_path)
    first = BenchmarkMethods(config, str(tmp_path / "out"), only=("all_0/random",))
    first.run()
    file = tmp_path / "out" / "cells" / "all_0" / "random.safetensors"
    before = file.stat().st_mtime_ns, file.read_bytes()
    (file.parent / "leftover.partial").write_text("half of a file")
    pending = BenchmarkMethods(config, str(tmp_path / "out")).choose_cells()
    assert "all_0/random" not in {cell.key for cell in pending}
    BenchmarkMethods(config, str(tmp_path / "out"), only=("all_0/nearest-neighbour",)).run()
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"trains": {}}, "no key 'trains'"),
        ({"train": {"target": "ldm.data.digits.Digits"}}, "train and test stand together"),
        ({"others": {"turned": {"target": "ldm.data.digits.Digits"}}}, "'turned' is taken"),
        ({"others": {"mine": OTHER_CLASS}}, "benchmark_data.others.mine"),
    ],
)
def test_data_that_cannot_be_taken_are_refused(tmp_path, section, words):
    config = write_config(tmp_path, benchmark_data=section)
    with pytest.raises(ValueError, match=words):
        BenchmarkMethods(config, str(tmp_path / "out"), dry_run=True).run()


def test_unknown_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no cell 'few_9/random'"):
        BenchmarkMethods(write_config(tmp_path), str(tmp_path / "out"), only=("few_9/random",)).run()
