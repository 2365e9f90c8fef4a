"""What comes from elsewhere names classes that are known, or is refused before anything is imported."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis.strategies import text
from omegaconf import OmegaConf

from ldm import load_ensemble, load_model, load_posterior
from ldm.commands.evaluate_reference import EvaluateReference
from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.line import run_command
from ldm.commands.shared import Placement
from ldm.commands.words import take_trusted
from ldm.data.plans import read_subsets
from ldm.data.subsets import ComponentSubset
from ldm.evaluation.extraction import open_features
from ldm.evaluation.extractors import make_extractor
from ldm.experiments.image_metrics import read_reference_features
from ldm.training.config import load_config
from ldm.training.runs import RunDirectory
from ldm.trust import accept, escape, is_admitted, settle, trusting
from ldm.util import instantiate_as, instantiate_from_config

WRITTEN = Path(__file__).parent / "fixtures" / "first_version"
BASE = "runs/2026-11-30T08-11-07_base"
ENSEMBLE = "runs/bootstrapped_digits_2"
MODULE = "a_module_that_writes"
# A module of the user's own: importing it leaves a file, and its class is a data set.
OWN = """from pathlib import Path
import numpy
Path({mark!r}).touch()
class Data:
    class_names = ("a", "b")
    n_classes, labels = 2, [0, 1]
    def __init__(self, **params): pass
    def __len__(self): return 2
    def __getitem__(self, index): return {{"image": numpy.zeros((8, 8, 1), "f4"), "class_label": index}}
