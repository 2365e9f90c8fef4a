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
GOLDEN_FOLDER = HERE / "goldens"
# Where prep_data.sh puts the data sets, unless told otherwise.
DATA_FOLDER = Path(os.environ.get("DECU_TEST_DATA", HERE.parent / "data"))
LDM_SMALL_SEED = 31


def golden_json(stem: str) -> dict:
    """Settings and facts of a golden; tests/goldens/README.md says what each set is."""
    return json.loads((GOLDEN_FOLDER / f"{stem}.json").read_text())


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    """Recorded tensors of a golden, by name; a large one has a second file."""
    found = load_file(GOLDEN_FOLDER / f"{name}.safetensors")
    for further in GOLDEN_FOLDER.glob(f"{name}_part2.safetensors"):
        found |= load_file(further)
    return found


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


def listed_weights(listing: dict) -> dict[str, torch.Tensor]:
    """Rebuild weights from a golden's list of names and shapes, and check them; see `weights_recipe` in its json."""
    generator = torch.Generator().manual_seed(listing["seed"])
    weights = {}
    for name, shape in listing["order"]:
        draw = torch.randn(shape, generator=generator)
        if name in listing["embedding_tables"]:
            weights[name] = draw
        elif len(shape) >= 2:
            weights[name] = draw / draw[0].numel() ** 0.5
        else:
            weights[name] = 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
    squares = sum(float(value.double().square().sum()) for value in weights.values())
    assert squares == pytest.approx(listing["check"]["sum_of_squares"], rel=1e-6)
    return weights


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-5):
    """Compare with a golden: the tolerance is a share of its maximum."""
    expected = expected.detach()
    bound = tolerance * float(expected.abs().max())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=bound)


def ldm_small_weights() -> dict[str, torch.Tensor]:
    """The state dict of the golden LatentDiffusion: what was trained or set is stored, the rest is redrawn."""
    spec = golden_json("ldm_small")
    parameters = [name for name in spec["state_dict_order"] if "." in name]
    redrawn = recipe_weights({**spec, "weight_seed": LDM_SMALL_SEED, "state_dict_order": parameters})
    return {**redrawn, **golden_tensors("ldm_small_weights")}


def tensor_sums(value: torch.Tensor) -> torch.Tensor:
    """What tells one tensor from another (5 float64): first and last value, sum, sum of squares, sum by position."""
    flat = value.double().flatten()
    position = torch.arange(len(flat), dtype=torch.float64) / len(flat)
    return torch.stack([flat[0], flat[-1], flat.sum(), flat.square().sum(), flat @ position])


def assert_published_weights(stem: str, weights: dict[str, torch.Tensor]):
    """Rebuilt weights are the ones that gave the golden's outputs, by the kept sums of every tensor."""
    order = golden_json(stem)["state_dict_order"]
    assert weights.keys() == set(order)
    found = torch.stack([tensor_sums(weights[name]) for name in order])
    torch.testing.assert_close(found, golden_tensors("weights_sums")[stem], rtol=1e-6, atol=1e-5)


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


def smallest_unet() -> dict:
    """The UNet of `tiny_config` with the fewest blocks: for tests that take hundreds of steps, or of derivatives.

    It attends at 4 x 4 alone, as the digits' own network does.
    """
    config = tiny_config()["params"]["unet_config"]
    fewest = {"channel_mult": [1, 1], "attention_resolutions": [2], "num_res_blocks": 0, "conv_resample": False}
    return {**config, "params": {**config["params"], **fewest}}


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
