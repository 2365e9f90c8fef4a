"""Image files in class folders, from a folder or straight from a zip file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ldm.data.base import Compose, Crop, Flip, LabelledImages, Transform, check_choice, split_positions, to_signed
from ldm.data.pictures import BrokenImageError, Files, read_picture
from ldm.util import ImageSize, instantiate_from_config, read_image_size

CROPS = ("center", "random", "none")
# The class of every picture where no folder names one.
ONE_CLASS = "pictures"
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


class FileImages(LabelledImages):
    """Labelled image files, read one at a time: images [H, W, channels] in [-1, 1].

    A file is scaled to cover `image_size` (bicubic, antialiased), then what is too long is cropped.

    Args:
        files: where the files are.
        relpaths: path of each image below its root, [N].
        labels: class of each image, [N].
        class_names: one name a class.
        human_names: one readable name a class.
        image_size: side in pixels, or [height, width].
        channels: 1 (grey) or 3 (RGB).
        crop: "center", "random", or "none" to scale both sides to `image_size` instead.
        flip: mirror with probability one half.
        broken: what to do with a file that cannot be read: "error" names it; "skip" gives the class's next readable
            image in its place, and counts it in `n_broken`.
        in_memory: keep decoded pixels, so that each file is read once (by each loader worker: use `num_workers: 0`).
        transform: applied after crop and flip, see `LabelledImages`.
        seed: seed of the crop, the flip and the transform's draws.

    Attributes:
        box: (top, left, height, width) of the part of each file that is read; the whole where None.
    """

    box: tuple[int, int, int, int] | None = None

    def __init__(
        self,
        files: Files,
        relpaths: Sequence[str],
        labels: Sequence[int] | Tensor,
        class_names: Sequence[str],
        *,
        human_names: Sequence[str] | None = None,
        image_size: ImageSize = 256,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        broken: str = "error",
        in_memory: bool = False,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("crop", crop, CROPS)
        check_choice("broken", broken, ("error", "skip"))
        check_choice("channels", channels, (1, 3))
        size = read_image_size(image_size)
        steps: list[Transform] = [] if crop == "none" else [Crop(size, random=crop == "random")]
        steps += [Flip()] if flip else []
        if transform is not None:
            steps.append(instantiate_from_config(transform) if isinstance(transform, Mapping) else transform)
        super().__init__(
            labels,
            class_names,
            (*size, channels),
            human_names=human_names,
            transform=Compose(*steps),
            seed=seed,
        )
        self.files = files
        self.relpaths = list(relpaths)
        self.stretch = crop == "none"
        self.broken = broken
        self._kept: dict[int, Tensor] | None = {} if in_memory else None  # uint8 [H, W, C] of each file read so far
        # Shared with loader workers, so that what they find is counted here.
        self._found_broken = torch.zeros(len(self.relpaths), dtype=torch.bool).share_memory_()

    @property
    def n_broken(self) -> int:
        """Number of files found broken so far, in this process and its loader workers."""
        return int(self._found_broken.sum())

    @property
    def broken_relpaths(self) -> list[str]:
        """The files found broken so far."""
        return [self.relpaths[index] for index in self._found_broken.nonzero()[:, 0].tolist()]

    def read(self, index: int) -> Tensor:
        """Return image `index`, [H, W, C] in [-1, 1], scaled to cover `image_size`.

        Raises:
            BrokenImageError: if the file cannot be read, with its path.
        """
        if self._kept is not None and index in self._kept:
            return to_signed(self._kept[index])
        height, width, channels = self.image_shape
        path = self.relpaths[index]
        try:
            remedy = "mend it or use broken='skip'"
            size = (height, width)
            pixels = read_picture(self.files, path, channels, size, self.stretch, self.box, remedy=remedy)
        except BrokenImageError:
            self._found_broken[index] = True
            raise
        if self._kept is not None:
            self._kept[index] = pixels
        return to_signed(pixels)

    def item(self, index: int, draw: int = 0) -> dict[str, Any]:
        """Return image `index` of the full data set, or with broken="skip" the next readable one of its class.

        Raises:
            BrokenImageError: if the file cannot be read and broken is "error", or the class has no readable file.
        """
        if self.broken == "error":
            return super().item(index, draw)
        for candidate in same_class_from(self._all_labels, index):
            if not self._found_broken[candidate]:
                try:
                    return super().item(candidate, draw)
                except BrokenImageError:
                    continue
        name = self.class_names[int(self._all_labels[index])]
        raise BrokenImageError(f"none of the images of class '{name}' can be read, {self.relpaths[index]} among them")


def same_class_from(labels: Tensor, index: int) -> Iterator[int]:
    """Yield `index`, then the other images of its class in cyclic order; labels: [N]."""
    yield index
    members = (labels == labels[index]).nonzero()[:, 0]
    start = int(torch.searchsorted(members, index, right=True))
    yield from members.roll(-start)[:-1].tolist()


class ImageFolder(FileImages):
    """Images in class folders, nested ones too, of a folder or a .zip: see `FileImages` for the items.

    With depth 1, `root/cat/any/where/1.png` is a "cat"; with depth 2, `root/Greek/character01/1.png` is a
    "Greek/character01"; with depth 0 all are one class, "pictures". Classes are numbered in the order of their names.

    Args:
        root: folder or .zip, or several.
        folder: folder below the root that holds the class folders, such as "train".
        depth: how many levels of folders name the class; 0 for a folder without classes.
        split: "all", or the "train" or "test" part of a fixed stratified split.
        test_fraction: share of each class that is "test".
        class_names: the classes in their order, where some may lack images; those found where not given.
        image_size: side in pixels, or [height, width].
        channels: 1 (grey) or 3 (RGB).
        crop: "center", "random", or "none" to scale both sides.
        flip: mirror with probability one half.
        broken: "error" or "skip".
        in_memory: keep decoded pixels, see `FileImages`.
        transform: applied after crop and flip.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        root: str | Sequence[str],
        folder: str = "",
        depth: int = 1,
        split: str = "all",
        test_fraction: float = 0.1,
        class_names: Sequence[str] | None = None,
        image_size: ImageSize = 256,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        broken: str = "error",
        in_memory: bool = False,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        files = Files(root)
        relpaths = files.images(folder)
        levels = len(PurePosixPath(folder).parts)
        owners = [parse_class(path, levels, depth) for path in relpaths]
        if class_names is None and depth > 0:
            refuse_other_levels(relpaths, owners, levels, depth)
        names = list(class_names) if class_names is not None else sorted(set(owners))
        labels = class_numbers(owners, names)
        kept = split_positions(labels, split, test_fraction, "folder")
        super().__init__(
            files,
            [relpaths[index] for index in kept.tolist()],
            labels[kept],
            names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            flip=flip,
            broken=broken,
            in_memory=in_memory,
            transform=transform,
            seed=seed,
        )


