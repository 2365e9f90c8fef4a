"""Fixtures shared by the tests: goldens, and one thread so that two workers do not fight for two cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
GOLDEN_FOLDERS = (HERE / "goldens", HERE.parent.parent / "shared" / "goldens")
DATA_FOLDER = Path(os.environ.get("DECU_TEST_DATA", HERE.parent.parent / "shared" / "data"))


def golden_file(name: str) -> Path:
    """Path of a golden, from the repository's copy or the full set; skips the test where neither has it."""
    for folder in GOLDEN_FOLDERS:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"golden {name} is not on this machine")


def golden_json(stem: str) -> dict:
    return json.loads(golden_file(f"{stem}.json").read_text())


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(golden_file(f"{name}.safetensors"))


def data_folder(name: str) -> Path:
    """A folder of real data; skips the test where it is absent."""
    if not (DATA_FOLDER / name).exists():
        pytest.skip(f"data set {name} is not on this machine (set DECU_TEST_DATA)")
    return DATA_FOLDER / name


def recipe_weights(spec: dict) -> dict[str, torch.Tensor]:
    """Rebuild a golden network's weights from its seed: see `init_recipe` in the golden's json."""
    generator = torch.Generator().manual_seed(spec["weight_seed"])
    weights = {}
    for name in spec["state_dict_order"]:
        shape = spec["weights"]["tensors"][name]["shape"]
        draw = torch.randn(shape, generator=generator)
        if name.endswith(("embedding.weight", "label_emb.weight")):
            weights[name] = draw
        elif len(shape) >= 2:
            weights[name] = draw / draw[0].numel() ** 0.5
        elif name.endswith(".weight"):
            weights[name] = 1 + 0.1 * draw
        else:
            weights[name] = 0.1 * draw
    return weights


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
