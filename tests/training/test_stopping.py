"""Signals, SLURM, errors and NaN: what is saved, how the process ends, and that a resumed run loses nothing."""

import json
import shutil
import signal

import pytest
import torch

from ldm.checkpoint import load_checkpoint
from ldm.jobs import requeue_when_asked
from ldm.training.runs import RunDirectory, new_run
from ldm.training.slurm import Job
from tests.training.runs import (
    assert_same_end,
    disturbance,
    kept_names,
    losses,
    only_run,
    resume,
    run_command_line,
    run_training,
    validations,
)

QUIET = "lightning.callbacks.disturb=null"


@pytest.mark.parametrize(
    ("name", "step", "validation", "code"),
    [("SIGINT", 3, False, 130), ("SIGTERM", 5, False, 143), ("SIGTERM", 5, True, 143)],
    ids=["ctrl-c", "sigterm-at-epoch-end", "sigterm-in-validation"],
)
def test_signals_save_and_the_resumed_run_is_exact(config, tmp_path, whole, caplog, name, step, validation, code):
    """Training stops after the step that the signal falls into, also one that ends an epoch, or in a validation."""
    before = signal.getsignal(getattr(signal, name))
    changes = disturbance("SendSignal", name=name, step=step - (not validation), validation=validation)
    changes.append("model.params.monitor=val/loss")
    with pytest.raises(SystemExit) as ended:
        run_command_line(config, tmp_path, *changes, name="part", every_n_steps=3, every_n_epochs=1)
    assert ended.value.code == code
    assert signal.getsignal(getattr(signal, name)) == before
    part = only_run(tmp_path)
    assert f"{name}: saved" in caplog.text and f"goes on with --resume {part} -t" in caplog.text
    assert sorted(losses(part)) == list(range(step))
    assert load_checkpoint(part / "checkpoints" / "last.ckpt")["global_step"] == step
    assert resume(part, QUIET) == part
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)
    # What the stop cut off at the end of the epoch is done: its validation, and the checkpoints kept of it.
    assert validations(part) == validations(whole)
    assert kept_names(part) == kept_names(whole) | {"epoch=000000.ckpt"}
    assert not (part / "training.lock").exists()


@pytest.mark.parametrize("name", ["epoch=000000-step=00000003.ckpt", "best-epoch=000000-step=00000005.ckpt"])
def test_a_name_that_a_kill_cut_off_comes_back(config, tmp_path, whole, name):
    """Killed after last.ckpt was written and before it had its second name, which the file itself knows."""
    part = tmp_path / "logs" / whole.name
    shutil.copytree(whole, part)
    before = kept_names(part)
    kept = part / "checkpoints" / name
    shutil.copyfile(kept, part / "checkpoints" / "last.ckpt")
    kept.unlink()
    resume(part)
    assert kept_names(part) == before
    assert load_checkpoint(kept)["global_step"] == int(name.removesuffix(".ckpt")[-8:])


def test_the_validation_of_the_last_step_is_done_where_no_step_is_left(config, tmp_path, whole):
    changes = disturbance("SendSignal", name="SIGTERM", step=5, validation=True)
    with pytest.raises(SystemExit):
        run_command_line(config, tmp_path, *changes, name="part", max_steps=5, every_n_epochs=1)
    part = only_run(tmp_path)
    assert not validations(part)
    resume(part, QUIET)
    assert validations(part) == {step: value for step, value in validations(whole).items() if step < 5}
    assert kept_names(part) == {"epoch=000000.ckpt", "best-epoch=000000-step=00000005.ckpt"}


def test_sigusr2_saves_and_goes_on(config, tmp_path, caplog):
    run = run_command_line(config, tmp_path, *disturbance("SendSignal", name="SIGUSR2", step=2))
    assert "saved" in caplog.text and "at step 3" in caplog.text
    assert sorted(losses(run)) == list(range(8))


def test_an_error_saves_and_the_resumed_run_is_exact(config, tmp_path, whole):
    with pytest.raises(RuntimeError, match="the disk burns"):
        run_training(config, tmp_path, *disturbance("Fail", step=3), name="part")
    part = only_run(tmp_path)
    resume(part, QUIET)
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)


