"""Tiny-ImageNet: 200 classes of 500 training and 50 validation images, 64x64 pixels. Source: Stanford CS231n."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ldm.data.base import Transform, check_choice
from ldm.data.folder import FileImages, class_numbers
from ldm.data.pictures import Files, read_names
from ldm.util import ImageSize

ARCHIVE_FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"


class TinyImageNet(FileImages):
    """Tiny-ImageNet as images [H, W, 3] in [-1, 1], classes in the order of their synsets.

    Args:
        root: the unpacked folder, the one above it, or the published .zip.
        split: "train", or "val" (labels from `val_annotations.txt`).
        image_size: side in pixels, or [height, width]; the files have 64.
        flip: mirror with probability one half.
        broken: "error" or "skip", see `FileImages`.
        transform: applied after the flip.
        seed: seed of the augmentation.

    Raises:
        ValueError: if the root is another data set, or an image has no annotation.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        image_size: ImageSize = 64,
        flip: bool = False,
        broken: str = "error",
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("split", split, ("train", "val"))
        files = Files(root)
        tops = [top for top in ("", f"{ARCHIVE_FOLDER}/") if files.has(f"{top}wnids.txt")]
        if not tops:
            raise ValueError(
                f"{root} holds no wnids.txt, so it is not Tiny-ImageNet; fetch it with\n"
                "  decu data prepare --dataset tiny-imagenet"
            )
        top = tops[0]
        synsets = sorted(read_lines(files, f"{top}wnids.txt"))
        relpaths = files.images(f"{top}{split}")
        if split == "train":
            owners = [path.removeprefix(f"{top}train/").partition("/")[0] for path in relpaths]
        else:
            annotated = dict(line.split("\t")[:2] for line in read_lines(files, f"{top}{ANNOTATIONS}"))
            missing = [path for path in relpaths if PurePosixPath(path).name not in annotated]
            if missing:
                raise ValueError(f"{root}: {ANNOTATIONS} does not name {len(missing)} images, the first {missing[0]}")
            owners = [annotated[PurePosixPath(path).name] for path in relpaths]
        words = {}
        if files.has(f"{top}words.txt"):
            words = dict(line.split("\t", 1) for line in read_lines(files, f"{top}words.txt"))
        super().__init__(
            files,
            relpaths,
            class_numbers(owners, synsets),
            synsets,
            human_names=[words.get(synset, synset) for synset in synsets],
            image_size=image_size,
            flip=flip,
            broken=broken,
            transform=transform,
            seed=seed,
        )


def read_lines(files: Files, name: str) -> list[str]:
    """Return the lines of a text file that are not empty."""
    return read_names(files.read(name), f"{files.roots[0]}/{name}")
