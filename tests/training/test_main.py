"""A training as a user calls it: it runs, resumes exactly, and refuses what it does not know."""

import os
import re

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_checkpoint
from ldm.training.config import learning_rate, load_config, merge_configs, point_data
from ldm.training.processes import RUN_VARIABLE
from ldm.training.runs import find_run, new_run, runs_named
from ldm.training.trainer import (
    Devices,
    check_trainer_options,
    choose_devices,
    cluster_environment,
    parse_gpus,
    split_trainer_options,
)
from tests.conftest import tiny_model
from tests.training.runs import assert_same_end, end_state, losses, resume, run_command_line, run_training


def test_a_run_leaves_configs_logs_and_checkpoints(config, tmp_path, caplog):
    run = run_command_line(config, tmp_path, "model.params.monitor=val/loss", scale_lr=False, name="first")
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
    assert RUN_VARIABLE not in os.environ, "what this process starts later would take it for its own run"


@pytest.mark.parametrize(
    ("frequency", "early", "expected"),
    [(0, True, set()), (5, True, {1, 2, 4, 5}), (3, False, {3, 6})],
    ids=["off", "powers of two first", "regular"],
)
def test_pictures_at_the_steps_that_were_asked_for(config, tmp_path, frequency, early, expected):
    params = "lightning.callbacks.image_logger.params"
    given = {
        "disabled": False,
        "batch_frequency": frequency,
        "increase_log_steps": early,
        "log_images_kwargs.ddim_steps": 1,
    }
    changes = [f"{params}.{name}={value}" for name, value in given.items()]
    run = run_training(config, tmp_path, *changes, max_steps=6)
    assert {int(file.name.split("_gs-")[1][:6]) for file in run.glob("images/train/*.png")} == expected


def test_pictures_of_a_short_table_and_a_callback_of_ones_own(config, tmp_path):
    """Samples take no more steps than the table has entries; `image_logger.target` is what writes them."""
    params = "lightning.callbacks.image_logger.params"
    changes = ["model.params.timesteps=3", f"{params}.disabled=False", f"{params}.batch_frequency=1"]
    run = run_training(config, tmp_path, *changes, max_steps=1)
    assert len(list(run.glob("images/train/samples*.png"))) == 1
    content = OmegaConf.load(config)
    content.lightning.callbacks.image_logger = {"target": "tests.training.runs.Fail", "params": {"step": 0}}
    OmegaConf.save(content, config)
    with pytest.raises(RuntimeError, match="the disk burns"):
        run_training(config, tmp_path, name="own", max_steps=1)


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_resume_gives_the_uninterrupted_losses(config, tmp_path, whole, stop):
    """Same losses, weights and averages, dropout included; an epoch has five batches."""
    part = run_training(config, tmp_path, name="part", max_steps=stop)
    assert resume(part, max_steps=8) == part
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)


def test_labels_without_a_class_of_their_own_are_refused(config, tmp_path):
    """Ten digits and ten rows: the last digit would train the null class of guidance."""
    rows = "model.params.cond_stage_config.params.n_classes"
    for count, message in (
        (10, r"0\.\.8 and the null class.*n_classes: 11, or null_class: false"),
        (5, "n_classes: 11"),
    ):
        with pytest.raises(ValueError, match=f"labels up to 9.*{message}"):
            run_training(config, tmp_path, f"{rows}={count}")
    assert not (tmp_path / "logs").exists()
    changes = [f"{rows}=10", "model.params.cond_stage_config.params.null_class=False"]
    assert run_training(config, tmp_path, *changes, max_steps=1)


def test_accumulated_batches_draw_as_one_large_batch(config, tmp_path):
    """Two parts of four images see the times and noises of one batch of eight."""
    without = "model.params.unet_config.params.dropout=0"
    whole = run_training(config, tmp_path, without, name="whole", max_steps=1)
    half = "data.params.batch_size=4"
    parts = run_training(config, tmp_path, without, half, name="parts", max_steps=1, accumulate_grad_batches=2)
    ends = [end_state(run) for run in (whole, parts)]
    for name, value in ends[0].items():
        if value.is_floating_point():
            # One Adam step moves each weight by the rate, 8e-3 here, whatever the rounding of the gradient's sum.
            assert (value - ends[1][name]).abs().max() <= 2e-2
    close = [torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items()]
    assert sum(close) > 0.9 * len(close)


def test_learning_rate_scaling(config):
    settings = OmegaConf.load(config)
    assert learning_rate(settings, True, 3, 2) == pytest.approx(3 * 2 * 8 * 1e-3)
    assert learning_rate(settings, False, 3, 2) == 1e-3
    own = OmegaConf.merge(settings, {"model": {"learning_rate": 1e-3}})
    assert learning_rate(own, False, 3, 2) == 1e-3, "two rates that agree"
    with pytest.raises(ValueError, match=r"model\.learning_rate 0\.001, .* which would make 0\.048"):
        learning_rate(own, True, 3, 2)
    assert learning_rate(OmegaConf.merge(own, {"model": {"base_learning_rate": None}}), True, 3, 2) == 1e-3


