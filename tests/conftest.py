"""Fixtures shared by the tests: goldens, and one thread so that two workers do not fight for two cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.util import instantiate_from_config

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
    torch.set_num_threads(1)


def tiny_config(**params) -> dict:
    """A class-conditional LatentDiffusion of about 30,000 parameters on 1x8x8 images, ten classes and a null class."""
    unet = {
        "image_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 8,
        # A group of the 32-channel norms is one channel: without scale and shift the time embedding would cancel.
        "use_scale_shift_norm": True,
    }
    embedder = {"n_classes": 11, "embed_dim": 8, "key": "class_label"}
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "base_learning_rate": 1e-3,
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "image_size": 8,
            "channels": 1,
            "cond_stage_key": "class_label",
            "cond_stage_trainable": True,
            "conditioning_key": "crossattn",
            "use_ema": False,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": embedder},
            **params,
        },
    }


def tiny_model(seed: int = 0, **params):
    """The model of `tiny_config` with every parameter drawn anew, zero-initialised layers included."""
    model = instantiate_from_config(tiny_config(**params))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=source)
            if parameter.ndim > 1:
                parameter.copy_(draw if "embedding" in name else draw / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * draw + name.endswith("weight"))
    return model.eval()
