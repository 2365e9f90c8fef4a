"""Whole trainings as members: each is what its run samples alone, one call measures them, and what does not fit."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.checkpoint import save_checkpoint
from ldm.commands.gather import Gather
from ldm.commands.line import run_command
from ldm.training.runs import RunDirectory
from ldm.training.whole_members import gather_runs
from tests.conftest import tiny_config, tiny_model

DIGITS = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}


def write_run(path, seed, **params):
    """A run directory as a training from scratch leaves it."""
    run = RunDirectory(path)
    run.checkpoints.mkdir(parents=True)
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4, "train": DIGITS}}
    config = {"model": tiny_config(**{"guidance_scale": 2.0, **params}), "data": data, "run": {"seed": seed}}
    run.write_config(OmegaConf.create(config), "project")
    save_checkpoint(
        {"state_dict": tiny_model(seed, **params).state_dict(), "global_step": 10 + seed}, run.checkpoints / "last.ckpt"
    )
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return [write_run(folder / f"2026-01-01T00-00-0{seed}_tiny", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "tiny_3"
    run_command("gather", ["--runs", *runs, "--out", str(out)])
    return out


def test_each_member_samples_what_its_run_does(runs, folder):
    ensemble = load_ensemble(folder, Sampling(steps=2), Branching(step=0), device="cpu")
    found = ensemble.member_latents([1, 7], [0, 1])[:, :, 0]
    for own, run in zip(found, runs, strict=True):
        alone = load_model(run, Sampling(steps=2), device="cpu").sample_latents([1, 7], [0, 1])
        torch.testing.assert_close(own, alone, rtol=1e-3, atol=1e-4)
    records = ensemble.ensemble.spec["members"]
    assert [(one["seed"], one["step"]) for one in records] == [(0, 10), (1, 11), (2, 12)]


def test_one_call_measures_them(folder):
    ensemble = load_ensemble(folder, Sampling(steps=2), Branching(step=1), device="cpu")
    information = ensemble.information(classes=[1, 7], n=2)
    assert information.mi.shape == (2, 2) and bool((information.mi > 0).all())
    assert bool((information.mi <= torch.tensor(3.0).log() + 1e-6).all())
    assert ensemble.classes.name(7) == "7"


def test_runs_that_are_no_ensemble_are_refused(runs, folder, tmp_path):
    wider = write_run(tmp_path / "2026-01-01T00-00-08_wider", 1, guidance_scale=3.0)
    member = RunDirectory(tmp_path / "2026-01-01T00-00-09_member")
    member.checkpoints.mkdir(parents=True)
    member.write_config(OmegaConf.create({"model": tiny_config()}), "project")
    save_checkpoint({"state_dict": {}, "component": {}, "global_step": 1}, member.checkpoints / "last.ckpt")
    other = write_run(tmp_path / "2026-01-01T00-00-07_scaled", 1, scale_by_std=True)
    scaled = write_run(tmp_path / "2026-01-01T00-00-06_scaled", 2, scale_by_std=True)
    content = torch.load(f"{scaled}/checkpoints/last.ckpt", weights_only=True)
    content["state_dict"]["scale_factor"] = torch.tensor(0.5)
    save_checkpoint(content, f"{scaled}/checkpoints/last.ckpt", overwrite=True)
    for paths, reason in (
        ([runs[0], wider], r"differ in model\.params\.guidance_scale"),
        ([runs[0], runs[0]], "comes twice"),
        (runs[:1], "at least two"),
        ([runs[0], member.path], "trained heads on a base model"),
        ([other, scaled], "has another scale_factor"),
    ):
        with pytest.raises(ValueError, match=reason):
            gather_runs(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="--overwrite"):
        gather_runs(runs, folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"runs": ("a", "b")}, "needs --out"),
        ({"runs": ("a", "b"), "path": "logs"}, "give one of --path"),
        ({"path": "logs", "out": "x"}, "--out acts only with"),
    ],
)
def test_options_that_do_not_go_together(options, reason):
    with pytest.raises(ValueError, match=reason):
        Gather(**options)