@pytest.mark.parametrize("every", [None, 1], ids=["in-the-loss", "in-the-weights"])
def test_nan_is_stopped_with_its_step_and_never_saved(config, tmp_path, every):
    """The gradient of step 5 (counted from 0) is NaN: step 6 has weights, and step 7 a loss, that are not finite."""
    with pytest.raises(SystemExit) as ended:
        changes = disturbance("SpoilGradient", step=5)
        run_command_line(config, tmp_path, *changes, every_n_epochs=1, every_n_steps=every)
    assert "not finite at step " + ("6" if every else "7") in ended.value.code
    kept = load_checkpoint(only_run(tmp_path) / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == 5
    assert all(bool(torch.isfinite(value).all()) for value in kept["state_dict"].values())


def test_failing_before_the_first_step_leaves_nothing(config, tmp_path, capsys):
    missing = ["model.params.pretrained_path=nowhere/trunk.ckpt"]
    bins = ["data.params.train.params.subset=nowhere/bins", "data.params.train.params.component=0"]
    for changes, options, message in (
        (missing, {"start_from_pretrained": True}, "no base checkpoint at nowhere"),
        (bins, {}, "nowhere/bins"),
        ([], {"max_steps": "x"}, "max_steps"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_training(config, tmp_path, *changes, **options)
    with pytest.raises(RuntimeError, match="disk burns"):
        run_training(config, tmp_path, *disturbance("Fail", step=0))
    assert not list((tmp_path / "logs").glob("*"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The variables of a SLURM job of one task, whose answer to SIGUSR1 is put back after the test.

    Its `scontrol` notes what it is asked to do, and keeps the checkpoint that it finds then.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncp {tmp_path}/logs/*/checkpoints/last.ckpt {tmp_path}/asked.ckpt\n'
    )
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    names = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = signal.getsignal(signal.SIGUSR1)
    yield monkeypatch
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
def test_a_requeued_job_returns_to_its_run_directory(config, tmp_path, slurm):
    """SIGUSR1 saves and requeues in mid-training; the next start of the same command goes on from there."""
    changes = disturbance("SendSignal", name="SIGUSR1", step=2)
    options = {"name": "job", "max_steps": 4}
    requeue_when_asked()
    run_training(config, tmp_path, *changes, **options)
    first = only_run(tmp_path)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert load_checkpoint(tmp_path / "asked.ckpt")["global_step"] == 3
    # As if the job had been killed at once: of what was trained afterwards nothing is there.
    (tmp_path / "asked.ckpt").replace(first / "checkpoints" / "last.ckpt")
    (first / "finished.json").unlink()
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    assert run_training(config, tmp_path, *changes, **options) == first
    slurm.setenv("SLURM_JOB_ID", "4712")
    other = run_training(config, tmp_path, *changes, **options)
    assert other != first, "another job has another directory"
    assert losses(first) == losses(other)
    assert_same_end(first, other)


def test_runs_of_a_job_are_told_apart(tmp_path):
    base, heads = (Job.from_environment([name], {"SLURM_JOB_ID": "1"}) for name in ("base", "heads"))
    runs = {name: new_run(tmp_path, name) for name in ("base", "heads", "again")}
    base.record(runs["base"])
    heads.record(runs["heads"])
    heads.record(runs["again"])
    (runs["heads"].path / "finished.json").write_text("{}")
    folders = sorted(tmp_path.iterdir())
    assert Job.from_environment(["base"], {}) is None
    assert base.requeued_run(folders) is None, "a first start has no run"
    restarted = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "2"}
    assert Job.from_environment(["base"], restarted).requeued_run(folders) == runs["base"]
    assert Job.from_environment(["heads"], restarted).requeued_run(folders) == runs["again"], (
        "the one that is not finished"
    )
    assert Job.from_environment(["base"], {**restarted, "SLURM_JOB_ID": "2"}).requeued_run(folders) is None
    assert base.joined_run(lambda: folders) == runs["base"]
    with pytest.raises(ValueError, match="no run directory within"):
        Job.from_environment(["base"], restarted).joined_run(lambda: folders, seconds=0.1)
    assert json.loads((runs["base"].path / "slurm.json").read_text())["command"] == ["base"]
    assert RunDirectory(folders[0]) in runs.values()


@pytest.mark.slow
def test_resuming_in_float64_is_exact(config, tmp_path):
    """Weights that were restored before the model is made float64 would lose what float32 does not hold."""
    whole = run_training(config, tmp_path / "whole", name="whole", precision="64-true")
    with pytest.raises(SystemExit):
        changes = disturbance("SendSignal", name="SIGTERM", step=2)
        run_command_line(config, tmp_path, *changes, name="part", precision="64-true")
    part = only_run(tmp_path)
    resume(part, QUIET)
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)


def test_a_training_stops_early_where_its_held_out_loss_stays(config, tmp_path):
    """At the rate 0 no validation is better than the first: it ends at the third, and the first is kept as the best."""
    stop = "lightning.callbacks.early_stopping.params"
    words = ["model.base_learning_rate=0.0", "model.params.monitor=val/loss", f"{stop}.monitor=val/loss"]
    words.append(f"{stop}.patience=2")
    run = RunDirectory(run_training(config, tmp_path, *words, val_check_interval=2, max_steps=40))
    assert len(set(validations(run.path).values())) == 1 and len(validations(run.path)) == 3
    assert json.loads(run.finished.read_text())["step"] == len(losses(run.path)) == 7
    assert [path.name for path in run.checkpoints.glob("best-*")] == ["best-epoch=000000-step=00000002.ckpt"]