def leave(**params): Path({mark!r}).touch()
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Where what should not run leaves a file; a copy of what the first version wrote is the current folder."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    mark = tmp_path / "mark"
    (tmp_path / f"{MODULE}.py").write_text(OWN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return mark


def change(file, place, value):
    """Write a value at a dotted place of a YAML file."""
    config = OmegaConf.load(file)
    OmegaConf.update(config, place, value, merge=False, force_add=True)
    OmegaConf.save(config, file)


def project(run=BASE, kind="project"):
    (file,) = Path(run).glob(f"configs/*-{kind}.yaml")
    return file


PLACES = [
    "model",
    "model.params.unet_config",
    "model.params.first_stage_config",
    "model.params.first_stage_config.params.lossconfig",
    "model.params.cond_stage_config",
    "model.params.cond_stage_config.params.tokenizer",
    "model.params.scheduler_config",
    "model.params.schedule_config",
    "data",
    "data.params.train",
    "data.params.train.params.transform",
    "data.params.test.params.dataset",
    "somewhere.nobody.looks",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_names_no_foreign_class_at_any_depth(place, mark):
    change(project(), place, {"target": f"{MODULE}.leave", "params": {"command": f"touch {mark}"}})
    with pytest.raises(ValueError, match=rf"{place}\.target names {MODULE}\.leave, which is no class of this project"):
        load_model(BASE, device="cpu")
    assert not mark.exists() and MODULE not in sys.modules


RUNS = {
    "sample model": ["--run", BASE, "--n", "1", "--steps", "1", "--out", "out"],
    "train": ["--resume", BASE, "-t", "--gpus", "0,"],
    "laplace fit": ["--run", BASE, "--out", "out"],
    "export": ["--run", BASE, "--to", "diffusers", "--out", "out"],
    "features probe": ["--run", BASE, "--out", "out"],
}
ENSEMBLES = ["uncertainty classes", "uncertainty pixels", "sample members", "rollout"]


def refused(command, words, capsys):
    """The sentence with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        run_command(command, words)
    captured = capsys.readouterr()
    return f"{stop.value.code} {captured.err}"


@pytest.mark.parametrize("command", RUNS)
def test_commands_refuse_a_run(command, mark, capsys):
    change(project(), "model.params.unet_config", {"target": "os.system", "params": {"command": f"touch {mark}"}})
    assert "unet_config.target names os.system" in refused(command, RUNS[command], capsys)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["callbacks.mine", "callbacks.image_logger", "modelcheckpoint", "logger"])
def test_a_resumed_run_brings_no_callback(place, mark, capsys):
    change(project(kind="lightning"), place, {"target": "subprocess.call", "params": {"args": ["touch", str(mark)]}})
    assert "names subprocess.call" in refused("train", RUNS["train"], capsys)
    assert not mark.exists()


@pytest.mark.parametrize("command", ENSEMBLES)
def test_commands_refuse_an_ensemble(command, mark, capsys):
    place = "config.model.params.first_stage_config"
    change(f"{ENSEMBLE}/ensemble.yaml", place, {"target": "subprocess.call", "params": {"args": ["touch", str(mark)]}})
    assert "names subprocess.call" in refused(command, ["--path", ENSEMBLE, "--out", "out"], capsys)
    with pytest.raises(ValueError, match=r"names subprocess\.call"):
        load_ensemble(ENSEMBLE, device="cpu")
    assert not mark.exists()


def test_own_pictures_and_networks_that_words_name_are_measured_and_their_files_are_others(tmp_path):
    own = "tests.commands.test_exposure"
    choice = FeatureChoice(f"{own}.PixelFeatures", channels=1)
    data = ImageSource(data=(f"target={own}.Gaussians",))
    EvaluateReference(data, str(tmp_path / "ref"), features=choice, place=Placement("cpu")).run()
    with pytest.raises(ValueError, match=f"target names {own}.PixelFeatures"):
        open_features(tmp_path / "ref")
    with trusting(["tests"]):
        assert open_features(tmp_path / "ref").settings["features"]["extractor"] == f"{own}.PixelFeatures"


def test_a_posterior_a_plan_and_a_reference_are_refused(mark, capsys):
    change("posterior/laplace.yaml", "record.data", {"target": "os.system"})
    with pytest.raises(ValueError, match=r"record\.data\.target names os\.system"):
        load_posterior("posterior", load_model(BASE, device="cpu"))

    plan = {"format": 1, "dataset_name": "binned_classes", "images": 9, "components": 2, "class_names": ["a"]}
    plan |= {"bins": {"all": [0]}, "dataset": {"target": "os.system", "params": {"command": f"touch {mark}"}}}
    Path("bins").mkdir()
    Path("bins/subsets_binned_classes.yaml").write_text(yaml.safe_dump(plan))
    assert "dataset.target names os.system" in refused("data bins", ["--show", "bins"], capsys)
    with pytest.raises(ValueError, match=r"dataset\.target names os\.system"):  # a training's data set
        ComponentSubset({"target": "ldm.data.digits.Digits"}, "bins", 0)

    Path("ref/parts").mkdir(parents=True)
    np.savez("ref/statistics.npz", none=np.zeros(1))
    made = {"features": {"extractor": "subprocess.call", "params": {"args": ["touch", str(mark)]}, "sha256": ""}}
    Path("ref/parts/settings.json").write_text(json.dumps(made))
    for read in (
        read_reference_features,
        open_features,
    ):  # laplace filter and exposure choose build what the latter reads
        with pytest.raises(ValueError, match=r"features\.target names subprocess\.call"):
            read("ref")
    assert not mark.exists()


def test_a_plan_may_name_what_the_caller_has_built(mark):
    own = f"{MODULE}.Data"
    plan = {"format": 1, "dataset_name": "binned_classes", "images": 2, "components": 1, "class_names": ["a", "b"]}
    Path("bins").mkdir()
    Path("bins/subsets_binned_classes.yaml").write_text(
        yaml.safe_dump(plan | {"bins": {"all": [0, 1]}, "dataset": {"target": own}})
    )
    Path("bins/filelist_comp0_binned_classes.txt").write_text("1\n1\n")
    assert ComponentSubset({"target": own}, "bins", 0).positions.tolist() == [1, 1]
    with pytest.raises(ValueError, match=f"dataset.target names {own}"):
        read_subsets("bins")


def test_own_packages_are_trusted_by_name_and_for_one_command(mark):
    change(project(), "data.params.train", {"target": f"{MODULE}.Data"})
    with pytest.raises(ValueError, match="--trust PACKAGE"):
        load_model(BASE, device="cpu")
    model = load_model(BASE, device="cpu", trust=[MODULE])
    assert model.class_names == ("a", "b") and mark.exists()
    with pytest.raises(ValueError, match="--trust PACKAGE"):
        load_model(BASE, device="cpu")


def test_a_config_that_the_user_names_is_the_users_own(mark):
    file = mark.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"model": {}, "data": {"target": f"{MODULE}.Data"}}))
    assert load_config([str(file)]).data.target == f"{MODULE}.Data"
    # But what a training wrote stays a run's.
    change(project(), "data.target", f"{MODULE}.Data")
    with pytest.raises(ValueError, match="--trust"):
        load_config([str(project())])
    with trusting([MODULE]):
        assert load_config([str(project())]).data.target == f"{MODULE}.Data"


@pytest.mark.parametrize(
    "target",
    (
        *("os.system", "ldm.util.get_obj_from_str", "ldm.util.os.system", "ldmx.Net", "main.something", "${a}"),
        *("torch.nn.os.system", "torch.load", "torch.nn.Module", "pytorch_lightning.Trainer", "builtins.exec"),
        *("ldm.commands.train.Train", "ldm.jobs.WorkList", "numpy.load", "transformers.AutoModel", "tests.cli.call"),
        *("taming.modules.vqvae.Quantizer", "ldm.data.pictures.os.system", "ldm.data.pictures.read_names", "os", ""),
    ),
)
def test_names_that_are_not_admitted(target):
    assert not is_admitted(target)
    with pytest.raises(ValueError, match="is no class of this project"):
        accept({"a": [{"b": ({"target": target},)}]}, "file")


@pytest.mark.parametrize("target", [["os", "system"], {"a": "b"}, 5, None])
def test_a_target_that_is_no_text_is_refused(target):
    with pytest.raises(ValueError, match="names"):
        accept({"model": {"target": target}}, "file")


LIBRARY = ("os.system", "posix.system", "subprocess.call", "builtins.eval", "runpy.run_path", "json.tool.main")


@pytest.mark.parametrize("target", LIBRARY)
def test_nothing_is_built_of_the_standard_library_whoever_names_it(target, mark, capsys):
    words = ["--target", target, "--params", f"command=touch {mark}", "--out", "bins"]
    assert f"target {target} is of Python's standard library" in refused("data bins", words, capsys)
    with pytest.raises(ValueError, match="standard library"):
        instantiate_from_config({"target": target})
    assert not mark.exists()


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("ldm.data.module.torch", "is a module"),
        ("ldm.data.module.DataLoader", "a class of torch"),
        ("ldm.data.subsets.read_list", "a function of ldm.data.plans"),
        ("ldm.data.module.torch.os.system", "cannot import"),
        ("ldm.data.prepare.download.BLOCK", "."),
    ],
)
def test_what_is_reached_through_a_module_is_no_class_of_it(target, match):
    with pytest.raises(ValueError, match=match):
        instantiate_from_config({"target": target})
    with pytest.raises(ValueError, match=match):
        make_extractor(target)


def test_what_is_built_is_of_its_kind():
    with pytest.raises(ValueError, match=r"data: ldm\.data\.digits\.Digits gave a Digits, expected a str"):
        instantiate_as(str, {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}, "data")


def test_a_first_stage_that_is_no_module_is_an_error(mark):
    config = {"target": f"{MODULE}.leave"}
    with pytest.raises(ValueError, match=r"first_stage_config: .*leave gave a NoneType, expected a Module"):
        load_model(base=write_config(mark.parent, first_stage_config=config), ckpt="nothing", device="cpu")
    config = {"target": "torch.nn.Identity"}
    with pytest.raises(ValueError, match="a Identity does not encode and decode"):
        load_model(base=write_config(mark.parent, first_stage_config=config), ckpt="nothing", device="cpu")


def write_config(folder, **params):
    """A config of the user's own: the run's model with other parameters."""
    model = OmegaConf.to_container(OmegaConf.load(project()).model)
    model["params"] |= params
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"model": model}))
    return file


QUESTIONS = [
    "${oc.env:SECRET}",
    "${oc.env:${name}}",
    "${oc.${part}:SECRET}",
    r"\${oc.env:SECRET}",
    "${oc.decode:'${oc.env:SECRET}'}",
    "${dollar}{oc.env:SECRET}",
    "${dollar}${rest}",
    "$${rest}",
    "${ oc.env : SECRET }",
    "x-${oc.env:SECRET,default}-y",
]


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_run_does_not_read_the_environment(text, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    content = {"name": "SECRET", "part": "env", "dollar": "$", "rest": "{oc.env:SECRET}", "asked": text}
    found = accept(content, "file")
    for _ in range(3):  # what is filled in once may be a question the next time
        found = OmegaConf.to_container(OmegaConf.create(found), resolve=True)
    assert "hidden" not in str(found)


def test_references_and_other_words_stay_as_they_are():
    content = {"paths": {"root": "data"}, "root": "${paths.root}/x", "near": "${.root}", "cost": "5 $ or $5", "n": [1]}
    assert accept(content, "file") == content


def test_own_questions_are_answered_in_the_files_of_a_run(monkeypatch):
    monkeypatch.setenv("PLACE", "there")
    own = OmegaConf.create({"a": "${oc.env:PLACE}/x", "b": "${a}", "c": [{"d": "${nothing}", "e": "${oc.env:PLACE}"}]})
    settled = OmegaConf.to_container(settle(own), resolve=False)
    assert settled == {"a": "there/x", "b": "${a}", "c": [{"d": "${nothing}", "e": "there"}]}


def test_words_of_trust():
    words = ["--run", "R", "--trust", "mine", "--trust=other.part", "--", "--trust", "theirs"]
    assert take_trusted(words) == (["--run", "R", "--", "--trust", "theirs"], ["mine", "other.part"])
    for wrong in (["--trust"], ["--trust", "--run"]):
        with pytest.raises(ValueError, match="--trust needs"):
            take_trusted(wrong)
    with pytest.raises(ValueError, match="got 'os; x'"), trusting(["os; x"]):
        pass


def test_the_runs_of_the_first_version_name_nothing_else(mark):
    for folder in sorted(Path("runs").glob("2026-*")):
        assert RunDirectory(folder).config().model.target and RunDirectory(folder).config("lightning") is not None
    assert not mark.exists()


@given(text(alphabet="\\${}:ab", max_size=12))
def test_texts_are_read_back_as_they_are(words):
    for plain in ({"names": [words]}, {"a": {"b": f"before {words}"}}):
        assert OmegaConf.to_container(OmegaConf.create(escape(plain)), resolve=True) == plain
