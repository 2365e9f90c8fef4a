"""A folder of diffusers as a config and weights of `LatentDiffusion`, so that all that takes a model takes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint import load_into, load_state_dict
from ldm.files import read_mapping
from ldm.interop.folder import WEIGHTS, ModelFolder
from ldm.interop.schedulers import read_scheduler
from ldm.interop.text_parts import load_bert, read_bert_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.conditioned import UNET
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.util import read_image_size, shorten_size

log = logging.getLogger(__name__)

CLASS_TABLE = "class_embedding"
# Guidance that the pipelines take where nothing is said.
GUIDANCE = {
    "StableDiffusionPipeline": 7.5,
    "DiTPipeline": 4.0,
    "StableDiffusion3Pipeline": 7.0,
    "FluxPipeline": 1.0,
    "PixArtAlphaPipeline": 4.5,
    "PixArtSigmaPipeline": 4.5,
}
FLOW_TIME = {"FluxTransformer2DModel": 1.0}
READ_CONTEXTS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")
TEXT_LENGTH = 77
PIXART_LENGTH = 120


class EmbeddedContext(nn.Module):
    """The condition of a network that takes embedded text: contexts [B, L, D] as they are.

    Args:
        max_length: tokens L of a text.
        key: entry of a batch that holds contexts.
        folder: of diffusers, whose text encoders embed prompts; None: the caller does.
    """

    def __init__(self, max_length: int = TEXT_LENGTH, key: str = "context", folder: str | None = None):
        super().__init__()
        self.max_length = max_length
        self.key = key
        self.folder = folder

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Contexts `[B, L, D]` of a batch."""
        return batch[self.key if key is None else key]

    def embed(self, context: Tensor) -> Tensor:
        """The context as it is."""
        return context


def make_config(folder: ModelFolder) -> dict[str, Any]:
    """Make the config of a folder's model; its section `diffusers` holds what the scheduler says of sampling.

    Raises:
        ValueError: for a network whose conditions or noise are not taken here, saying which.
    """
    network, config = folder.network, folder.network.config
    facts = read_scheduler(folder.scheduler, FLOW_TIME.get(network.class_name, 1000.0))
    channels = int(config["in_channels"]) // (4 if network.class_name == "FluxTransformer2DModel" else 1)
    _check_channels(folder, channels)
    params: dict[str, Any] = {
        **facts.params,
        "unet_config": network.target,
        "image_size": _size(folder),
        "channels": channels,
        "use_ema": False,
        "first_stage_key": "image",
        "guidance_scale": GUIDANCE.get(folder.pipeline, 1.0),
        **_first_stage(folder),
        **_condition(folder),
    }
    out = int(config.get("out_channels") or config["in_channels"])
    if out == 2 * channels:
        params["learned_variance"] = "hybrid"
    if folder.first_stage is not None and params.get("clip_denoised"):
        log.warning("clip_sample of the scheduler is not taken over: this model diffuses latents, which have no bounds")
        params["clip_denoised"] = False
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    rows = _class_rows(folder)
    named = rows is not None and len(folder.class_names) in (rows - 1, rows)
    names = {"class_names": list(folder.class_names)} if named else {}
    return {"model": model, "diffusers": {"scheduler": dict(folder.scheduler), **facts.sampling, **names}}


def load_folder_weights(model: LatentDiffusion, folder: ModelFolder) -> None:
    """Copy a folder's weights into the model of its config, strictly.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape.
    """
    load_into(model, read_state(folder), _absent(model), folder.root)
    if isinstance(model.cond_stage_model, BERTEmbedder):
        load_bert(model.cond_stage_model, folder.root / "bert")


def read_state(folder: ModelFolder) -> dict[str, Tensor]:
    """Return a folder's weights under the names that they have in the model of its config."""
    state = {f"{UNET}{name}": value for name, value in folder.network.read_weights().items()}
    if folder.first_stage is not None:
        stage = folder.first_stage.read_weights()
        state |= {f"first_stage_model.{name}": value for name, value in stage.items()}
    table = folder.root / CLASS_TABLE / f"{WEIGHTS}.safetensors"
    if table.is_file():
        state |= {f"cond_stage_model.{name}": value for name, value in load_state_dict(table).items()}
    return state


def _absent(model: LatentDiffusion) -> list[str]:
    """Names of what comes otherwise: the schedule's tables, a text encoder, a table of classes that has no columns."""
    texts = ["cond_stage_model.transformer."] if hasattr(model.cond_stage_model, "tokenize") else []
    empty = [name for name, value in model.state_dict().items() if not value.numel()]
    return [*texts, *empty, *(name for name, _ in model.named_buffers() if "." not in name)]


