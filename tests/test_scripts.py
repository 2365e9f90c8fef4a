"""The command lines, from components to reports, on a tiny model: what they write, and what they refuse."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from ldm.commands.data_bins import MakeBins
from ldm.commands.evaluate_recognise import EvaluateRecognise
from ldm.commands.export import Export
from ldm.commands.gather import Gather
from ldm.commands.line import COMMANDS
from ldm.commands.rollout import Rollout
from ldm.commands.sample_members import SampleMembers
from ldm.commands.shared import EnsembleSource, ModelSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.commands.uncertainty_pixels import UncertaintyPixels
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.storage import read_ensemble
from ldm.settings import Branching, Sampling, Training
from ldm.training.session import train
from tests.cli import call
from tests.conftest import tiny_config, tiny_model

CPU = Placement("cpu")


def make_member(folder, component, ensemble, **trainer):
    """The training of a member of an ensemble, of the config in a folder."""
    return Training(
        base=(f"{folder}/tiny.yaml",),
        gpus="0,",
        scale_lr=False,
        start_from_pretrained=True,
        logdir=f"{folder}/logs",
        seed=component,
        component=component,
        ensemble_name=ensemble,
        trainer=trainer,
    )


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A folder with a trunk, bins and two trained components."""
    folder = tmp_path_factory.mktemp("ensemble")
    save_checkpoint({"state_dict": tiny_model().state_dict()}, folder / "trunk.ckpt")
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    subset = {"dataset": digits, "folder": str(folder / "bins"), "component": 0}
    config = {
        "model": tiny_config(pretrained_path=str(folder / "trunk.ckpt"), guidance_scale=3.0),
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 8, "num_workers": 0, "train": digits},
        },
        "uncertainty": {"branch_at": 0.0, "steps": 5, "n": 3},
        "lightning": {
            "trainer": {"max_steps": 2, "enable_progress_bar": False, "log_every_n_steps": 1},
            "callbacks": {"image_logger": {"params": {"disabled": True}}},
        },
        "components": {
            "model": {"base_learning_rate": 1e-2},
            "data": {"params": {"train": {"target": "ldm.data.subsets.ComponentSubset", "params": subset}}},
        },
    }
    OmegaConf.save(OmegaConf.create(config), folder / "tiny.yaml")
    MakeBins(base=str(folder / "tiny.yaml"), out=str(folder / "bins"), components=2).run()
    for component in range(2):
        train(make_member(folder, component, "boot"))
    return folder


@pytest.fixture(scope="module")
def ensemble(components):
    return call("gather", ["--path", f"{components}/logs", "--ensemble_name", "boot", "--ensemble_comps", "2"])


def test_ensemble_holds_what_the_components_learned(components, ensemble):
    assert ensemble == components / "logs" / "boot_digits_2"
    loaded = read_ensemble(ensemble)
    table = loaded.members.overrides["cond_stage_model.embedding.weight"]
    trunk = load_state_dict(components / "trunk.ckpt")["cond_stage_model.embedding.weight"]
    assert torch.equal(table[:, 10], trunk[10].expand(2, -1)), "the null class is the trunk's"
    runs = sorted((components / "logs").glob("*_boot[01]"))
    for member, folder in enumerate(runs):
        content = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        assert list(content["state_dict"]) == ["cond_stage_model.embedding.weight"]
        assert torch.equal(content["state_dict"]["cond_stage_model.embedding.weight"], table[member])
    assert loaded.spec["bins"][1] == 1
    assert len(loaded.spec["class_names"]) == 10
    assert [member["component"] for member in loaded.spec["members"]] == [0, 1]


def test_missing_components_are_named(components):
    with pytest.raises(ValueError, match=r"components \[2\] are missing: found \[0, 1\]"):
        Gather(f"{components}/logs", ensemble_name="boot", ensemble_comps=3).run()


def test_samples_are_those_of_each_member_alone(components, ensemble):
    path = call("sample members", ["--path", str(ensemble), "--classes", "3", "8", "--seed", "5", "--device", "cpu"])
    saved = load_state_dict(path.with_suffix(".safetensors"))
    assert saved["latents"].shape == (2, 2, 1, 8, 8)
    assert Image.open(path).size[0] > 100
    noise = ImageNoise(5, (0, 0))
    for member in range(2):
        model = tiny_model()
        model.load_state_dict(load_state_dict(ensemble / f"member_00{member}.safetensors"), strict=False)
        x = noise.initial((2, 1, 8, 8))
        alone = run(ddim(model.denoiser(torch.tensor([3, 8]), 3.0), model.schedule, x, model.sampling_times(5)))
        # Folded and single batches round differently; five guided steps carry it to 1e-5 of the values' size.
        torch.testing.assert_close(saved["latents"][member], alone, atol=2e-4, rtol=2e-4)
    with pytest.raises(FileExistsError):
        SampleMembers(EnsembleSource(str(ensemble)), classes=(3, 8), place=CPU).run()


def test_rollouts_show_what_is_shared_and_what_is_not(ensemble):
    out = call("rollout", ["--path", str(ensemble), "--classes", "1", "--unc_branch", "2", "--device", "cpu"])
    assert out == ensemble / "samps_uncs_branch2" / "rollout_sample"
    assert [file.name for file in out.glob("*.png")] == ["rollout_bin1_1_1.png"]
    assert json.loads((out / "record.json").read_text())["settings"]["branch_step"] == 2


