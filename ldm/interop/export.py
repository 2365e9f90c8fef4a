"""A model of ours as a folder that diffusers' classes read: networks, scheduler, and how its classes are given.

Writing needs no diffusers: configs are JSON, weights safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoint import save_tensors
from ldm.interop.converted import Converted, require
from ldm.interop.dit_keys import convert_dit
from ldm.interop.first_stage_keys import convert_first_stage
from ldm.interop.folder import CONDITIONING, INDEX, SCHEDULER, WEIGHTS
from ldm.interop.loading import CLASS_TABLE
from ldm.interop.readme import make_readme
from ldm.interop.schedulers import make_scheduler
from ldm.interop.text_parts import TextParts, convert_text
from ldm.interop.unet_keys import convert_unet
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.dit import DiT
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.util import DIFFUSERS_TARGETS, atomic_write, shorten_size

VERSION = "0.30.0"  # the oldest whose classes have all arguments that are written


def export_folder(model: LatentDiffusion, out: str | Path, overwrite: bool = False) -> Path:
    """Write a model as a folder of diffusers, and return it.

    Args:
        model: with the weights that are written.
        out: the folder.
        overwrite: replace files that are there.

    Raises:
        ValueError: for a network, first stage, condition or noise that diffusers has no class for, saying why; nothing
            is written then.
        FileExistsError: if files are there and `overwrite` is False.
    """
    out = Path(out)
    scheduler = make_scheduler(model)
    network = _convert_network(model)
    stage = _convert_stage(model)
    conditioning, table = _conditioning(model)
    text = convert_text(model, stage)
    parts: dict[str, Converted] = {"transformer" if "Transformer" in network.class_name else "unet": network}
    index = _index(model, network, stage, scheduler) if text is None else _text_index(text, network, stage, scheduler)
    if stage is not None:
        parts["vqvae" if "vqvae" in index else "vae"] = stage
    for name, part in parts.items():
        _write_json(out / name / "config.json", _config(part), overwrite)
        # A file holds no tensor twice, and blocks of DiT share their embeddings: each gets a copy.
        state = {key: value.detach().clone() for key, value in part.state.items()}
        save_tensors(state, out / name / f"{WEIGHTS}.safetensors", {"format": "pt"}, overwrite)
    _write_json(out / "scheduler" / SCHEDULER, {**scheduler, "_diffusers_version": VERSION}, overwrite)
    if index:
        _write_json(out / INDEX, index, overwrite)
    if conditioning:
        _write_json(out / CONDITIONING, conditioning, overwrite)
    if text is not None:
        _write_text_parts(out, text, overwrite)
    if table is not None:
        save_tensors(table, out / CLASS_TABLE / f"{WEIGHTS}.safetensors", {"format": "pt"}, overwrite)
    _write_text(out / "README.md", make_readme(parts, scheduler, index, conditioning), overwrite)
    return out


def _convert_network(model: LatentDiffusion) -> Converted:
    network = model.model.diffusion_model
    if isinstance(network, UNetModel):
        return convert_unet(network, model.image_size)
    if isinstance(network, DiT):
        return convert_dit(network)
    return _as_it_is(network, "network")


def _convert_stage(model: LatentDiffusion) -> Converted | None:
    stage = model.first_stage_model
    if isinstance(stage, IdentityFirstStage):
        return None
    if isinstance(stage, VQModel | AutoencoderKL):
        height, width = (side * stage.encoder.factor for side in model.latent_shape[1:])
        return convert_first_stage(stage, float(model.scale_factor), shorten_size((height, width)))
    return _as_it_is(stage, "first stage")


def _as_it_is(module: nn.Module, what: str) -> Converted:
    """Take a class of diffusers as it is.

    Raises:
        ValueError: for a class that is none of theirs.
    """
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    known = {ours: theirs.removeprefix("diffusers.") for theirs, ours in DIFFUSERS_TARGETS.items()}
    require(path in known, f"the {what} is a {type(module).__name__}; UNetModel, DiT, VQModel, AutoencoderKL are taken")
    config = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    return Converted(known[path], {**config, **getattr(module, "further_config", {})}, module.state_dict())


def _conditioning(model: LatentDiffusion) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What conditioning.json says of classes, and the table of embeddings that goes beside the networks, if any.

    Raises:
        ValueError: for a condition that is neither classes nor embedded text.
    """
    embedder = model.cond_stage_model
    key = model.model.conditioning_key
    if embedder is None:
        return {}, None
    require(key in ("adm", "crossattn"), f"conditioning_key '{key}' joins a picture to the states")
    if not isinstance(embedder, ClassEmbedder):
        return {}, None
    facts = {"rows": embedder.n_classes, "null_class": embedder.null_class}
    if key == "adm":
        return {"class_labels": True, **facts}, None
    require(not embedder.low_rank, "its class table has a low-rank correction: merge it into the table first")
    return {"class_embedding": True, **facts}, {"embedding.weight": embedder.embedding.weight}


def _index(
    model: LatentDiffusion, network: Converted, stage: Converted | None, scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """model_index.json of the pipeline of diffusers that samples such a model; empty where there is none."""
    parts: dict[str, Any] = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    if network.class_name == "DiTTransformer2DModel":
        if stage is None or stage.class_name != "AutoencoderKL":
            return {}
        name = "DiTPipeline"
        parts |= {"transformer": ["diffusers", network.class_name], "vae": ["diffusers", stage.class_name]}
    elif network.class_name == "UNet2DModel" and model.cond_stage_model is None:
        parts["unet"] = ["diffusers", network.class_name]
        if stage is None:
            name = "DDPMPipeline" if scheduler["_class_name"] == "DDPMScheduler" else "DDIMPipeline"
        else:
            name = "LDMPipeline"  # decodes by either class
            parts["vqvae"] = ["diffusers", stage.class_name]
    else:
        return {}
    return {"_class_name": name, "_diffusers_version": VERSION, **parts}


def _text_index(
    text: TextParts, network: Converted, stage: Converted | None, scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """model_index.json of a pipeline that reads texts.

    Raises:
        ValueError: for a network without a context.
    """
    require(network.class_name == "UNet2DConditionModel", f"{text.pipeline} takes UNet2DConditionModel")
    assert stage is not None
    return {
        "_class_name": text.pipeline,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", network.class_name],
        text.stage: ["diffusers", stage.class_name],
        **text.index,
    }


def _write_text_parts(out: Path, text: TextParts, overwrite: bool) -> None:
    """Write the text encoder as transformers' `save_pretrained` does, and its tokenizer's files."""
    encoder = text.encoder
    config = {"architectures": [encoder.class_name], "dtype": "float32", **encoder.config}
    _write_json(out / text.folder / "config.json", config, overwrite)
    state = {key: value.detach().float().clone() for key, value in encoder.state.items()}
    save_tensors(state, out / text.folder / "model.safetensors", {"format": "pt"}, overwrite)
    _write_json(out / "tokenizer" / "tokenizer_config.json", text.tokenizer_config, overwrite)
    for file in text.tokenizer_files:
        _write_text(out / "tokenizer" / file.name, file.read_text(encoding="utf-8"), overwrite)


def _config(part: Converted) -> dict[str, Any]:
    return {"_class_name": part.class_name, "_diffusers_version": VERSION, **part.config}


def _write_json(path: Path, value: Mapping[str, Any], overwrite: bool) -> None:
    _write_text(path, json.dumps(value, indent=2, default=list) + "\n", overwrite)


def _write_text(path: Path, text: str, overwrite: bool) -> None:
    with atomic_write(path, overwrite) as partial:
        partial.write_text(text, encoding="utf-8")
