"""What every labelled image data set here shares: its attributes, its items, and reproducible augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.util import ImageSize, generator, instantiate_from_config, read_image_size

Transform = Callable[[Tensor, torch.Generator], Tensor]

_SPLITS = ("train", "test", "all")


class LabelledImages(Dataset):
    """A map-style data set of `image` [H, W, C] float32 in [-1, 1], `class_label`, `index` and `human_label`.

    A subclass gives `read(index)`; this class adds the labels, the transform and its generator. The transform's draws
    depend on (seed, epoch, index) and on nothing else, so they do not change with the number of workers or the order.

    Args:
        labels: class of each image, [N].
        class_names: one name a class.
        image_shape: (H, W, C) of an item's image.
        human_names: one readable name a class; `class_names` where not given.
        transform: `transform(image [H, W, C], generator) -> image`, or (image, {more of the item}), or a
            `target`/`params` config of one.
        seed: seed of the transform's draws.
    """

    relpaths: list[str] | None = None

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        *,
        human_names: Sequence[str] | None = None,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        self._all_labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = list(class_names)
        self.human_names = list(human_names or class_names)
        self.image_shape = tuple(image_shape)
        self.transform = instantiate_from_config(transform) if isinstance(transform, Mapping) else transform
        self.seed = seed
        # In shared memory, so that loader workers which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        found = self._all_labels.unique()
        if len(found) and not 0 <= int(found[0]) <= int(found[-1]) < self.n_classes:
            raise ValueError(
                f"labels must lie in 0..{self.n_classes - 1} ({self.n_classes} classes), "
                f"got {int(found[0])}..{int(found[-1])}"
            )
        self.select(torch.arange(len(self._all_labels)))

    def select(self, positions: Tensor) -> None:
        """Keep the images at `positions` of the full data set, in that order, repeats included."""
        self.positions = positions
        self.labels = self._all_labels[positions]
        self._draws = occurrences(positions)

    @property
    def n_classes(self) -> int:
        """Number of classes, those without images included."""
        return len(self.class_names)

    @property
    def epoch(self) -> int:
        """Epoch whose augmentation is drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn, in every loader worker as well; called in one, for it alone."""
        if get_worker_info() is None:
            self._epoch.fill_(epoch)
        else:
            self._epoch = torch.tensor(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Return image `index` before the transform, [H, W, C] float32 in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must define read(index)")

    def item(self, index: int, draw: int = 0) -> dict[str, Any]:
        """Return image `index` of the full data set; `draw` numbers its repeats within one epoch (bootstraps)."""
        image, facts = self.read(index), {}
        if self.transform is not None:
            image = self.transform(image, generator(self.seed, self.epoch, index, draw))
        if isinstance(image, tuple):
            image, facts = image
        return {"image": image, **self.describe(index), **facts}

    def describe(self, index: int) -> dict[str, Any]:
        """Return everything of an item but its image."""
        label = int(self._all_labels[index])
        facts = {"class_label": label, "index": index, "human_label": self.human_names[label]}
        if self.relpaths is not None:
            facts["relpath"] = self.relpaths[index]
        return facts

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.item(int(self.positions[position]), int(self._draws[position]))


def occurrences(positions: Tensor) -> Tensor:
    """Return for each entry how often its value stands before it: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    order = positions.argsort(stable=True)
    ordered = positions[order]
    first = torch.searchsorted(ordered, ordered)  # start of each run of equal values
    counts = torch.empty_like(positions)
    counts[order] = torch.arange(len(positions)) - first
    return counts


def by_class(labels: Tensor) -> dict[int, Tensor]:
    """Return {class: its ascending positions in `labels` [N]} of the classes that occur, by one sort."""
    order = labels.argsort(stable=True)
    classes, counts = labels[order].unique_consecutive(return_counts=True)
    return dict(zip(classes.tolist(), order.split(counts.tolist()), strict=True))


def to_signed(pixels: Tensor) -> Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Return [..., H, W, 1] images with 1 or 3 equal channels."""
    check_choice("channels", channels, (1, 3))
    return images.expand(*images.shape[:-1], channels)


def split_positions(labels: Tensor, split: str, test_fraction: float, name: str) -> Tensor:
    """Return the ascending positions of a fixed, stratified split: in each class a share `test_fraction` is test.

    Args:
        labels: class of each image, [N].
        split: "train", "test" or "all".
        test_fraction: share of each class held out, between 0 and 1.
        name: word that seeds the draw, so that each data set has one fixed split.
    """
    check_choice("split", split, _SPLITS)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if split == "all":
        return torch.arange(len(labels))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label, members in by_class(labels).items():
        order = torch.randperm(len(members), generator=generator("split", name, label))
        is_test[members[order[: round(test_fraction * len(members))]]] = True
    return (is_test if split == "test" else ~is_test).nonzero()[:, 0]


class Crop:
    """Cut a window of a size, or height and width, from an image [H, W, C]: the centre one, or one drawn uniformly."""

    def __init__(self, size: ImageSize, random: bool = False):
        self.size = read_image_size(size, "size")
        self.random = random

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = self.size
        spare = [image.shape[0] - height, image.shape[1] - width]
        if min(spare) < 0:
            raise ValueError(f"cannot crop {height}x{width} from an image of shape {tuple(image.shape)}")
        if self.random:
            top, left = (int(torch.randint(extra + 1, (), generator=generator)) for extra in spare)
        else:
            top, left = (extra // 2 for extra in spare)
        return image[top : top + height, left : left + width]


class Flip:
    """Mirror an image [H, W, C] left to right with probability one half."""

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image.flip(1) if float(torch.rand((), generator=generator)) < 0.5 else image


class Compose:
    """Apply transforms one after the other, drawing from the same generator."""

    def __init__(self, *transforms: Transform):
        self.transforms = transforms

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        for transform in self.transforms:
            image = transform(image, generator)
        return image


def check_class_names(first: Any, second: Any, names: tuple[str, str] = ("train", "validation")) -> None:
    """Make sure that a label means the same class in two data sets, where both name their classes.

    A data set may have the first classes of the other alone.

    Args:
        first, second: data sets, or the names of their classes.
        names: of the data sets, for messages.

    Raises:
        ValueError: for a label with two names.
    """
    for label, (one, other) in enumerate(zip(_list_classes(first), _list_classes(second), strict=False)):
        if str(one) != str(other):
            raise ValueError(
                f"label {label} is the class '{one}' in the data set {names[0]} and '{other}' in {names[1]}, one of "
                "which may lack a class: name the classes of both in one order (params.class_names of ImageFolder)"
            )


def _list_classes(data: Any) -> Sequence[Any]:
    """Return the names of a data set's classes, or a list of names itself; none where there are none but numbers."""
    names = list(data if isinstance(data, (list, tuple)) else getattr(data, "class_names", None) or ())
    return [] if [str(name) for name in names] == [str(label) for label in range(len(names))] else names
