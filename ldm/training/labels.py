"""Whether the labels of the training data are classes of the model."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data.base import check_class_names
from ldm.models.diffusion.base import DiffusionModel
from ldm.models.first_stage import FirstStage


def knows_classes(model: object) -> bool:
    """Whether a class of the data is a number to the model: to one of texts, of pictures or of none it is a name."""
    if isinstance(model, DiffusionModel):
        return getattr(getattr(model, "cond_stage_model", None), "n_classes", None) is not None
    return not isinstance(model, FirstStage)


def check_shown_names(pipeline: Any, data: Any, place: str) -> None:
    """Compare the names of a data set's classes, as people read them, with those that a loaded model was trained on.

    Args:
        pipeline: has `model` and `class_names`; a model to which a class is no number is not compared.
        place: what names the data set, for the message.

    Raises:
        ValueError: for a label with two names.
    """
    if knows_classes(pipeline.model):
        shown = getattr(data, "human_names", None) or getattr(data, "class_names", None) or ()
        check_class_names(list(pipeline.class_names), [str(name) for name in shown], ("train", place))


def check_labels(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Make sure that every training label is a class of the model: a GPU would not say what is wrong with another.

    Raises:
        ValueError: if one has no row in the embedder, its row is that of the null class, or it is another class in
            the data that the training is tested on.
    """
    pairs = zip(getattr(model, "members", (model,)), getattr(data, "modules", (data,)), strict=True)
    for member, module in pairs:
        labels = getattr(module.datasets.get("train"), "labels", None)
        conditioned = getattr(member, "cond_stage_key", None) == "class_label"  # what a data set's `labels` are
        classes = member.n_classes if conditioned else None
        for split in ("validation", "test") if conditioned else ():
            check_class_names(module.datasets.get("train"), module.datasets.get(split), ("train", split))
        highest = -1 if labels is None or not len(labels) else int(torch.as_tensor(labels).max())
        if classes is None or highest < classes:
            continue
        null = "" if member.null_class is None else " and the null class, its last row"
        other = "" if member.null_class is None else ", or null_class: false for an embedder without a null class"
        raise ValueError(
            f"the training data have labels up to {highest}; the embedder has the classes 0..{classes - 1}{null}: set "
            f"model.params.cond_stage_config.params.n_classes: {highest + 1 + bool(null)}{other}"
        )
