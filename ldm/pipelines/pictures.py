"""Pictures in place of classes: a pipeline whose k-th class is the k-th picture of a list."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm.data.picture_list import PictureList, read_picture_list
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.pictures import PictureCondition, picture_condition
from ldm.modules.choices import Choices
from ldm.pipelines.base import Pipeline

_P = TypeVar("_P", bound=Pipeline)
# Pictures that are encoded together.
AT_ONCE = 8


def with_pictures(pipeline: _P, given: PictureList) -> _P:
    """Return a pipeline whose classes are pictures: all that takes class labels then works per picture.

    Args:
        pipeline: of a model that pictures are joined to (conditioning_key concat).
        given: square pictures; of another size than the model's they change the size of its states.

    Raises:
        ValueError: if the model takes no pictures, or these do not fit.
    """
    model: LatentDiffusion = pipeline.model
    condition = picture_condition(model)
    if model.model.conditioning_key == "hybrid":
        raise ValueError("a hybrid model takes text and picture together: see Pipeline.with_choices")
    pictures = given.masked.split(AT_ONCE)
    masks = [None] * len(pictures) if given.masks is None else given.masks.split(AT_ONCE)
    with torch.no_grad():
        pairs = zip(pictures, masks, strict=True)
        embedded = torch.cat([_embed(condition, picture, mask, pipeline.device) for picture, mask in pairs])
    height, width = embedded.shape[-2:]
    if height != width:
        raise ValueError(f"pictures must be square, got {tuple(given.pictures.shape[-2:])}: scale them to one size")
    if height != model.image_size:
        model = copy.copy(model)
        model.image_size = height
    return replace(pipeline, model=model).with_choices(Choices(given.names, picture=embedded))


def _embed(
    condition: PictureCondition, picture: torch.Tensor, mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    return condition.embed(picture.to(device), None if mask is None else mask.to(device))


def read_pictures_for(
    pipeline: Pipeline, folder: str | Path, masks: str | Path | None = None, size: int | None = None
) -> PictureList:
    """Read the pictures of a folder as a pipeline's model takes them: grey, in colours, or as label maps.

    Args:
        folder, masks, size: see `read_picture_list`.
    """
    model = pipeline.model
    channels = picture_channels(model)
    if channels in (1, 3):
        return read_picture_list(folder, channels, size, masks)
    return read_picture_list(folder, 1, size).one_hot(channels)


def picture_channels(model: LatentDiffusion) -> int:
    """Return the channels of a picture before it is embedded."""
    condition = picture_condition(model)
    embedder = condition.embedder
    mapper = getattr(embedder, "channel_mapper", None)
    if isinstance(mapper, nn.Conv2d):
        return mapper.in_channels
    encoder = getattr(embedder, "encoder", None)
    if encoder is not None:
        return encoder.in_channels
    # In pixels: a mask has one channel more than the picture, which has as many as the state.
    return condition.channels if condition.channels in (model.channels, 3) else condition.channels - 1
