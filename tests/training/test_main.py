"""main.py as a user calls it: runs, resumes exactly, refuses what it does not know."""

import csv
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import main as trainer
from ldm.checkpoint import load_checkpoint
from ldm.training.config import load_config, merge_configs, point_data
from ldm.training.runs import find_run, new_run, runs_named
from ldm.training.trainer import parse_gpus, split_trainer_options
from tests.conftest import tiny_config


@pytest.fixture
def config(tmp_path):
    """A config file of a tiny model on 40 digits, eight steps of eight images."""
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 8,
            "num_workers": 0,
            "train": {"target": "ldm.data.digits.Digits", "params": {"split": "test"}},
            "validation": {"target": "ldm.data.digits.Digits", "params": {"split": "test"}},
        },
    }
    lightning = {
        "trainer": {"max_steps": 8, "limit_train_batches": 5, "limit_val_batches": 1, "enable_progress_bar": False}
    }
    lightning["callbacks"] = {"image_logger": {"params": {"disabled": True}}}
    lightning["trainer"] |= {"log_every_n_steps": 1, "num_sanity_val_steps": 0}
    path = tmp_path / "tiny.yaml"
    model = tiny_config(use_ema=True)
    model["params"]["unet_config"]["params"]["dropout"] = 0.1
    OmegaConf.save(OmegaConf.create({"model": model, "data": data, "lightning": lightning}), path)
    return path


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, from every CSV log of a run."""
    found = {}
    for file in sorted(run.glob("csv*/metrics.csv")):
        with open(file) as rows:
            found |= {
                int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")
            }
    return found


def run_main(config, tmp_path, *words):
    return trainer.main(["--base", str(config), "-t", "--gpus", "0,", "--logdir", str(tmp_path / "logs"), *words])


def test_a_run_leaves_configs_logs_and_checkpoints(config, tmp_path, caplog):
    run = run_main(config, tmp_path, "--scale_lr", "False", "--name", "first", "model.params.monitor=val/loss")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_first", run.name)
    assert sum("no CUDA device" in record.message for record in caplog.records) == (not torch.cuda.is_available())
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 8
    assert any(name.startswith("model_ema.") for name in content["state_dict"])
    assert int(content["state_dict"]["model_ema.num_updates"]) == 8
    assert sorted(losses(run)) == list(range(8))
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "finished.json").exists()
    saved = OmegaConf.load(next((run / "configs").glob("*-project.yaml")))
    assert saved.model.base_learning_rate == 1e-3
    assert saved.run.seed == 23


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_resume_gives_the_uninterrupted_losses(config, tmp_path, stop):
    """Same losses, weights and averages, dropout included; an epoch has five batches."""
    whole = run_main(config, tmp_path, "--name", "whole", "--seed", "5")
    part = run_main(config, tmp_path, "--name", "part", "--seed", "5", "--max_steps", str(stop))
    resumed = trainer.main(["--resume", str(part), "-t", "--gpus", "0,", "--max_steps", "8"])
    assert resumed == part
    assert losses(part) == losses(whole)
    ends = [load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole, part)]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_accumulated_batches_draw_as_one_large_batch(config, tmp_path):
    """Two parts of four images see the times and noises of one batch of eight."""
    whole = run_main(
        config, tmp_path, "--name", "whole", "--max_steps", "1", "model.params.unet_config.params.dropout=0"
    )
    parts = run_main(
        config, tmp_path, "--name", "parts", "--max_steps", "1", "--accumulate_grad_batches", "2",
        "data.params.batch_size=4", "model.params.unet_config.params.dropout=0",
    )  # fmt: skip
    ends = [load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole, parts)]
    for name, value in ends[0].items():
        if value.is_floating_point():
            # One Adam step moves each weight by the rate, 8e-3 here, whatever the rounding of the gradient's sum.
            assert (value - ends[1][name]).abs().max() <= 2e-2
    close = [torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items()]
    assert sum(close) > 0.9 * len(close)


def test_learning_rate_scaling(config, tmp_path):
    options, _, _ = trainer.parse(["--base", str(config), "--gpus", "0,"])
    settings = OmegaConf.load(config)
    assert trainer.learning_rate(settings, options, 2) == pytest.approx(2 * 8 * 1e-3)
    options.scale_lr = False
    assert trainer.learning_rate(settings, options, 2) == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "x.yaml", "--maxsteps", "3"], "unknown option '--maxsteps'"),
        (["--base", "x.yaml", "-t", "True", "word"], "unknown option 'word'"),
        (["--name", "a", "--resume", "b"], "cannot be given together"),
        ([], "give a config"),
    ],
)
def test_words_it_does_not_know_are_errors(words, message, capsys):
    with pytest.raises(SystemExit):
        trainer.parse(words)
    assert message in capsys.readouterr().err


def test_configs_merge_and_a_new_target_replaces_its_params():
    base = OmegaConf.create({"a": {"target": "x", "params": {"k": 1}}, "b": {"c": 1, "d": [1, 2]}})
    over = OmegaConf.create({"a": {"target": "y", "params": {"m": 2}}, "b": {"d": [3]}})
    assert merge_configs(base, over) == {"a": {"target": "y", "params": {"m": 2}}, "b": {"c": 1, "d": [3]}}
    same = OmegaConf.create({"a": {"target": "x", "params": {"m": 2}}})
    assert merge_configs(base, same).a.params == {"k": 1, "m": 2}
    with pytest.raises(ValueError, match="no config"):
        load_config(["missing.yaml"])


def test_component_and_root_reach_the_data():
    config = OmegaConf.create(
        {"data": {"params": {"train": {"target": "t", "params": {"comp_numb": 0, "data_root": "a"}}}}}
    )
    params = point_data(config, 3, "b").data.params.train.params
    assert params == {"comp_numb": 3, "data_root": "a", "overwrite_root": "b"}
    assert point_data(config, None).data.params.train.params.comp_numb == 0


def test_gpus_and_trainer_options():
    assert parse_gpus("0,") == [0]
    assert parse_gpus("0,2") == [0, 2]
    assert parse_gpus("2") == 2
    assert parse_gpus(None) == 0
    with pytest.raises(ValueError, match="--gpus expects"):
        parse_gpus("zero")
    assert split_trainer_options({"benchmark": True, "progress_bar_refresh_rate": 3}) == {"benchmark": True}
    with pytest.raises(ValueError, match="unknown trainer options"):
        split_trainer_options({"max_step": 3})


def test_run_directories(tmp_path):
    runs = [
        new_run(tmp_path, "a_boot0"),
        new_run(tmp_path, "a_boot0"),
        new_run(tmp_path, "a_boot12"),
        new_run(tmp_path, "b"),
    ]
    assert len({run.path for run in runs}) == 4
    assert runs_named(tmp_path, "boot[0-9]+") == sorted(runs[:3], key=lambda run: run.path)
    with pytest.raises(ValueError, match="no checkpoints/last"):
        find_run(runs[0].path)
    with pytest.raises(ValueError, match="found neither"):
        find_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no directory"):
        runs_named(tmp_path / "nothing", "x")
