"""The released models of texts and layouts: keys, shapes and sizes, and files of their keys, which load strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.pipelines import build_model
from ldm.training.config import load_config
from ldm.util import instantiate_from_config
from tests.conftest import golden_json

CONFIGS = Path(__file__).parent.parent.parent / "configs"
MODELS = {
    "keys_text2img_large": "latent-diffusion/txt2img-1p4B-eval.yaml",
    "keys_text2img256": "latent-diffusion/text2img256.yaml",
    "keys_layout2img": "latent-diffusion/layout2img-openimages256.yaml",
    "keys_sd_v1": "stable-diffusion/v1-inference.yaml",
}


def shapes_of(model) -> dict:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def released(stem: str) -> dict:
    """The listed keys and shapes, as the configs' file has them; averages and the shared first stage are not listed."""
    spec = golden_json(stem)
    return {name: tuple(shape) for name, shape in spec["keys"] if not name.endswith("position_ids")}


@pytest.mark.parametrize("stem", MODELS)
def test_configs_have_the_released_keys_and_sizes(stem):
    config = load_config([str(CONFIGS / MODELS[stem])])
    config.paths = dict.fromkeys(config.paths)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    expected, found = released(stem), shapes_of(model)
    assert {name: found[name] for name in expected} == expected
    other = {name for name in found if name not in expected and not name.startswith(("model_ema.", "first_stage"))}
    assert len(other) in (0, 12), "the 12 tables of the noise are not listed in every file"
    counts = golden_json(stem)["counts"]
    for part, name in ((model.model, "unet (model.diffusion_model)"), (model.cond_stage_model, "cond_stage_model")):
        assert sum(p.numel() for p in part.parameters()) == counts[name]
    assert model.reads_text


@pytest.mark.parametrize("stem", ["keys_text2img_large", "keys_sd_v1"])
def test_the_released_config_builds_the_same(stem):
    config = golden_json(stem)["config"]
    with torch.device("meta"):
        model = build_model({"model": config})
    assert released(stem).items() <= shapes_of(model).items()


@pytest.mark.parametrize("layout", ["published", "newer", "older"])
def test_a_file_of_stable_diffusions_keys_loads_strictly(tmp_path, layout):
    config = load_config([str(CONFIGS / MODELS["keys_sd_v1"])])
    params = config.model.params
    params.unet_config.params.update({"model_channels": 32, "num_heads": 2, "context_dim": 16, "channel_mult": [1, 1]})
    params.first_stage_config.params.ddconfig.update({"ch": 32, "ch_mult": [1, 1]})
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    params.cond_stage_config.params = {"params": {**small, "num_attention_heads": 2}}
    model = build_model(OmegaConf.to_container(OmegaConf.create({"model": config.model}), resolve=True))
    # Weights of the three parts are drawn; the noise table is the config's, with which a file's is compared.
    state = {name: torch.randn_like(value) if value.is_floating_point() and "." in name else value
             for name, value in model.state_dict().items()}  # fmt: skip
    prefix = "cond_stage_model.transformer.text_model."
    file = dict(state)
    if layout != "published":
        file = {name.replace(prefix, "cond_stage_model.transformer."): value for name, value in file.items()}
    if layout != "newer":
        start = prefix if layout == "published" else "cond_stage_model.transformer."
        file[f"{start}embeddings.position_ids"] = torch.arange(77)[None]
    save_checkpoint({"state_dict": file}, tmp_path / "model.ckpt")
    model.init_from_ckpt(str(tmp_path / "model.ckpt"))
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert model.cond_stage_model.has_weights
    del file[next(name for name in file if name.startswith("cond_stage_model") and "fc1" in name)]
    save_checkpoint({"state_dict": file}, tmp_path / "model.ckpt", overwrite=True)
    with pytest.raises(ValueError, match="1 missing, 0 unknown"):
        model.init_from_ckpt(str(tmp_path / "model.ckpt"))


def test_data_that_latent_diffusion_names_and_never_published_says_what_takes_its_place():
    data = {"target": "ldm.data.openimages.OpenImagesBBoxTrain", "params": {"size": 256}}
    with pytest.raises(ValueError, match="coordinates_bbox, 92 token ids"):
        instantiate_from_config(data)
