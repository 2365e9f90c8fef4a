"""From a folder of pictures to a config that trains, and from the config to the page."""

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.commands.data_bins import MakeBins
from ldm.commands.line import run_command, run_file
from ldm.commands.new import CheckData, New, Pictures
from ldm.commands.study import Study
from ldm.data.bins import plan_natural
from ldm.report.tables import read_csv
from ldm.training.config import load_config
from ldm.training.config_keys import load_checked_config
from ldm.training.gathering import find_runs
from ldm.trust import is_admitted
from ldm.util import generator, instantiate_from_config

COUNTS = {"ant": 20, "bee": 12, "cat": 5}


@pytest.fixture
def folder(tmp_path):
    source = generator("pictures")
    for name, count in COUNTS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for place in range(count):
            pixels = torch.randint(256, (12, 10, 3), generator=source, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{place}.png")
    return tmp_path


def write_config(folder, size=8, **more):
    out = str(folder / "my.yaml")
    return New(Pictures(str(folder / "pictures")), size, out, str(folder / "logs"), width=32, **more).run()


def test_the_config_trains_a_model_of_the_pictures_sizes_and_classes(folder, capsys):
    config = load_config([str(write_config(folder))])
    said = capsys.readouterr().out
    assert "3 classes" in said and "s a step on" in said, "what was found, and what a training will take"
    model, data = instantiate_from_config(config.model), instantiate_from_config(config.data)
    data.setup()
    assert model.n_classes == 3 and data.datasets["train"].image_shape == (8, 8, 3)
    assert len(data.datasets["train"]) == 34 and len(data.datasets["validation"]) == 3
    member = load_config([str(folder / "my.yaml")], component=True)
    assert member.data.params.train.params.dataset.params.root == str(folder / "pictures")
    assert member.model.learning_rate == 0.05 and "base_learning_rate" not in member.model


def test_a_width_that_no_network_has_is_refused():
    with pytest.raises(ValueError, match="--width must be a multiple of 32"):
        New(Pictures("pictures"), 8, "my.yaml", width=7)


def test_every_key_of_the_config_has_its_value_once(folder):
    text = write_config(folder, measure=False).read_text()
    assert text.count(str(folder / "pictures")) == 1 + 1, "once as a value, once in the command of the first line"
    assert text.count("image_size: 8") == 1 and text.count("test_fraction: 0.1") == 1
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_config(folder)
    with pytest.raises(ValueError, match="multiple of 4"):
        write_config(folder, size=10, overwrite=True)


def test_pictures_that_cannot_be_read_do_not_stop_a_training(folder):
    (folder / "pictures" / "bee" / "cut.png").write_bytes((folder / "pictures" / "bee" / "0.png").read_bytes()[:60])
    config = load_config([str(write_config(folder, measure=False))])
    data = instantiate_from_config(config.data.params.train)
    assert len([data[place]["image"] for place in range(len(data))]) == 35
    assert data.broken_relpaths == ["bee/cut.png"]


ODD_NAMES = ("a: b #c", "no", "007", "{{ x }}", "p\u00e8re \u732b", 'it\'s "so"', " * ")


def test_folders_and_classes_of_any_name_are_in_the_config_as_they_are(folder):
    root = folder / "my: own #1 {x} \u732b"
    for split in ("train", "val"):
        for name in ODD_NAMES:
            (root / split / name).mkdir(parents=True)
            shutil.copy(folder / "pictures" / "ant" / "0.png", root / split / name)
    out = str(folder / "odd #2.yaml")
    path = New(Pictures(str(root)), 8, out, str(folder / "logs: $y"), width=32, measure=False).run()
    config = load_config([str(path)])
    assert config.paths.data_root == str(root) and config.paths.bins == str(folder / "logs: $y" / "bins")
    for split in ("train", "validation"):
        assert instantiate_from_config(config.data.params[split]).class_names == sorted(ODD_NAMES)
    assert "\u732b" in path.read_text(encoding="utf-8"), "letters that a person can read"


def test_names_that_a_config_takes_for_references_are_refused(folder):
    for split in ("train", "val"):
        shutil.copytree(folder / "pictures", folder / "split" / split)
        (folder / "split" / split / "ant").rename(folder / "split" / split / "${ant}")
    with pytest.raises(ValueError, match=r"rename \$\{ant\}"):
        New(Pictures(str(folder / "split")), 8, str(folder / "my.yaml"), str(folder / "logs"), measure=False).run()
    path = New(Pictures(str(folder / "split" / "val")), 8, str(folder / "my.yaml"), "logs", measure=False).run()
    names = instantiate_from_config(load_config([str(path)]).data.params.train).class_names
    assert names == ["${ant}", "bee", "cat"], "folders that the config does not name are taken"


@pytest.mark.parametrize("name", ["an\nt", "an\x85t", "an\tt"])
def test_names_that_are_no_line_of_a_list_are_refused(name, folder):
    (folder / "pictures" / "ant").rename(folder / "pictures" / name)
    with pytest.raises(ValueError, match="rename 'an"):
        New(Pictures(str(folder / "pictures")), 8, str(folder / "my.yaml"), str(folder / "logs"), measure=False).run()


def test_the_command_of_a_config_writes_it_again(folder):
    rows = ["path;label", *(f"{path.relative_to(folder)};x" for path in (folder / "pictures" / "ant").iterdir())]
    (folder / "list.csv").write_text("\n".join(rows))
    pictures = Pictures(str(folder / "pictures"), classes_from=str(folder / "list.csv"), held_out=0.2)
    first = New(pictures, 8, str(folder / "a.yaml"), str(folder / "logs"), space="pixels", measure=False).run()
    first_text = first.read_text()
    words = shlex.split(first_text.split("`")[1])
    run_command("new", [*words[2:], "--no_measure", "--overwrite"])
    again = (folder / "a.yaml").read_text()
    assert again == first_text and words[:2] == ["decu", "new"]
    assert "--classes_from" in words and "--held_out" in words


def test_a_folder_without_classes_has_a_config_that_passes_the_checks(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    New(Pictures(str(folder / "pictures" / "ant")), 8, "flat.yaml", "logs", width=32, measure=False).run()
    config = load_checked_config(["flat.yaml"])
    assert config.data.params.train.params.depth == 0 and config.data.params.train.params.split == "train"
    capsys.readouterr()
    Study("flat.yaml", dry_run=True).run()
    assert "mistakes" not in capsys.readouterr().out, "one class can be taken for no other"


def test_latents_come_with_the_config_of_their_first_stage(folder):
    path = write_config(folder, size=16, space="latents", measure=False)
    config, first = load_config([str(path)]), load_config([str(folder / "my-first-stage.yaml")])
    config.model.params.first_stage_config.params.ckpt_path = None
    model, stage = instantiate_from_config(config.model), instantiate_from_config(first.model)
    assert model.image_size == 4 and model.channels == 4
    own = {name: value.shape for name, value in stage.state_dict().items() if not name.startswith("loss.")}
    assert own == {name: value.shape for name, value in model.first_stage_model.state_dict().items()}


def test_checking_says_what_lies_there_and_writes_nothing(folder, capsys):
    found = CheckData(Pictures(str(folder / "pictures")), size=32).run()
    assert found.counts("train") == {"ant": 18, "bee": 11, "cat": 5}
    said = capsys.readouterr().out
    assert "37 of 37 pictures are smaller than 32 pixels" in said
    assert [path.name for path in folder.iterdir()] == ["pictures"]


def test_nested_class_folders_are_told_of_depth(folder, capsys):
    for name in ("ant", "bee"):
        for place, path in enumerate(sorted((folder / "pictures" / name).iterdir())):
            (folder / "nested" / name / f"kind{place % 2}").mkdir(parents=True, exist_ok=True)
            path.rename(folder / "nested" / name / f"kind{place % 2}" / path.name)
    CheckData(Pictures(str(folder / "nested"))).run()
    said = capsys.readouterr().out
    assert "ant/kind0 for example: where these are the classes, 4 in all, add --depth 2" in said
    assert len(CheckData(Pictures(str(folder / "nested"), depth=2)).run().class_names) == 4
    assert "--depth" not in capsys.readouterr().out
    CheckData(Pictures(str(folder / "pictures"))).run()
    assert "--depth" not in capsys.readouterr().out, "nothing lies deeper"


class Squares(torch.utils.data.Dataset):
    """A data set of somebody's own: four classes of two pictures, without a word about them."""

    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": torch.full((8, 8, 3), index / 8), "class_label": index % 4}


def test_a_data_set_of_ones_own_in_both_splits_is_enough_for_members_too(folder, monkeypatch, capsys):
    """What reads the pictures is replaced in the two splits, as docs/own_pictures.md says, and nowhere else."""
    monkeypatch.chdir(folder)
    path = write_config(folder, measure=False)
    config = OmegaConf.load(path)
    for split, count in (("train", 8), ("validation", 4)):
        config.data.params[split] = {"target": f"{__name__}.Squares", "params": {"count": count}}
    OmegaConf.save(config, "own.yaml")
    MakeBins(base="own.yaml", out=str(folder / "logs" / "bins"), natural=True, components=2).run()
    member = load_checked_config(["own.yaml"], component=True)
    data = instantiate_from_config(member.data.params.train)
    assert len(data) == 8 and data.n_classes == 4 and data.image_shape == (8, 8, 3)
    assert sorted(data.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3], "a bootstrap within each class"
    capsys.readouterr()
    Study("own.yaml", members=2, dry_run=True).run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and all(("--trust tests" in line) != ("--base" in line) for line in lines), (
        "commands that read a run admit its classes; those that read the user's own config need no word"
    )


@dataclass(frozen=True)
class AskTrust:
    """Say whether the classes that a config of the user's names are admitted."""

    own_classes: ClassVar[set[str]] = {f"{__name__}.Squares"}

    def run(self):
        """Say it of one."""
        return is_admitted(f"{__name__}.Squares")


def test_a_command_admits_the_classes_of_its_own_config_while_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ask"])
    assert run_file(AskTrust) is True
    assert AskTrust().run() is False, "nothing of it is kept"


def test_runs_of_another_config_in_one_folder_are_left_alone(tmp_path):
    """A study of shapes.yaml after one of my_shapes.yaml, and members of other.yaml that were trained in between."""
    names = ["shapes_base", "my_shapes_base", "shapes_bootstrapped0", "my_shapes_bootstrapped0", "other_bootstrapped0"]
    for second, name in enumerate(names):
        (tmp_path / f"2026-01-01T00-00-0{second}_{name}").mkdir()
    found = Study("shapes.yaml", logdir=str(tmp_path))._find_run("shapes_base")
    assert found is not None and found.path.name.endswith("00_shapes_base")
    assert [run.path.name[20:] for run in find_runs(tmp_path, "bootstrapped", "shapes")] == ["shapes_bootstrapped0"]
    assert [run.path.name[20:] for run in find_runs(tmp_path, "bootstrapped", "name of data")] == names[2:]


def test_natural_bins_are_bootstraps_of_the_pictures_as_they_are():
    labels = torch.tensor([0] * 6 + [2] * 3)
    plan = plan_natural(labels, ["a", "b", "c"], members=3, seed=1)
    assert plan.bins == {0: 6, 1: 0, 2: 3}, "a class without images stays without"
    for member in range(3):
        assert labels[plan.positions[member]].bincount().tolist() == [6, 0, 3]
    assert len({tuple(plan.positions[member].tolist()) for member in range(3)}) == 3


def test_a_study_names_every_command_before_it_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    write_config(folder, measure=False)
    capsys.readouterr()
    Study("my.yaml", members=2, dry_run=True).run()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    names = [" ".join(line[1:3]) if line[2][0] != "-" else line[1] for line in lines]
    assert names[:5] == ["train", "export", "data bins", "train", "gather"] and names[-1].startswith("report")
    assert "--natural" in lines[2] and lines[2][lines[2].index("--out") + 1] == str(folder / "logs/bins")


def test_words_of_a_study_change_members_only_where_components_say_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    write_config(folder, measure=False)
    words = ("lightning.trainer.max_steps=7", "data.params.batch_size=3", "components.model.learning_rate=0.1")
    capsys.readouterr()
    Study("my.yaml", members=2, dry_run=True, changes=words).run()
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decu train")]
    assert [tuple(line.split()[-2:]) for line in trained] == [words[:2], words[1:]]


@pytest.mark.slow
def test_a_study_goes_from_the_config_to_the_page_and_does_nothing_twice(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    write_config(folder, measure=False)
    few = ("lightning.trainer.max_steps=2", "components.lightning.trainer.max_steps=2")
    changes = (*few, "uncertainty.n=2", "uncertainty.steps=2")
    page = Study("my.yaml", members=2, logdir="logs", changes=changes).run()
    rows = read_csv(page.parent / "samps_uncs_branch0" / "uncertainty.csv")
    assert {row["name"]: row["images"] for row in rows} == {"ant": 18, "bee": 11, "cat": 5}
    assert [row["mi_mean"] for row in rows] == sorted((row["mi_mean"] for row in rows), reverse=True)
    text = page.read_text()
    assert "disagree most about" in text and all(f"<h3>{name}</h3>" in text for name in COUNTS)
    capsys.readouterr()
    Study("my.yaml", members=2, logdir="logs", dry_run=True, changes=changes).run()
    assert capsys.readouterr().out.split()[:2] == ["decu", "report"], "nothing is left but the page"
    Study("my.yaml", members=2, logdir="logs", changes=changes).run()
    assert "was trained by a config with other" not in capsys.readouterr().out
    late = {"lightning.trainer.max_steps=3": "with 2", "components.lightning.trainer.max_steps=3": "with 2"}
    for word, was in late.items():
        with pytest.raises(ValueError, match=rf"{word} comes too late: logs/.* was trained {was}"):
            Study("my.yaml", members=2, logdir="logs", changes=(*changes, word)).run()
    with pytest.raises(ValueError, match=r"--seed 3 comes too late: .* trained with 0"):
        Study("my.yaml", members=2, logdir="logs", changes=changes, seed=3).run()
    text = Path("my.yaml").read_text()
    Path("my.yaml").write_text(text.replace("split: train", "split: all", 1))
    Study("my.yaml", members=2, logdir="logs", changes=changes).run()
    assert "was trained by a config with other data.params.train, and is used" in capsys.readouterr().out


def test_a_study_refuses_words_that_no_config_has(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_config(folder, measure=False)
    for word in ("foo.bar=1", "model.params.unet_config.params.model_chanels=32", "components.lightning.trainr.a=1"):
        with pytest.raises(ValueError, match=r"known are|did you mean"):
            Study("my.yaml", dry_run=True, changes=(word,)).run()
    with pytest.raises(ValueError, match="--gpus expects"):
        Study("my.yaml", dry_run=True, gpus="abc").run()
