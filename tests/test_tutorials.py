"""The tutorials run whole, one after the other, on tiny models in place of those that they train."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.training.session import read_training_config
from tests.conftest import smallest_unet, tiny_config, tiny_model

DOCS = Path(__file__).parent.parent / "docs"
FLOW = {
    "parameterization": "velocity",
    # Times as they are: a random network would follow a thousandfold time in waves, which adaptive steps have to trace.
    "schedule_config": {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1.0}},
    "times_config": {"target": "ldm.diffusion.training_times.UniformTimes"},
}
UNET = {"unet_config": smallest_unet()}
PARAMS = {"digits-flow": {**FLOW, **UNET}, "digits-diffusion": UNET}


def write_run(training):
    """Write the run directory of a training as it would be, with random weights of a tiny model; return its path."""
    config = read_training_config(training)
    params = PARAMS[training.name]
    assert bool(config.model.params.get("schedule_config")) == ("schedule_config" in params)
    path = Path(training.logdir) / f"2026-01-01T00-00-00_{training.name}"
    (path / "configs").mkdir(parents=True)
    save_checkpoint({"state_dict": tiny_model(**params).state_dict()}, path / "checkpoints" / "last.ckpt")
    config.model = tiny_config(**params)
    OmegaConf.save(config, path / "configs" / "2026-01-01T00-00-00-project.yaml")
    (path / "finished.json").write_text("{}")
    return path


def check_pictures(folder, names):
    for name in names:
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert picture.std() > 0, f"{name}.png is empty"


@pytest.mark.slow
def test_both_tutorials_run_and_draw(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr("ldm.training.session.train", lambda training: trained.append(training) or write_run(training))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(DOCS / "tutorial_flow.py"))
    assert [training.name for training in trained] == list(PARAMS)
    check_pictures(tmp_path / "results/tutorial_flow", ["samples_flow", "samples_diffusion", "trajectory", "data"])
    said = capsys.readouterr().out
    assert "Euler by either convention differs by" in said and "11 states kept" in said

    laplace = runpy.run_path(str(DOCS / "tutorial_laplace.py"))
    assert len(trained) == 2, "the second tutorial takes the runs of the first"
    names = ["held", "methods", "by_class", "states_flow", "states_diffusion", "two_kinds"]
    check_pictures(tmp_path / "results/tutorial_laplace", names)
    # Held weights are the truth: tangents of the same draws follow them, fresh weights lose the scale.
    totals = {name: float(var.sum() / laplace["held"].var.sum()) for name, var in laplace["found"].items()}
    assert 0.5 < totals["tangents"] < 2