def _size(folder: ModelFolder) -> int | tuple[int, int]:
    """Height and width of the states; Flux's config does not say them: those of an image of 1024 pixels."""
    given = folder.network.config.get("sample_size")
    if given is None:
        if folder.network.class_name != "FluxTransformer2DModel":
            raise ValueError(f"{folder.network.folder}/config.json has no sample_size: add the size of the states")
        return 128
    return shorten_size(read_image_size(given, f"{folder.network.folder}/config.json: sample_size"))


def _check_channels(folder: ModelFolder, channels: int) -> None:
    if folder.first_stage is None:
        return
    config = folder.first_stage.config
    latent = int(config.get("vq_embed_dim") or config.get("latent_channels", channels))
    if latent != channels:
        raise ValueError(
            f"the network takes {channels} channels and latents have {latent}: a picture is joined to them, as "
            "inpainting does, which is not taken from a folder of diffusers"
        )


def _first_stage(folder: ModelFolder) -> dict[str, Any]:
    stage = folder.first_stage
    if stage is None:
        return {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}
    moved = [name for name in ("latents_mean", "latents_std") if stage.config.get(name) is not None]
    if moved:
        raise ValueError(f"{stage.folder}: latents are scaled by one factor here, and this first stage has {moved}")
    # diffusers' own default of the argument.
    return {"first_stage_config": stage.target, "scale_factor": float(stage.config.get("scaling_factor", 0.18215))}


def _condition(folder: ModelFolder) -> dict[str, Any]:
    """The condition's part of the config: labels, a table of classes as contexts, embedded text, or none."""
    network = folder.network
    said = folder.conditioning
    rows = _class_rows(folder)
    if network.class_name in READ_CONTEXTS:
        if rows is not None and not said.get("class_embedding"):
            raise ValueError("a UNet with a table of classes and a context takes two conditions; give one of the two")
        if said.get("class_embedding"):
            return _classes(said["rows"], said["null_class"], "crossattn", int(network.config["cross_attention_dim"]))
        encoder = _clip_encoder(folder) or read_bert_config(folder.root)
        if encoder is not None:
            return {"cond_stage_config": encoder, "conditioning_key": "crossattn", "cond_stage_key": "txt"}
        params: dict[str, Any] = {"max_length": _context_length(folder)}
        if (folder.root / "text_encoder").is_dir():
            params["folder"] = str(folder.root)
        stage = {"target": "ldm.interop.loading.EmbeddedContext", "params": params}
        return {"cond_stage_config": stage, "conditioning_key": "crossattn", "cond_stage_key": "context"}
    if rows is None:
        return {"cond_stage_config": "__is_unconditional__"}
    null = said.get("null_class") if said else (rows - 1 if network.class_name == "DiTTransformer2DModel" else None)
    return _classes(rows, null, "adm", 0)


def _clip_encoder(folder: ModelFolder) -> dict[str, Any] | None:
    """The folder's own text encoder, where it is one CLIP whose last states are the context: Stable Diffusion's."""
    encoder, tokenizer = folder.root / "text_encoder", folder.root / "tokenizer"
    if folder.network.class_name != "UNet2DConditionModel" or not (encoder / "config.json").is_file():
        return None
    found = read_mapping(encoder / "config.json", "the config of a text encoder", "fetch the folder again")
    if found.get("architectures") != ["CLIPTextModel"] or not tokenizer.is_dir():
        return None
    length = int(found.get("max_position_embeddings", TEXT_LENGTH))
    params = {"version": str(encoder), "tokenizer": str(tokenizer), "max_length": length}
    return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": params}


def _class_rows(folder: ModelFolder) -> int | None:
    config = folder.network.config
    if folder.network.class_name == "DiTTransformer2DModel":
        return int(config.get("num_embeds_ada_norm", 1000)) + 1
    rows = config.get("num_class_embeds")
    return None if rows is None else int(rows)


def _classes(rows: int, null: int | None, key: str, width: int) -> dict[str, Any]:
    stage = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": rows, "embed_dim": width, "key": "class_label", "null_class": null is not None},
    }
    return {"cond_stage_config": stage, "conditioning_key": key, "cond_stage_key": "class_label"}


def _context_length(folder: ModelFolder) -> int:
    """Rows of a context: of its tokens, and of a pooled vector or a mask where the network takes one."""
    config = folder.network.config
    if folder.network.class_name == "PixArtTransformer2DModel":
        width = config.get("caption_channels") or config["cross_attention_dim"]
        return PIXART_LENGTH + math.ceil(PIXART_LENGTH / width)
    pooled = config.get("pooled_projection_dim")
    rows = math.ceil(pooled / config["joint_attention_dim"]) if pooled else 0
    return TEXT_LENGTH + rows
