"""Cells on disk, rows that were made elsewhere, and settings."""

import json

import pytest
import torch

from ldm.benchmark.artefacts import Artefacts
from ldm.benchmark.cells import make_file_name, read_cell, read_row, write_cell
from ldm.benchmark.method import MethodCost, Scored, check_scored
from ldm.benchmark.settings import CLASS_LEFT_OUT, FEW_IMAGES, BenchmarkSettings, World, read_settings


class Given:
    name = "gamma^2 of X, as given"
    kind = "control"


def test_cell_comes_back_with_its_command_and_cost(tmp_path):
    maps = torch.rand(3, 4)
    cost = MethodCost(12.5, 0.25, 3.0, 1024, 2048)
    found = {"values": maps.double().sum(1), "map": maps, "steps_5": maps[:2, 0]}
    write_cell(tmp_path / "x.safetensors", Given(), Scored(maps), found, cost, {"command": "decu benchmark", "seed": 2})
    cell = read_cell(tmp_path / "x.safetensors")
    assert (cell.name, cell.kind, cell.reals) == (Given.name, "control", None)
    assert [*cell.steps] == [5]
    torch.testing.assert_close(cell.map, maps)
    assert cell.record["seed"] == 2
    assert cell.record["cost"]["evaluations"] == 12.5


def test_artefact_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": torch.ones(3)}

    for _ in range(2):
        kept = Artefacts(tmp_path)
        torch.testing.assert_close(kept.get("net", make)["a"], torch.ones(3))
        assert kept.used["net"].bytes == 12
        assert kept.used["net"].seconds >= 0
    assert len(made) == 1


def test_row_of_a_file_is_scores_and_is_checked(tmp_path):
    file = tmp_path / "row.json"
    content = {"name": "mine", "kind": "epistemic", "worlds": {"few_0": {"values": [1, 2], "map": [[1, 2], [3, 4]]}}}
    file.write_text(json.dumps(content))
    cell = read_row(file, "few_0", 2)
    assert cell.values.tolist() == [1, 2]
    assert cell.map.shape == (2, 2)
    with pytest.raises(ValueError, match=r"expected 3 values of few_0.*got 2 values"):
        read_row(file, "few_0", 3)
    with pytest.raises(ValueError, match=r"expected 2 values of all_0.*got nothing"):
        read_row(file, "all_0", 2)
    file.write_text(json.dumps({**content, "kind": "best"}))
    with pytest.raises(ValueError, match="got 'best'"):
        read_row(file, "few_0", 2)


def test_names_become_files():
    assert make_file_name("gamma^2 of the re-noised picture") == "gamma-2-of-the-re-noised-picture"


def test_settings_say_what_is_wrong():
    assert read_settings({"seeds": 2}).retrainings == 60
    for name, value in {
        "seeds": 0,
        "retrainings": 2,
        "particles": 3,
        "other_steps": [20, 10],
        "check_noises": 20,
        "reals": 1,
        "few_classes": 10,
    }.items():
        with pytest.raises(ValueError, match=name):
            read_settings({name: value})
    with pytest.raises(ValueError, match="no setting 'retraining'"):
        read_settings({"retraining": 60})


def test_classes_with_few_images_rotate_over_seeds():
    settings = BenchmarkSettings()
    assert World(FEW_IMAGES, 0).few_classes(settings) == (0, 1, 2)
    assert World(FEW_IMAGES, 3).few_classes(settings) == (0, 1, 9)


def test_a_class_is_left_out_at_every_seed_and_others_keep_their_images():
    settings = BenchmarkSettings()
    world = World(CLASS_LEFT_OUT, 12)
    assert world.left_out_class == 2
    assert [world.images_of(label, 50, settings) for label in range(4)] == [50, 50, 0, 50]
    assert World(FEW_IMAGES, 0).images_of(2, 50, settings) == 10
    assert world.retrainings(settings) == settings.left_out_retrainings


def test_scores_of_other_pictures_are_refused():
    class Asked:
        labels = torch.zeros(4)

    with pytest.raises(ValueError, match="a value of each of 4 pictures"):
        check_scored(Scored(value=torch.zeros(3)), Asked(), "mine")
    with pytest.raises(ValueError, match="not finite"):
        check_scored(Scored(value=torch.full((4,), torch.nan)), Asked(), "mine")
    with pytest.raises(ValueError, match="map, a value"):
        check_scored(Scored(), Asked(), "mine")
