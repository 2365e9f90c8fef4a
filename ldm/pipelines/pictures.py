"""Pictures in place of classes: a pipeline whose k-th class is the k-th picture of a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm.data.picture_list import PictureList, read_picture_list
from ldm.ensembles.classes import Classes
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.pictures import PictureCondition, picture_condition
from ldm.modules.choices import Choices
from ldm.pipelines.model import ModelPipeline
from ldm.pipelines.sizes import find_factor, resize_states
from ldm.util import ImageSize

_P = TypeVar("_P", bound=ModelPipeline)
# Pictures that are encoded together.
AT_ONCE = 8


def with_pictures(pipeline: _P, given: PictureList, classes: Sequence[int | str] | None = None) -> _P:
    """Return a pipeline whose classes are pictures: all that takes class labels then works per picture.

    Of a hybrid model, which takes a class or a text beside a picture, they are the pairs of a picture and one of
    these: every class of the first picture, then of the second.

    Args:
        pipeline: of a model that pictures are joined to (conditioning_key concat or hybrid); of a hybrid model of texts
            what `with_prompts` returned.
        given: pictures; of another size than the model's they change the size of its states.
        classes: of a hybrid model of classes those that pictures are paired with, by number or name; None: all.

    Raises:
        ValueError: if the model takes no pictures, these do not fit, or there are no texts to pair them with.
    """
    model: LatentDiffusion = pipeline.model
    condition = picture_condition(model)
    beside = _texts_beside(pipeline, classes)
    pictures = given.masked.split(AT_ONCE)
    masks = [None] * len(pictures) if given.masks is None else given.masks.split(AT_ONCE)
    with torch.no_grad():
        pairs = zip(pictures, masks, strict=True)
        embedded = torch.cat([_embed(condition, picture, mask, pipeline.device) for picture, mask in pairs])
    factor = find_factor(model.first_stage_model)
    model = resize_states(model, factor * embedded.shape[-2], factor * embedded.shape[-1])
    alone = Choices(given.names, picture=embedded)
    return replace(pipeline, model=model).with_choices(alone if beside is None else pair_choices(alone, beside))


def _texts_beside(pipeline: ModelPipeline, classes: Sequence[int | str] | None) -> Choices | None:
    """Return the classes or texts that a hybrid model takes beside pictures; None of a model of pictures alone."""
    model = pipeline.model
    if model.model.conditioning_key != "hybrid":
        if classes:
            raise ValueError("this model takes pictures alone: leave out the classes beside them (--picture_classes)")
        return None
    if model.reads_text:
        if classes:
            raise ValueError("this model takes texts beside pictures, and no classes: give prompts")
        if model.choices is None or model.choices.picture is not None:
            raise ValueError("this model takes a text beside a picture: give prompts (--prompt; with_prompts) as well")
        return model.choices
    count = model.n_classes or 0
    if model.choices is not None or not count:
        raise ValueError("this model has no classes to pair pictures with: take the pipeline as it was loaded")
    known = Classes(count, _class_names(pipeline, classes or ()))
    chosen = known.choose(classes, None)
    null = () if model.null_class is None else (model.null_class,)
    return Choices(tuple(map(known.name, chosen)), tokens=torch.tensor([*chosen, *null]), null=len(null))


def _class_names(pipeline: ModelPipeline, classes: Sequence[int | str]) -> tuple[str, ...]:
    """Return the names of classes: of an ensemble the record's, else those of the data, where names are given."""
    ensemble = getattr(pipeline, "ensemble", None)
    if ensemble is not None:
        return tuple(ensemble.spec.get("class_names") or ())
    return () if all(str(one).lstrip("-").isdigit() for one in classes) else pipeline.class_names


def pair_choices(pictures: Choices, texts: Choices) -> Choices:
    """Return every picture with every text or class, the texts of the first picture first.

    The null condition of a pair is its own picture with the null of the texts.
    """
    assert pictures.picture is not None
    count = len(pictures.names)
    each = len(texts.names)
    names = tuple(f"{picture}, {text}" for picture in pictures.names for text in texts.names)
    rows = {
        name: torch.cat([value[:each].repeat(count, *[1] * (value.ndim - 1)), *[value[each:]] * count])
        for name, value in texts.tensors().items()
    }
    joined = [pictures.picture.repeat_interleave(each, 0), *([pictures.picture] if texts.null else [])]
    return Choices(names, picture=torch.cat(joined), null=count if texts.null else 0, **rows)


def _embed(
    condition: PictureCondition, picture: torch.Tensor, mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    return condition.embed(picture.to(device), None if mask is None else mask.to(device))


def read_pictures_for(
    pipeline: ModelPipeline, folder: str | Path, masks: str | Path | None = None, size: ImageSize | None = None
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
