"""Data sets of one's own: what the commands ask of one, and what is found out where it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from ldm.util import instantiate_from_config

# What the commands ask of a data set; `LabelledImages` has it all.
ASKED = ("labels", "class_names", "n_classes", "image_shape")


class OwnImages(Dataset):
    """A data set of somebody's own with the attributes that it lacks.

    Its items must be mappings with `image` [H, W, C] in [-1, 1], C 1 or 3, and `class_label`, a number from 0. An
    attribute that it has is taken: `labels` [N], `class_names`, `n_classes`, `image_shape` (H, W, C), `human_names`.
    Labels that it does not have are read from all of its items, once, when they are first asked for.

    Args:
        dataset: a map-style data set.

    Raises:
        ValueError: if the first item is not as it must be.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        check_item(dataset, dataset[0])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self.dataset[index])
        label = int(item["class_label"])
        own = {"image": torch.as_tensor(item["image"]), "class_label": label}
        return {"index": index, "human_label": self.human_names[label], **item, **own}

    @cached_property
    def labels(self) -> Tensor:
        """The class of each item, int64 [N]."""
        own = getattr(self.dataset, "labels", None)
        if own is None:
            own = [int(self.dataset[index]["class_label"]) for index in range(len(self.dataset))]
        return torch.as_tensor(own, dtype=torch.int64)

    @cached_property
    def class_names(self) -> list[str]:
        """One name a class; numbers where the data set has no names."""
        own = getattr(self.dataset, "class_names", None)
        count = getattr(self.dataset, "n_classes", None)
        if own is None:
            own = range(int(self.labels.max()) + 1 if count is None else count)
        return [str(name) for name in own]

    @property
    def human_names(self) -> list[str]:
        """One readable name a class."""
        return list(getattr(self.dataset, "human_names", None) or self.class_names)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of an item's image."""
        return tuple(getattr(self.dataset, "image_shape", None) or np.shape(self.dataset[0]["image"]))


def splits_of(config: Mapping[str, Any], *needed: str, remedy: str = "") -> Mapping[str, Any]:
    """Return the `data.params` of a model's config, resolved: the configs of its data sets by split.

    Args:
        needed: splits that must be there, "train" or "validation".
        remedy: what to do where one is not, in place of giving another config.

    Raises:
        ValueError: naming the split that the config has not.
    """
    whole = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    data = OmegaConf.select(whole, "data")  # inside of the whole config, whose other sections it may refer to
    own: Any = OmegaConf.to_container(data, resolve=True) if OmegaConf.is_config(data) else {}
    params = own.get("params") or {}
    for split in needed:
        if not params.get(split):
            advice = remedy or _advise(whole)
            raise ValueError(f"the config has no data.params.{split}, whose images this reads: {advice}")
    return params


def _advise(config: DictConfig) -> str:
    """Say what gives a config its data sets: one on top of it; that of a folder of diffusers is written first."""
    words = "write one with `bases` naming this and a section data, and give it as --base with --ckpt"
    if "diffusers" in config:
        return f"`decu export --run FOLDER --out base.ckpt` writes base.yaml; {words.replace('this', 'that')} base.ckpt"
    return words


def check_item(dataset: Any, item: Any) -> None:
    """Make sure that an item is what the commands read.

    Raises:
        ValueError: saying what it is and what it must be.
    """
    asked = "a mapping with image [H, W, C] in [-1, 1] and class_label, a number from 0"
    name = type(dataset).__name__
    if not isinstance(item, Mapping) or "image" not in item or "class_label" not in item:
        found = f"a mapping of {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        raise ValueError(f"the items of {name} must be {asked}; the first is {found}")
    image = torch.as_tensor(item["image"])
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"the images of {name} must be [H, W, C] with 1 or 3 channels; the first is {list(image.shape)}"
        )
    check_pixels(image, f"the images of {name}")


def check_pixels(image: Any, shown: str) -> None:
    """Make sure that an image is of floating-point numbers in [-1, 1], as networks and samplers take it.

    Args:
        image: the first of a data set.
        shown: what names the images, for the message.

    Raises:
        ValueError: saying what it holds.
    """
    numbers = torch.as_tensor(image)
    low, high = float(numbers.min()), float(numbers.max())
    if not numbers.is_floating_point() or low < -1.001 or high > 1.001:
        found = f"{numbers.dtype} from {low:g} to {high:g}"
        raise ValueError(f"{shown} must be floating-point numbers in [-1, 1]; the first holds {found}")


def check_map_style(made: Any, config: Mapping[str, Any], before: str = "") -> None:
    """Make sure that what a config built is a map-style data set.

    Args:
        made: from `config`, which names its target.
        before: what the message begins with.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(made, str) or not all(hasattr(made, one) for one in ("__len__", "__getitem__")):
        raise ValueError(
            f"{before}{config['target']} gives a {type(made).__name__}, which is no data set: name a class with "
            "__len__ and __getitem__"
        )


def build_dataset(config: Any) -> Any:
    """Build a data set from its `target`/`params`; one that lacks attributes which the commands ask for gets them.

    A data set without class labels is returned as it is: models without conditions train on it.

    Raises:
        ValueError: if its items are not what the commands read.
    """
    made = instantiate_from_config(config)
    check_map_style(made, config)
    return complete_dataset(made)


def complete_dataset(made: Any) -> Any:
    """Return a map-style data set with the attributes that it lacks of those which the commands ask for.

    Raises:
        ValueError: if its items are not what the commands read.
    """
    complete = all(hasattr(made, name) for name in ASKED)
    of_project = type(made).__module__.partition(".")[0] == "ldm"
    if (complete and of_project) or not hasattr(made, "__len__") or not len(made):
        return made
    first = made[0]
    pictured = isinstance(first, Mapping) and "image" in first
    if pictured and ("class_label" not in first or (complete and isinstance(first["image"], Tensor))):
        return made
    return OwnImages(made)