@pytest.mark.slow
def test_class_table_resumes_and_merges(ensemble, monkeypatch, capsys):
    table = UncertaintyClasses(EnsembleSource(str(ensemble)), out=str(ensemble / "table"), place=CPU)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = table.run()
    assert not (out / "uncertainty.csv").exists(), "half the classes are another process's"
    monkeypatch.setenv("RANK", "1")
    table.run()
    with open(out / "uncertainty.csv") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [int(row["class"]) for row in rows] == list(range(10))
    assert {row["n"] for row in rows} == {"3"}
    assert all(0 <= float(row["mi_mean"]) <= math.log(2) for row in rows)
    assert "Spearman" in capsys.readouterr().out
    assert (out / "uncertainty.png").exists()
    monkeypatch.delenv("WORLD_SIZE")
    single = replace(table, out=str(ensemble / "single"), classes=(4,)).run()
    with open(single / "uncertainty.csv") as file:
        alone = next(csv.DictReader(line for line in file if not line.startswith("#")))
    assert float(alone["mi_mean"]) == pytest.approx(float(rows[4]["mi_mean"]), rel=1e-4), (
        "a class has its noise, not its batch's"
    )


def test_pixel_maps(ensemble):
    out = call(
        "uncertainty pixels", ["--path", str(ensemble), "--classes", "0", "1", "2", "--n", "2", "--device", "cpu"]
    )
    maps = np.load(out / "pixel_unc_branch0.npz")
    assert maps["mi"].shape == (3, 2, 8, 8)
    assert maps["mi"].min() >= 0
    assert maps["mi"].max() <= math.log(2)
    assert len(list(out.glob("*.png"))) == 2


@pytest.mark.parametrize("kind", [SampleMembers, Rollout, UncertaintyPixels])
def test_outputs_that_exist_are_refused_before_anything_is_computed(kind, ensemble, tmp_path):
    """The second branch point's picture exists: nothing is drawn of the first one either."""
    source, later = EnsembleSource(str(ensemble)), Branching(step=(2, 3))
    command = kind(source, classes=(1,), out=str(tmp_path / "out"), branching=later, place=CPU)
    command.run()
    made = sorted(tmp_path.rglob("*"))
    again = replace(command, branching=Branching(step=(1, 3)))
    with pytest.raises(FileExistsError, match="--overwrite"):
        again.run()
    assert sorted(tmp_path.rglob("*")) == made
    replace(again, overwrite=True).run()


@pytest.mark.parametrize("kind", [SampleMembers, Rollout, UncertaintyPixels, UncertaintyClasses])
def test_classes_that_do_not_exist_or_come_twice_are_refused(kind, ensemble, tmp_path):
    command = kind(EnsembleSource(str(ensemble)), out=str(tmp_path), place=CPU)
    for classes in ((10,), (-1,), (3, 3)):
        with pytest.raises(ValueError, match=r"different classes of 0\.\.9, got"):
            replace(command, classes=classes).run()
    if kind is UncertaintyPixels:
        with pytest.raises(ValueError, match="at least 1, got 0"):
            replace(command, n=0)
    assert not list(tmp_path.iterdir())


def test_ensembles_whose_names_end_alike_are_told_apart(components, ensemble):
    """A newer run of 'reboot' is no component of 'boot'; nor is one of 'my_boot', by the name that it recorded."""
    for name in ("reboot", "my_boot"):
        train(make_member(components, 1, name, max_steps=1))
    gathered = Gather(f"{components}/logs", ensemble_name="boot", ensemble_comps=2, data_name="again").run()
    again, before = (read_ensemble(folder) for folder in (gathered, ensemble))
    # The digests are of files, whose header has the same entries in any order.
    records, expected = ([{**one, "sha256": None} for one in each.spec["members"]] for each in (again, before))
    assert records == expected
    for name, value in again.members.overrides.items():
        assert torch.equal(value, before.members.overrides[name])


def test_trunk_of_a_run_and_its_recognition(components, capsys):
    validation = "data.params.validation"
    training = Training(
        base=(f"{components}/tiny.yaml",),
        gpus="0,",
        logdir=f"{components}/trunks",
        name="trunk",
        changes=(
            "model.params.use_ema=true",
            f"{validation}.target=ldm.data.digits.Digits",
            f"{validation}.params.split=test",
        ),
        trainer={"limit_val_batches": 1},
    )
    run_folder = train(training)
    out = Export(str(run_folder), str(components / "exported.ckpt")).run()
    state = load_state_dict(out)
    kept = load_state_dict(run_folder / "checkpoints" / "last.ckpt")
    assert not any(name.startswith("model_ema") for name in state)
    assert torch.equal(state["model.diffusion_model.out.2.bias"], kept["model_ema.diffusion_modelout2bias"])
    grid = components / "recognised.png"
    source = ModelSource(str(run_folder))
    rate = EvaluateRecognise(source, n=2, grid=str(grid), sampling=Sampling(steps=2), place=CPU).run()
    assert 0 <= rate <= 1
    assert json.loads(grid.with_suffix(".json").read_text())["recognised"] == rate
    with pytest.raises(FileExistsError, match="choose another --grid, or add --overwrite"):
        EvaluateRecognise(source, n=2, grid=str(grid), sampling=Sampling(steps=2), place=CPU).run()
    with Image.open(grid) as picture:
        assert picture.height > 10 * 96, "a row for each class, its name beside it"
    assert "real test images 99" in capsys.readouterr().out, "the classifier itself knows the digits"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_defaults(name, capsys):
    with pytest.raises(SystemExit) as stop:
        call(name, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert "(default: " in text and "(default: None)" not in text


def test_another_split_than_the_members_had_is_refused(ensemble):
    with pytest.raises(ValueError, match="were trained on binned_classes"):
        SampleMembers(EnsembleSource(str(ensemble), dataset="masked_classes"), place=CPU).run()


def test_a_wrong_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no ensemble\.yaml"):
        SampleMembers(EnsembleSource(str(tmp_path))).run()
