"""One command from nothing to every figure of BayesFlow: its trainings, posteriors and pictures, and what it keeps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.report.tables import read_csv

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("by_class", "by_pixel", "grid_flow", "grid_diffusion", "methods", "two_kinds", "totals_by_steps")
NETWORK = {"model_channels": 32, "channel_mult": "[1,1]", "num_res_blocks": 1}
TINY = ["data.params.batch_size=4", "lightning.trainer.max_steps=1"]
TINY += [f"model.params.unet_config.params.{name}={value}" for name, value in NETWORK.items()]
SMALL = "--n 2 --shown 1 --draws 2 --by_steps 2 --quality_n 1 --real 200 --probes 1 --flow_steps 2 --diffusion_steps 2"


def plots(*words):
    """bash scripts/bayesflow_plots.sh as a user calls it, with the Python of the tests."""
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = ["bash", str(ROOT / "scripts/bayesflow_plots.sh"), *words]
    return subprocess.run(command, env=path, capture_output=True, text=True)


@pytest.mark.slow
def test_one_command_from_nothing_to_every_figure(tmp_path):
    words = ["--data", "digits", "--logs", str(tmp_path), "--fit", "4", "--draws", "1", *TINY]
    made = plots(*words, "--", *SMALL.split())
    assert made.returncode == 0, made.stderr
    out = tmp_path / "bayesflow" / "digits"
    for name in (*FIGURES, "quality_by_steps"):
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert picture.std() > 0, f"{name}.png is empty"
        assert str(out / f"{name}.png") in made.stdout
    rows = read_csv(out / "quality.csv")
    assert {(row["model"], row["steps"]) for row in rows} == {("flow", 2), ("diffusion", 2)}
    assert json.loads((out / "record.json").read_text())["options"]["n"] == 2
    assert len(list(tmp_path.glob("*_digits-flow"))) == len(list(tmp_path.glob("*_digits-diffusion"))) == 1


def test_wrong_words_are_refused_before_anything_runs(tmp_path):
    for words, said in ((["--data", "imagenet"], "names a config"), (["--steps", "3"], "--data NAME")):
        found = plots(*words, "--logs", str(tmp_path)) if words[0] == "--data" else plots(*words)
        assert found.returncode == 2 and said in found.stderr
    assert not any(tmp_path.iterdir())
