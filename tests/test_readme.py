"""The Python of README.md and of docs/python.md runs as it stands, and gives what the command gives."""

import csv
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import ldm
from ldm.checkpoint import load_checkpoint, save_checkpoint, sha256
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.data.digits import Digits
from ldm.laplace.storage import save_laplace
from ldm.pipelines import new_posterior, observations
from ldm.settings import Branching, Sampling
from tests.conftest import smallest_unet, tiny_config, tiny_model
from tests.ensembles import write_ensemble

ROOT = Path(__file__).parent.parent
ENSEMBLE = "logs/bootstrapped_digits_5"
UNET = {"unet_config": smallest_unet()}
DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}


def read_block(page):
    """Return the only block of Python in a page."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return block


def run_block(block):
    """Run a block, and return the names that it defines."""
    names = {}
    exec(compile(block, "block", "exec"), names)
    return names


def write_members(folder, averaged=False):
    """Write a tiny ensemble; averaged: its base checkpoint holds weights, and averages that lie far from them."""
    folder.mkdir(parents=True)
    if not averaged:
        write_ensemble(folder, members=5, params=UNET)
        return
    write_ensemble(folder, members=5, params={**UNET, "use_ema": True})
    content = load_checkpoint(folder / "trunk.ckpt")
    state = content["state_dict"]
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        # The name of an average: without the first word, and without dots.
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = 0.8 * state[name]
    save_checkpoint(content, folder / "trunk.ckpt", overwrite=True)
    spec = OmegaConf.load(folder / "ensemble.yaml")
    spec.trunk.sha256 = sha256(folder / "trunk.ckpt")
    OmegaConf.save(spec, folder / "ensemble.yaml")


def read_means(folder):
    """Return the mutual information of each class that the command wrote, nats."""
    with open(folder / "uncertainty.csv", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return torch.tensor([float(row["mi_mean"]) for row in rows], dtype=torch.float64)


def measure(path, out):
    """Run the command as the README's example measures; return the means of classes 3 and 8."""
    where = EnsembleSource(str(path))
    values = {"branching": Branching(at=0.0), "sampling": Sampling(steps=50), "place": Placement("cpu")}
    UncertaintyClasses(where, classes=(3, 8), n=16, out=str(out), **values).run()
    return read_means(out)


@pytest.mark.parametrize("averaged", [False, True])
def test_example_of_readme_gives_what_the_command_gives(tmp_path, monkeypatch, capsys, averaged):
    block = read_block("README.md")
    assert len(block.strip().splitlines()) <= 6
    write_members(tmp_path / ENSEMBLE, averaged)
    monkeypatch.chdir(tmp_path)
    info = run_block(block)["info"]
    assert "Interval(" in capsys.readouterr().out
    expected = measure(ENSEMBLE, tmp_path / "out")
    assert (expected > 0).all()
    torch.testing.assert_close(info.mean, expected, rtol=1e-6, atol=0)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = run_block(block.replace(ENSEMBLE, str(tmp_path / ENSEMBLE)))["info"]
    assert torch.equal(again.mi, info.mi)


def test_averages_of_the_base_checkpoint_are_what_differs(tmp_path):
    write_members(tmp_path / "averaged", averaged=True)
    pipeline = ldm.load_ensemble(tmp_path / "averaged", Sampling(steps=5), device="cpu")
    state = load_checkpoint(tmp_path / "averaged" / "trunk.ckpt")["state_dict"]
    own = pipeline.model.state_dict()["model.diffusion_model.out.2.weight"]
    assert torch.equal(own, state["model_ema.diffusion_modelout2weight"])
    assert (own - state["model.diffusion_model.out.2.weight"]).abs().max() > 0.01


def write_run(path):
    """Write the run directory of a training of a tiny model on digits."""
    (path / "configs").mkdir(parents=True)
    save_checkpoint({"state_dict": tiny_model(**UNET).state_dict()}, path / "checkpoints" / "last.ckpt")
    config = {"model": tiny_config(**UNET), "data": {"params": {"batch_size": 8, "train": DIGITS}}}
    OmegaConf.save(OmegaConf.create(config), path / "configs" / "2026-01-01T00-00-00-project.yaml")


def write_posterior(run, folder):
    """Fit a posterior of a run's last layer to sixteen digits, and write it."""
    model = ldm.load_model(run)
    rows = observations(model.model, Digits(split="train"), range(16))
    save_laplace(new_posterior(model, curvature="full").fit(rows, data_size=16), folder)


def test_block_of_the_door_runs_as_it_stands(tmp_path, monkeypatch):
    write_members(tmp_path / ENSEMBLE)
    run = tmp_path / "logs/2026-01-01T00-00-00_digits"
    write_run(run)
    write_posterior(run, tmp_path / "results/laplace/digits")
    monkeypatch.chdir(tmp_path)
    names = run_block(read_block("docs/python.md"))
    assert names["info"].mi.shape == (2, 16)
    assert names["pictures"].shape == (5, 8, 1, 8, 8)
    assert names["maps"].maps["image"].shape == (1, 4, 8, 8)
    assert names["posterior"].pipeline is names["model"]
    last = list(names["posterior"].steps("path", [3], [0]))[-1]
    assert last.var.shape == (1, 1, 8, 8) and (last.var > 0).all()
