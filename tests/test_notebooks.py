"""The notebooks run whole on tiny models in place of those that they train; their pairs hold the same cells."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import Branching
from ldm.checkpoint import save_checkpoint, sha256
from ldm.commands.shared import EnsembleSource
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.ensembles import storage
from ldm.training.session import read_training_config
from ldm.util import generator
from tests.conftest import smallest_unet, tiny_config, tiny_model
from tests.ensembles import write_ensemble
from tests.texts import text_config, text_model

NOTEBOOKS = Path(__file__).parent.parent / "docs/notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
FLOW = {
    "parameterization": "velocity",
    # Times as they are: a random network would follow a thousandfold time in waves, which adaptive steps have to trace.
    "schedule_config": {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1.0}},
    "times_config": {"target": "ldm.diffusion.training_times.UniformTimes"},
}
UNET = {"unet_config": smallest_unet()}
PARAMS = {"digits-flow": {**FLOW, **UNET}, "digits-diffusion": UNET}
DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
TOKENS = "cond_stage_model.transformer.token_emb.weight"


def run_notebook(name, smaller=()):
    """Run a notebook in the current folder, words of it replaced by smaller ones; return the names that it defines."""
    text = (NOTEBOOKS / f"{name}.py").read_text()
    for whole, small in dict(smaller).items():
        assert whole in text, whole
        text = text.replace(whole, small)
    Path("notebook.py").write_text(text)
    return runpy.run_path("notebook.py")


def write_run(path, params, config):
    """Write a finished run directory of a tiny model with random weights."""
    (path / "configs").mkdir(parents=True)
    save_checkpoint({"state_dict": tiny_model(**params).state_dict()}, path / "checkpoints" / "last.ckpt")
    config = OmegaConf.merge(config, {})
    config.model = tiny_config(**params)
    OmegaConf.save(config, path / "configs" / "2026-01-01T00-00-00-project.yaml")
    (path / "finished.json").write_text("{}")
    return path


def write_training(training):
    """Write the run directory of a training as it would be, with random weights; return its path."""
    config = read_training_config(training)
    params = PARAMS[training.name]
    assert bool(config.model.params.get("schedule_config")) == ("schedule_config" in params)
    return write_run(Path(training.logdir) / f"2026-01-01T00-00-00_{training.name}", params, config)


def check_pictures(folder, names):
    for name in names:
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert picture.std() > 0, f"{name}.png is empty"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with five tiny members of the digits where quickstart leaves them, and their base model's run."""
    folder = tmp_path_factory.mktemp("digits")
    path = folder / "logs/bootstrapped_digits_5"
    path.mkdir(parents=True)
    write_ensemble(path, members=5, params=UNET)
    config = OmegaConf.create({"data": {"params": {"batch_size": 8, "train": DIGITS}}})
    write_run(folder / "logs/2026-01-01T00-00-00_digits_base", UNET, config)
    return folder


def test_members_are_ranked_and_drawn(digits, monkeypatch, capsys):
    monkeypatch.chdir(digits)
    found = run_notebook("decu_on_digits", {"steps=20": "steps=4", "n=16": "n=4", "n=8": "n=2"})
    check_pictures(digits / "results/decu_on_digits", ["members", "pixels"])
    means = [float(found["info"].mean[place]) for place in found["order"]]
    assert means == sorted(means, reverse=True) and means[-1] > 0
    assert capsys.readouterr().out.count("nats, 95 %") == 20


def test_a_report_is_read(digits, monkeypatch, capsys):
    monkeypatch.chdir(digits)
    rows = run_notebook("reading_a_report", {"Branching(step=0)": "Branching(step=0), n=3"})["rows"]
    said = capsys.readouterr().out
    assert len(rows) == 10 and "sampler: DDIM" in said and "is above" in said
    assert said.count(" classes, ") == len({row["bin"] for row in rows})


def test_a_posterior_of_a_model_is_fitted_and_drawn(digits, monkeypatch):
    monkeypatch.chdir(digits)
    smaller = {"steps=10": "steps=4", "range(200)": "range(40)", "draws=16": "draws=6", "range(8)": "range(4)"}
    found = run_notebook("laplace_of_a_model", smaller)
    check_pictures(digits / "results/laplace_of_a_model", ["variance"])
    assert 0.3 < float(found["score"].total) < 3, "tangents are the limit of held weights"
    assert all(-1 <= float(rank) <= 1 for rank in found["ranks"])