def test_configs_merge_and_a_new_target_replaces_its_params():
    base = OmegaConf.create({"a": {"target": "x", "params": {"k": 1}}, "b": {"c": 1, "d": [1, 2]}})
    over = OmegaConf.create({"a": {"target": "y", "params": {"m": 2}}, "b": {"d": [3]}})
    assert merge_configs(base, over) == {"a": {"target": "y", "params": {"m": 2}}, "b": {"c": 1, "d": [3]}}
    same = OmegaConf.create({"a": {"target": "x", "params": {"m": 2}}})
    assert merge_configs(base, same).a.params == {"k": 1, "m": 2}
    with pytest.raises(ValueError, match="no config"):
        load_config(["missing.yaml"])
    with pytest.raises(ValueError, match="no section"):
        load_config([], ["model.target=x"], needs=("model", "data"))
    with pytest.raises(ValueError, match="no YAML"):
        load_config([], ["model.target=[x"])


def test_component_and_root_reach_the_data():
    config = OmegaConf.create(
        {"data": {"params": {"train": {"target": "t", "params": {"comp_numb": 0, "data_root": "a"}}}}}
    )
    params = point_data(config, 3, "b").data.params.train.params
    assert params == {"comp_numb": 3, "data_root": "a", "overwrite_root": "b"}
    assert point_data(config, None).data.params.train.params.comp_numb == 0


def test_gpus_and_trainer_options(monkeypatch):
    assert parse_gpus("0,") == [0]
    assert parse_gpus("0,2") == [0, 2]
    assert parse_gpus("2") == 2
    assert parse_gpus(None) == 0
    assert choose_devices(None, 2).count == 2
    two = Devices({"accelerator": "gpu", "devices": [1, 3]}, 2, "")
    for variable, place, device in (("LOCAL_RANK", "1", 3), ("SLURM_LOCALID", "1", 3), ("LOCAL_RANK", "0", 1)):
        with monkeypatch.context() as patch:
            patch.setenv(variable, place)
            assert two.own == torch.device("cuda", device), "each process has its own"
    assert two.own == torch.device("cuda", 1)
    for wrong in ("zero", "", " ", ","):
        with pytest.raises(ValueError, match="--gpus expects"):
            parse_gpus(wrong)
    assert split_trainer_options({"benchmark": True, "progress_bar_refresh_rate": 3}) == {"benchmark": True}
    with pytest.raises(ValueError, match="unknown trainer option"):
        split_trainer_options({"max_step": 3})
    with pytest.raises(ValueError, match="use bf16-mixed"):
        split_trainer_options({"precision": "bf16-true"})


def test_strategies_by_name():
    """Several processes train by DDP, whatever of its names is given; sharded weights are refused before any work."""
    for name in (None, "auto", "ddp"):
        assert choose_devices(None, 1, strategy=name).options["strategy"] == "auto"
        assert not choose_devices(None, 2, strategy=name).options["strategy"]._ddp_kwargs["find_unused_parameters"]
    several = choose_devices(None, 2, strategy="ddp_find_unused_parameters_true").options["strategy"]
    assert several._ddp_kwargs["find_unused_parameters"]
    for name in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_3"):
        with pytest.raises(ValueError, match=f"--strategy {name} keeps a part of each weight in each process"):
            choose_devices(None, 2, strategy=name)
    with pytest.raises(ValueError, match="takes a name of Lightning's"):
        choose_devices(None, 2, strategy=2)
    shared = choose_devices(None, 2, strategy="ddp_zero1")
    assert choose_devices(None, 1, strategy="ddp_zero1").options["strategy"] == "auto"
    assert shared.for_module(tiny_model()) is shared
    with pytest.raises(ValueError, match="not that of a LightningModule: use --strategy ddp"):
        shared.for_module(pl.LightningModule())


def test_processes_of_a_slurm_job(monkeypatch):
    """By srun all of them start or one, which starts the others; in a batch script one, whatever its job may start."""
    assert cluster_environment(2) == []
    for name, value in {"JOB_ID": "7", "NTASKS": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (environment,) = cluster_environment(2)
    assert not environment.creates_processes_externally
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    (environment,) = cluster_environment(2)
    assert environment.creates_processes_externally
    assert (environment.global_rank(), environment.world_size()) == (1, 2)
    with pytest.raises(ValueError, match="srun started 2 processes, but the options ask for 1"):
        cluster_environment(1)
    assert choose_devices(None, 1, nodes=2).count == 2
    cluster_environment(2, nodes=2)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ValueError, match="--num_nodes 2: nothing says where the other nodes are"):
        cluster_environment(2, nodes=2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    assert cluster_environment(2, nodes=2) == []


@pytest.mark.parametrize(("name", "value"), [("benchmark", "abc"), ("detect_anomaly", 5), ("deterministic", "no")])
def test_switches_of_the_trainer_are_switches(name, value):
    check_trainer_options({name: True})
    with pytest.raises(ValueError, match=rf"--{name} .* must be true or false"):
        check_trainer_options({name: value})


def test_a_way_of_clipping_needs_a_value_to_clip_at():
    check_trainer_options({"gradient_clip_algorithm": "value", "gradient_clip_val": 0.5})
    with pytest.raises(ValueError, match="acts only with --gradient_clip_val"):
        check_trainer_options({"gradient_clip_algorithm": "value"})


@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_a_least_number_beyond_the_most_is_refused(unit):
    check_trainer_options({f"min_{unit}": 3, f"max_{unit}": 3})
    check_trainer_options({f"min_{unit}": 3, f"max_{unit}": -1})
    with pytest.raises(ValueError, match=f"--min_{unit} 4 is more than --max_{unit} 3"):
        check_trainer_options({f"min_{unit}": 4, f"max_{unit}": 3})


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
