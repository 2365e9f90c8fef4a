"""The network as a function of (x, t, condition), in three stages, so that members of an ensemble share what they can.

condition(t, cond) -> state         per-member heads at the input: class embedding, time embedding
backbone(x, *state)   -> features      frozen
readout(features)  -> output        per-member heads at the output
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ldm.modules.parts import Parts, find_parts
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")
UNET = "model.diffusion_model."
EMBEDDER = "cond_stage_model."
# How a network's own names begin: UNetModel, DDAE's UNets, DiT, U-ViT, DDPM's UNet.
FIRST_LAYERS = ("input_blocks.", "image_proj.", "x_embedder.", "patch_embed.", "temb.")
# The first layer of the networks that DDAE trains.
DDAE_FIRST = "image_proj.weight"


def is_bare(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a network's own, as guided-diffusion and DiT publish them, without names around it."""
    return any(name.startswith(FIRST_LAYERS) for name in state)


def network_alone(content: Mapping[str, Any], averaged: bool) -> dict[str, Tensor] | None:
    """A network's own state dict out of a published file that holds nothing else of a model; None for other files.

    guided-diffusion and DiT publish it as it is. DDAE's training writes {MODEL, EMA, opt}: `MODEL` is the model as it
    trains, `EMA` holds its averages below `ema_model.` (ema-pytorch); `averaged` takes these. In both the network lies
    below a name of its own, and tables of the process beside it.

    Raises:
        ValueError: if a file laid out as DDAE's holds no network of its kind, with the names that it does hold.
    """
    if "MODEL" not in content:
        state = content.get("state_dict", content)
        return dict(state) if is_bare(state) else None
    part = "EMA" if averaged and "EMA" in content else "MODEL"
    start = "ema_model." if part == "EMA" else ""
    first = next((name for name in content[part] if name.startswith(start) and name.endswith(DDAE_FIRST)), None)
    if first is None:
        raise ValueError(
            f"{part} of this file holds no '{start}..{DDAE_FIRST}', the first layer of DDAE's networks; it holds "
            f"{len(content[part])} entries, among them: {', '.join(map(str, list(content[part])[:8]))}"
        )
    prefix = first.removesuffix(DDAE_FIRST)
    return {name.removeprefix(prefix): value for name, value in content[part].items() if name.startswith(prefix)}


class DiffusionWrapper(nn.Module):
    """Hands a condition to the UNet the way `conditioning_key` says (latent-diffusion, `ddpm.py`)."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None = None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key must be one of {CONDITIONING_KEYS}, got '{conditioning_key}'")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: list[Tensor] | None = None, c_crossattn: list[Tensor] | None = None
    ) -> Tensor:
        key = self.conditioning_key
        if key in ("concat", "hybrid"):
            x = torch.cat([x, *(c_concat or [])], dim=1)
        if key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat(c_crossattn or [], 1))
        if key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0] if c_crossattn else None)
        return self.diffusion_model(x, t)


class ConditionEmbedder(Protocol):
    """What is asked of the module that embeds conditions."""

    def __call__(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Embed batch[key]."""

    def embed(self, labels: Tensor | None) -> Tensor:
        """Embed labels [B] to a context [B, L, D]."""

    def drop_labels(self, labels: Tensor | None, uniform: Tensor) -> Tensor | None:
        """Replace labels [B] by the null class where `uniform` [B] says so."""


def find_model_parts(model: DiffusionWrapper, embedder: nn.Module | None) -> Parts:
    """Return the parts of a UNet and the tables of an embedder, under the names that they have in LatentDiffusion.

    A UNet without a stage `condition` has none with its embedder either. The embedder's tables count where the UNet
    reads what is embedded: where labels go to the UNet itself (adm), its own table does.
    """
    parts = find_parts(model.diffusion_model).below(UNET)
    if embedder is None:
        return parts
    condition = (f"{EMBEDDER}*", *parts.condition) if parts.condition else ()
    tables = dict(parts.class_tables)
    if model.conditioning_key in ("crossattn", "hybrid"):
        tables |= find_parts(embedder).below(EMBEDDER).class_tables
    return replace(parts, class_tables=tables, condition=condition)


class ConditionedNetwork(nn.Module):
    """UNet and condition embedder under the names they have in LatentDiffusion, as one network of raw conditions.

    `network(x, t, cond)`: x [B, C, H, W], t [B], cond class labels [B] (or what the embedder takes), or None; where it
    `shares_x` also r B labels, label j for image j mod B. Keys equal the base model's, so a posterior's overrides apply
    through `torch.func.functional_call` as they are.
    """

    def __init__(self, model: DiffusionWrapper, cond_stage_model: nn.Module | None = None):
        super().__init__()
        if model.conditioning_key in ("concat", "hybrid"):
            raise ValueError(
                f"conditioning_key '{model.conditioning_key}' joins the condition to the input; class-conditional and "
                "unconditional models are supported here: crossattn, adm or none"
            )
        self.model = model
        self.cond_stage_model = cond_stage_model
        self.shares_x = getattr(model.diffusion_model, "shares_x", False)

    @property
    def parts(self) -> Parts:
        """Parts of the UNet and tables of the embedder, see `find_model_parts`."""
        return find_model_parts(self.model, self.cond_stage_model)

    @property
    def in_stages(self) -> bool:
        """Whether `condition`, `backbone` and `readout` each act on parameters of their own."""
        return bool(self.parts.condition)

    def condition(self, t: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Time (and label) embedding [B, E] and context [B, L, D] or None."""
        key = self.model.conditioning_key
        embedding = self.model.diffusion_model.condition(t, cond if key == "adm" else None)
        context = None
        if key == "crossattn":
            embedder = cast("ConditionEmbedder | None", self.cond_stage_model)
            context = cond if embedder is None else embedder.embed(cond)
        return embedding, context

    def backbone(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """Features [B, F, H, W], the input of the output block."""
        return self.model.diffusion_model.features(x, embedding, context)

    def readout(self, features: Tensor) -> Tensor:
        """Output [B, C', H, W]."""
        return self.model.diffusion_model.readout(features)

    def forward(self, *args: Any, stage: str = "whole") -> Any:
        """`network(x, t, cond)`, or one stage by name with its own arguments (for `functional_call`)."""
        if stage != "whole":
            return getattr(self, stage)(*args)
        x, t, cond = args
        return self.readout(self.backbone(x, *self.condition(t, cond)))