def test_prompts_are_asked_for(tmp_path, monkeypatch, capsys):
    base = text_model()
    folder = tmp_path / "logs/masked/masked_captions_3"
    save_checkpoint({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    rows = base.get_parameter(TOKENS).detach()
    heads = [{TOKENS: rows + 0.05 * torch.randn(rows.shape, generator=generator("m", one))} for one in range(3)]
    spec = {
        "name": "texts",
        "trunk": {"path": str(tmp_path / "base.ckpt"), "sha256": sha256(tmp_path / "base.ckpt")},
        "config": {"model": text_config(guidance_scale=2.0), "uncertainty": {"branch_at": 0.0, "steps": 3, "n": 2}},
        "heads": ["token_embedding"],
        "patterns": [TOKENS],
        "null_class": "shared",
        "members": [{"component": member, "seed": member, "run": "none", "step": 0} for member in range(3)],
    }
    storage.write_ensemble(folder, spec, heads, overwrite=True)
    monkeypatch.chdir(tmp_path)
    assert (run_notebook("texts", {"steps=20": "steps=4", "n=8": "n=2"})["info"].mean > 0).all()
    check_pictures(tmp_path / "results/texts", ["members"])
    assert "a bold seven: " in capsys.readouterr().out


def test_own_pictures_are_drawn_planned_and_ranked(tmp_path, monkeypatch, capsys):
    """The trainings are planned and not run: tests/commands/test_new.py runs a study whole."""
    monkeypatch.chdir(tmp_path)
    names = ["blue_ring", "green_square", "orange_bar", "purple_cross", "red_disc", "yellow_triangle"]
    ensemble = tmp_path / "logs/bootstrapped_shapes_5"
    ensemble.mkdir(parents=True)
    write_ensemble(ensemble, params=UNET, class_names=[*names, *(f"other{number}" for number in range(4))])
    UncertaintyClasses(EnsembleSource(str(ensemble)), tuple(range(6)), n=2, branching=Branching(step=0)).run()
    smaller = {
        "COUNTS |=": "COUNTS = dict.fromkeys(COUNTS, 5); COUNTS |=",
        "SIDE = 32": "SIDE = 8",
        "size=SIDE,": "size=SIDE, measure=False,",
        "changes=CHANGES": "changes=CHANGES, dry_run=True",
    }
    found = run_notebook("own_pictures", smaller)
    said = capsys.readouterr().out
    assert "yellow_triangle: " in said and "decu train --base shapes.yaml" in said
    assert sorted(row["name"] for row in found["rows"]) == names
    assert len(list((tmp_path / "pictures/purple_cross").iterdir())) == 16
    picture = np.asarray(Image.open(tmp_path / "pictures/red_disc/000.png"))
    assert picture.shape == (8, 8, 3) and picture[4, 4, 0] > 1.5 * picture[4, 4, 2], "red in the middle"


@pytest.mark.slow
def test_both_notebooks_of_flows_run_and_draw(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        "ldm.training.session.train", lambda training: trained.append(training) or write_training(training)
    )
    monkeypatch.chdir(tmp_path)
    run_notebook("flow_and_twin")
    assert [training.name for training in trained] == list(PARAMS)
    check_pictures(tmp_path / "results/flow_and_twin", ["samples_flow", "samples_diffusion", "trajectory", "data"])
    said = capsys.readouterr().out
    assert "Euler by either convention differs by" in said and "11 states kept" in said

    laplace = run_notebook("flow_posterior")
    assert len(trained) == 2, "the second notebook takes the runs of the first"
    names = ["held", "methods", "by_class", "states_flow", "states_diffusion", "two_kinds"]
    check_pictures(tmp_path / "results/flow_posterior", names)
    # Held weights are the truth: tangents of the same draws follow them, fresh weights lose the scale.
    totals = {name: float(var.sum() / laplace["held"].var.sum()) for name, var in laplace["found"].items()}
    assert 0.5 < totals["tangents"] < 2


def read_cells(text):
    """The cells of a text in percent format: (kind, source)."""
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        yield kind, re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE) if kind == "markdown" else body.strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_and_its_pair_hold_the_same_cells(name):
    """python -m jupytext --to ipynb --update docs/notebooks/*.py writes the pairs anew."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert cells == list(read_cells((NOTEBOOKS / f"{name}.py").read_text()))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
