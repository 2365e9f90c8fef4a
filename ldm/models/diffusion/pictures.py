"""Pictures as conditions: read from a batch, embedded, and joined by a mask, as a network's first layer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion import stages
from ldm.models.diffusion.training import read_images
from ldm.modules.conditioned import ConditionEmbedder, DiffusionWrapper


@dataclass(frozen=True)
class PictureCondition:
    """How the picture of a batch becomes what is joined to the noisy state along channels.

    Args:
        key: entry of a batch with the picture [B, H, W, C].
        mask_key: entry with its mask [B, H, W] or [B, H, W, 1], which a network may have one more channel for.
        channels: how many channels C' the network has for a condition.
        embedder: what encodes pictures; None: nothing does.
    """

    key: str
    mask_key: str
    channels: int
    embedder: nn.Module | None = None

    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the embedded picture [B, C', h, w] of a batch, its mask last where there is a channel for it.

        Raises:
            ValueError: if the batch lacks one of them.
        """
        if self.key not in batch:
            raise ValueError(f"the batch has no picture '{self.key}' to condition on; its keys are {sorted(batch)}")
        pictures = read_images(batch[self.key])
        mask = read_images(batch[self.mask_key]) if self.mask_key in batch else None
        return self.embed(pictures, mask)

    def embed(self, pictures: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the embedded pictures [B, C', h, w] of pictures [B, C, H, W] and masks [B, 1, H, W], -1 or 1.

        A mask is resized to nearest neighbours and follows the picture (latent-diffusion, `scripts/inpaint.py`).

        Raises:
            ValueError: if they do not make as many channels as the network has for them.
        """
        embedded = encode_pictures(self.embedder, pictures)
        if embedded.shape[1] + 1 == self.channels and mask is not None:
            small = F.interpolate(mask.to(embedded), size=embedded.shape[-2:])
            embedded = torch.cat([embedded, small], dim=1)
        if embedded.shape[1] != self.channels:
            lacks = f"; give its mask as '{self.mask_key}'" if embedded.shape[1] + 1 == self.channels else ""
            raise ValueError(
                f"the network has {self.channels} channels for a condition, and '{self.key}' embedded has "
                f"{embedded.shape[1]}{lacks}"
            )
        return embedded


def encode_pictures(embedder: nn.Module | None, pictures: Tensor) -> Tensor:
    """Embed pictures [B, C, H, W] by what encodes them: a first stage (the mode of its posterior), or any module."""
    if embedder is None:
        return pictures
    encode = getattr(embedder, "encode", embedder)
    found = encode(pictures)
    return found if isinstance(found, Tensor) else found.mode()


class PictureModel(stages.HasStages, Protocol):
    """A model whose conditions may be pictures."""

    first_stage_model: Any
    cond_stage_model: nn.Module | None
    model: DiffusionWrapper
    channels: int
    cond_stage_key: str
    picture_key: str | None
    mask_key: str

    @property
    def embedder(self) -> ConditionEmbedder:
        """What embeds labels and texts."""


def picture_condition(model: PictureModel) -> PictureCondition:
    """Return how pictures become what is joined to a model's state.

    Raises:
        ValueError: if it takes no pictures.
    """
    key = model.model.conditioning_key
    if key not in ("concat", "hybrid"):
        raise ValueError(f"conditioning_key '{key}' takes no pictures: concat or hybrid does")
    hybrid = key == "hybrid"
    if hybrid and model.picture_key is None:
        raise ValueError("conditioning_key hybrid needs picture_key, the entry of a batch that holds the picture")
    channels = model.model.diffusion_model.in_channels - model.channels
    embedder = model.first_stage_model if hybrid else model.cond_stage_model
    return PictureCondition(model.picture_key or model.cond_stage_key, model.mask_key, channels, embedder)


def joins_alone(model: PictureModel) -> bool:
    """Whether a model's condition is a picture and nothing else."""
    return model.model.conditioning_key == "concat"


def embed_read(model: PictureModel, labels: Tensor | None, batch: Mapping[str, Any]) -> Any:
    """Embed what was read of a batch as `apply_model` takes it; None of an unconditional model.

    Args:
        labels: labels [B], token ids [B, L], or of a model of pictures alone these, embedded.
        batch: which a hybrid model's picture is read from.
    """
    key = model.model.conditioning_key
    if labels is None or key in ("adm", "concat"):
        return labels
    context = model.embedder.embed(labels)
    if key != "hybrid":
        return context
    return {"c_concat": [picture_condition(model).read(batch)], "c_crossattn": [context]}


def read_batch_conditions(model: PictureModel, batch: Mapping[str, Any]) -> Tensor | None:
    """Read the labels [B], the token ids [B, L] of texts, or the embedded pictures [B, C', h, w] of a batch."""
    return picture_condition(model).read(batch) if joins_alone(model) else stages.read_conditions(model, batch)


def read_kept_batch_conditions(model: PictureModel, batch: Mapping[str, Any], uniform: Tensor) -> Tensor | None:
    """Read the conditions of a batch after label dropout, which `uniform` [B] decides; pictures are never dropped."""
    if joins_alone(model):
        return picture_condition(model).read(batch)
    return stages.read_kept_conditions(model, batch, uniform)


def embed_given_conditions(model: PictureModel, c: Any) -> Any:
    """Embed a condition: labels [B], texts, pictures [B, C, H, W], or the mapping that holds them by their keys."""
    if not joins_alone(model):
        return stages.get_learned_conditioning(model, c)
    condition = picture_condition(model)
    return condition.read(c) if isinstance(c, Mapping) else encode_pictures(condition.embedder, c)
