"""Whether a model and its data agree in what both say: sizes, channels, the keys of a batch, names of classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.data.own import check_pixels
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.base import DiffusionModel
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.conditioned import JOINING
from ldm.training.labels import check_labels, knows_classes

log = logging.getLogger(__name__)

SETS = ("train", "validation")


def check_agreement(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Compare a model's classes with the labels, its images with the first of each data set, and these with another.

    Raises:
        ValueError: naming the two keys of the config that do not agree, with both values.
    """
    check_labels(model, data)
    for member, module in zip(getattr(model, "members", (model,)), getattr(data, "modules", (data,)), strict=True):
        sets = {name: module.datasets[name] for name in SETS if name in getattr(module, "datasets", {})}
        if knows_classes(member):
            _check_class_names(sets)
        if isinstance(member, DiffusionModel):
            _check_network(member)
            for name, one in sets.items():
                check_data(member, one, f"data.params.{name}")


def check_data(model: Any, data: Any, place: str) -> None:
    """Compare the first item of a data set with what a diffusion model reads: keys, size, channels.

    Args:
        model: a diffusion model; others are not compared.
        data: a map-style data set.
        place: what names it, for the message.

    Raises:
        ValueError: saying what does not agree, with both values.
    """
    if isinstance(model, DiffusionModel) and len(data):
        _check_item(model, data[0], place)


def _check_class_names(sets: Mapping[str, Any]) -> None:
    names = {split: [str(one) for one in getattr(data, "class_names", None) or ()] for split, data in sets.items()}
    given = {split: own for split, own in names.items() if own}
    if len(given) == len(SETS) and given["train"] != given["validation"]:
        lacking = [one for one in given["train"] if one not in given["validation"]]
        other = f"it lacks {', '.join(lacking[:5])}" if lacking else "they are in another order, or more"
        raise ValueError(
            "the classes of data.params.validation are not those of data.params.train, by whose numbers the model "
            f"knows them: {other}; give both sets the same class_names"
        )


def _check_network(model: DiffusionModel) -> None:
    """Compare the network's input with the channels of the states; its output is checked when the model is built."""
    channels = model.channels
    taken = getattr(model.model.diffusion_model, "in_channels", None)
    joined = model.model.conditioning_key in JOINING
    if isinstance(taken, int) and (taken < channels if joined else taken != channels):
        raise ValueError(
            f"model.params.channels is {channels}, and the network takes {taken} (in_channels of unet_config): they "
            "are the same, but for pictures that are joined to the input"
        )


def _check_item(model: DiffusionModel, item: Any, place: str) -> None:
    """Compare an item of a data set with the keys, the size and the channels that a model reads."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{place} gives items of {type(item).__name__}; expected {{image, class_label}}")
    keys = {"model.params.first_stage_key": model.first_stage_key}
    if isinstance(model, LatentDiffusion) and _needs_condition(model):
        keys["model.params.cond_stage_key"] = model.cond_stage_key
    for name, key in keys.items():
        if key not in item:
            raise ValueError(f"{name} is '{key}', and an item of {place} has {list(item)}: name one of these")
    image = item[model.first_stage_key]
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) not in (2, 3):
        raise ValueError(f"{model.first_stage_key} of {place} must be an image [H, W, C], got shape {list(shape)}")
    if joins_pictures(model) and len(getattr(item[model.cond_stage_key], "shape", ())) < 2:
        raise ValueError(
            f"model.params.conditioning_key is concat, which joins a picture, and '{model.cond_stage_key}' of {place} "
            "is none: take conditioning_key crossattn or adm for classes"
        )
    if "encoded" not in item:
        _check_shape(model, shape, place)
        check_pixels(image, f"images of {place}")


def _needs_condition(model: LatentDiffusion) -> bool:
    embedder = model.cond_stage_model
    return embedder is not None and not getattr(embedder, "optional", False)


def joins_pictures(model: DiffusionModel) -> bool:
    """Whether the condition is a picture alone."""
    conditioned = isinstance(model, LatentDiffusion) and _needs_condition(model)
    return conditioned and model.model.conditioning_key == "concat"


def _check_shape(model: DiffusionModel, shape: tuple[int, ...], place: str) -> None:
    stage = getattr(model, "first_stage_model", None)
    encoder = getattr(stage, "encoder", None)
    if stage is None or isinstance(stage, IdentityFirstStage):
        factor, channels = 1, model.channels
    elif hasattr(encoder, "factor") and hasattr(encoder, "in_channels"):
        factor, channels = encoder.factor, encoder.in_channels
    else:
        return
    found = shape[2] if len(shape) == 3 else 1
    size = tuple(side * factor for side in model.latent_shape[1:])
    first_stage = f" times {factor} of the first stage" if factor > 1 else ""
    if shape[:2] != size:
        message = (
            f"images of {place} are {shape[0]} x {shape[1]}, and the model's are {size[0]} x {size[1]} "
            f"(model.params.image_size {model.image_size}{first_stage}): let the two agree"
        )
        if getattr(model, "member", None) is None:
            raise ValueError(message)
        log.warning("%s; the member's heads train at the size of the images", message)
    if found != channels:
        raise ValueError(
            f"images of {place} have {found} channels, and the model's have {channels} "
            f"({'ddconfig.in_channels' if factor > 1 else 'model.params.channels'}): let the two agree"
        )
