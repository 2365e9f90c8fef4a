"""A config of a tiny model, for tests of trainings, and one run of it that nothing disturbs."""

import pytest
from omegaconf import OmegaConf

from tests.conftest import tiny_config
from tests.training.runs import run_training


def write_config(folder):
    """A config file: eight steps of eight digits, five batches an epoch, one validation batch after each."""
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 8, "num_workers": 0, "train": digits, "validation": digits},
    }
    lightning = {
        "trainer": {"max_steps": 8, "limit_train_batches": 5, "limit_val_batches": 1, "enable_progress_bar": False},
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
    }
    lightning["trainer"] |= {"log_every_n_steps": 1, "num_sanity_val_steps": 0}
    model = tiny_config(use_ema=True)
    model["params"]["unet_config"]["params"]["dropout"] = 0.1
    path = folder / "tiny.yaml"
    OmegaConf.save(OmegaConf.create({"model": model, "data": data, "lightning": lightning}), path)
    return path


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run directory of all eight steps, with a checkpoint kept every third step and the best by val/loss."""
    folder = tmp_path_factory.mktemp("whole")
    return run_training(write_config(folder), folder, "model.params.monitor=val/loss", every_n_steps=3)
