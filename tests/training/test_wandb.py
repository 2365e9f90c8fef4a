"""When Weights & Biases is on, and what of a run it gets offline; no network."""

import importlib.util
import os

import pytest

from ldm.training.wandb import read_env, settings, wandb_logger, wanted
from tests.comparisons import hide
from tests.training.runs import only_run, run_training


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No settings but a test's own, and the environment as it was afterwards."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_the_file_is_read_and_the_environment_goes_first(tmp_path):
    file = tmp_path / ".env"
    file.write_text('# key\nexport WANDB_API_KEY="abc"\nWANDB_MODE = offline\nOTHER=1\nnothing\n')
    assert read_env(file) == {"WANDB_API_KEY": "abc", "WANDB_MODE": "offline"}
    assert settings({"WANDB_MODE": "online", "HOME": "x"}, file) == {"WANDB_API_KEY": "abc", "WANDB_MODE": "online"}
    assert read_env(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("chosen", "on"),
    [
        ({}, False),
        ({"WANDB_API_KEY": ""}, False),
        ({"WANDB_API_KEY": "abc"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_API_KEY": "abc", "WANDB_MODE": "disabled"}, False),
    ],
)
def test_it_is_off_without_a_key(chosen, on):
    assert wanted(chosen) is on


def test_without_a_key_a_run_has_tensorboard_alone(config, tmp_path):
    run_training(config, tmp_path)
    assert any((only_run(tmp_path) / "tensorboard").iterdir()) and not (only_run(tmp_path) / "wandb").exists()


def test_without_the_package_training_goes_on_and_says_so(monkeypatch, caplog, tmp_path):
    hide(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert wandb_logger(tmp_path, "decu", {}, "run") is None
    assert 'pip install "decu-uncertainty[wandb]"' in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason='needs wandb: pip install "decu-uncertainty[wandb]"'
)
def test_a_run_is_recorded_offline(monkeypatch, config, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_training(config, tmp_path, project="flows")
    (folder,) = (only_run(tmp_path) / "wandb").glob("offline-run-*")
    assert any(folder.glob("*.wandb"))
