"""The toy's command, small: what it writes, that its numbers are the library's, and what it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ldm.commands.uncertainty_toy import UncertaintyToy
from ldm.diffusion.transition import ddim_transition
from ldm.experiments.toy_posterior import as_states, step_information
from ldm.experiments.toy_settings import ToySettings
from ldm.experiments.toy_study import Toy
from ldm.report.tables import read_comments, read_csv

SMALL = ToySettings(
    observations=(0, 1, 30),
    size_observations=(0, 30),
    map_observations=(1, 30),
    classes=3,
    states=2,
    sizes=(2, 4),
    map_size=12,
    draws=40,
    members=4,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return UncertaintyToy(str(tmp_path_factory.mktemp("toy") / "out"), settings=SMALL).run()


def test_writes_picture_table_and_record(written):
    assert {file.name for file in written.iterdir()} == {"toy.png", "toy.csv", "record.json"}
    assert min(Image.open(written / "toy.png").size) > 800
    rows, record = read_csv(written / "toy.csv"), json.loads((written / "record.json").read_text())
    assert len(rows) == 3 * 3 * 2
    assert record["bracketed"] == 1.0
    assert set(record["sizes"]) == {"0 observations", "30 observations"}
    assert any("4 members" in line for line in read_comments(written / "toy.csv"))


def test_table_holds_the_truth_of_its_states(written):
    toy = Toy(SMALL)
    assert toy.times[toy.at] == 200
    step = ddim_transition(toy.schedule, 200.0, 100.0, 1.0)
    for row in read_csv(written / "toy.csv"):
        belief = toy.prior.posterior(toy.observe(row["class"], row["observations"]).points)
        state = as_states(torch.tensor([[row["z1"], row["z2"]]], dtype=torch.float64))
        assert row["truth"] == pytest.approx(step_information(belief, toy.schedule, step, state).item(), rel=1e-9)
        assert 0 < row["bhattacharyya"] < row["kl"] < math.log(4)


def test_one_observation_leaves_a_plain_bootstrap_without_disagreement(written):
    plain = {(row["observations"], row["plain_kl"]) for row in read_csv(written / "toy.csv")}
    assert {value for count, value in plain if count == 0} == {None}
    assert {value for count, value in plain if count == 1} == {0}
    assert all(value > 0 for count, value in plain if count == 30)


def test_the_same_command_writes_the_same_numbers_and_replaces_nothing(written, tmp_path):
    command = UncertaintyToy(str(tmp_path), settings=SMALL)
    again = command.run()
    for name in ("toy.csv", "toy.png"):
        assert (again / name).read_bytes() == (written / name).read_bytes()
    with pytest.raises(FileExistsError):
        command.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "KL needs noise"),
        ({"members": 1}, "cannot disagree"),
        ({"step": 9}, "clean data without noise"),
        ({"step": 10}, "is not among the"),
        ({"map_class": 3}, "--map_class"),
        ({"states": 0}, "at least 1"),
        ({"step": 3, "at": 0.5}, "give one of"),
    ],
)
def test_refuses_what_it_cannot_measure(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        UncertaintyToy(str(tmp_path), settings=replace(SMALL, **changes)).run()
    assert not list(tmp_path.iterdir())