def parse_class(relpath: str, levels: int, depth: int) -> str:
    """Return the class a path names: its `depth` folders after the first `levels`; with depth 0 one class for all.

    Raises:
        ValueError: if it has fewer folders, or `depth` is negative.
    """
    folders = PurePosixPath(relpath).parts[levels:-1]
    if depth < 0 or len(folders) < depth:
        raise ValueError(f"expected {max(depth, 1)} or more levels of class folders above each image, got '{relpath}'")
    return "/".join(folders[:depth]) or ONE_CLASS


def refuse_other_levels(relpaths: Sequence[str], owners: Sequence[str], levels: int, depth: int) -> None:
    """Make sure that the folders that are taken for classes are not splits, nor one folder around the classes.

    Args:
        relpaths: of the images.
        owners: the class of each.
        levels, depth: see `parse_class`.

    Raises:
        ValueError: saying what to set.
    """
    found = set(owners)
    first = min(found)
    if found <= SPLIT_FOLDERS:
        raise ValueError(
            f"the class folders would be {', '.join(sorted(found))}, which are names of splits: choose one of them by "
            f"folder: {'/'.join([*PurePosixPath(relpaths[0]).parts[:levels], first])}, or give class_names"
        )
    below = {PurePosixPath(path).parts[levels + depth :] for path in relpaths} if len(found) == 1 else set()
    inner = {parts[0] for parts in below if len(parts) > 1}
    if len(inner) > 1 and all(len(parts) > 1 for parts in below):
        raise ValueError(
            f"all images lie in the one class folder '{first}', in {len(inner)} folders such as '{min(inner)}': if "
            f"these are the classes set depth: {depth + 1}, and if they are not give class_names: [{first}]"
        )


def class_numbers(owners: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Return the number of each class name, int64 [N].

    Raises:
        ValueError: if a name is not among `class_names`.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(set(owners) - set(numbers))
    if unknown:
        raise ValueError(f"expected the {len(numbers)} given classes, got also {', '.join(unknown[:5])}")
    return torch.tensor([numbers[owner] for owner in owners], dtype=torch.int64)
