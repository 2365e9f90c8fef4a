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
from ldm.modules.choices import Choices, join_condition, split_condition
from ldm.modules.conditioned import JOINING, ConditionEmbedder, DiffusionWrapper


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
    choices: Choices | None

    @property
    def embedder(self) -> ConditionEmbedder:
        """What embeds labels and texts."""


def picture_condition(model: PictureModel) -> PictureCondition:
    """Return how pictures become what is joined to a model's state.

    Raises:
        ValueError: if it takes no pictures.
    """
    key = model.model.conditioning_key
    if key not in JOINING:
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


def embed_batch_condition(model: PictureModel, batch: Mapping[str, Any], uniform: Tensor) -> Any:
    """Embed the condition of a batch as `apply_model` takes it; None of an unconditional model.

    `uniform` [B] decides which labels and texts are dropped in training; pictures never are.
    """
    if joins_alone(model):
        return picture_condition(model).read(batch)
    labels = stages.read_kept_conditions(model, batch, uniform)
    key = model.model.conditioning_key
    if labels is None or key == "adm":
        return labels
    context = model.embedder.embed(labels)
    if key != "hybrid":
        return context
    return {"c_concat": [picture_condition(model).read(batch)], "c_crossattn": [context]}


def read_batch_conditions(model: PictureModel, batch: Mapping[str, Any]) -> Tensor | None:
    """Read the labels [B], the token ids [B, L] of texts, or the embedded pictures [B, C', h, w] of a batch.

    Of a hybrid model they are rows that hold ids or labels, and the picture, see `join_condition`.
    """
    if joins_alone(model):
        return picture_condition(model).read(batch)
    return _join_picture(model, stages.read_conditions(model, batch), batch)


def read_kept_batch_conditions(model: PictureModel, batch: Mapping[str, Any], uniform: Tensor) -> Tensor | None:
    """Read the conditions of a batch after label dropout, which `uniform` [B] decides; pictures are never dropped."""
    if joins_alone(model):
        return picture_condition(model).read(batch)
    return _join_picture(model, stages.read_kept_conditions(model, batch, uniform), batch)


def _join_picture(model: PictureModel, labels: Tensor | None, batch: Mapping[str, Any]) -> Tensor | None:
    """Join the picture of a batch to the labels or ids of a hybrid model; those of others come back as they are."""
    if labels is None or model.model.conditioning_key != "hybrid":
        return labels
    picture = picture_condition(model).read(batch)
    length = token_length(model)
    if labels.ndim == 2 and labels.shape[1] != length:
        raise ValueError(f"texts of a hybrid model have {length} token ids each, got {labels.shape[1]}: pad them")
    return join_condition(labels.to(picture.device), picture)


def token_length(model: PictureModel) -> int | None:
    """Return the token ids of a text; None of a model of labels."""
    return getattr(model.cond_stage_model, "max_length", None)


def make_null_condition(model: PictureModel, cond: Tensor) -> Tensor | None:
    """Return the null condition for each of conditions [B, ...]; None: there is none.

    It is the null class, the empty text, or that of the choices; a picture beside them stays.
    """
    if model.choices is not None and cond.ndim == 1:
        return model.choices.null_labels(cond)
    if model.model.conditioning_key != "hybrid":
        return stages.null_condition(model, cond)
    read = split_condition(cond, token_length(model))
    null = None if read.tokens is None else stages.null_condition(model, read.tokens)
    return None if null is None or read.picture is None else join_condition(null, read.picture)


def embed_given_conditions(model: PictureModel, c: Any) -> Any:
    """Embed a condition: labels [B], texts, pictures [B, C, H, W], or the mapping that holds them by their keys."""
    if not joins_alone(model):
        return stages.get_learned_conditioning(model, c)
    condition = picture_condition(model)
    return condition.read(c) if isinstance(c, Mapping) else encode_pictures(condition.embedder, c)
