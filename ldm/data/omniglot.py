"""Omniglot: handwritten characters of many alphabets, 20 drawings each.

Source: Lake, Salakhutdinov, Tenenbaum 2015; github.com/brendenlake/omniglot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.base import Transform, split_positions
from ldm.data.folder import FileImages, class_numbers
from ldm.data.pictures import Files
from ldm.util import ImageSize


class Omniglot(FileImages):
    """Omniglot as images [H, W, channels] in [-1, 1], classes "<alphabet>/<character>".

    The published parts overlap (`small1` and `small2` share two alphabets); a drawing counts once.

    Args:
        root: folder of the published `images_*.zip` files, or of the folders they hold.
        parts: which of them, such as "images_background_small1"; all that are there where not given.
        split: "train", "test" or "all": a fixed, stratified split.
        test_fraction: share of each class that is "test".
        image_size: side in pixels, or [height, width]; the files have 105.
        channels: 1, or 3 equal ones.
        broken: "error" or "skip", see `FileImages`.
        in_memory: keep decoded pixels (all of Omniglot at 32x32: 33 MB), see `FileImages`.
        transform: see `LabelledImages`.
        seed: seed of the transform's draws.

    Raises:
        ValueError: if the root lacks a part, or has none.
    """

    def __init__(
        self,
        root: str,
        parts: Sequence[str] | None = None,
        split: str = "train",
        test_fraction: float = 0.2,
        image_size: ImageSize = 32,
        channels: int = 1,
        broken: str = "error",
        in_memory: bool = True,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        folder = Path(root)
        names = sorted(parts) if parts is not None else sorted({path.stem for path in folder.glob("images_*")})
        if not names:
            raise ValueError(f"{root} holds no images_*.zip and no images_* folder")
        files = Files(list(dict.fromkeys(part_root(folder, name) for name in names)))
        drawings: dict[tuple[str, ...], str] = {}  # (alphabet, character, file): path in the first part that has it
        for path in (path for name in names for path in files.images(name)):
            if path.count("/") != 3:
                raise ValueError(f"drawings of Omniglot lie in PART/ALPHABET/CHARACTER/NAME.png, and there is '{path}'")
            drawings.setdefault(PurePosixPath(path).parts[-3:], path)
        relpaths = list(drawings.values())
        owners = ["/".join(drawing[:2]) for drawing in drawings]
        class_names = sorted(set(owners))
        labels = class_numbers(owners, class_names)
        kept = split_positions(labels, split, test_fraction, "omniglot")
        super().__init__(
            files,
            [relpaths[index] for index in kept.tolist()],
            labels[kept],
            class_names,
            image_size=image_size,
            channels=channels,
            crop="none",
            broken=broken,
            in_memory=in_memory,
            transform=transform,
            seed=seed,
        )


def part_root(folder: Path, name: str) -> Path:
    """Return where a part's files lie: the folder, if it has been unpacked there, or its zip file."""
    if (folder / name).is_dir():
        return folder
    if (folder / f"{name}.zip").is_file():
        return folder / f"{name}.zip"
    raise ValueError(f"{folder} holds neither {name}.zip nor the folder {name}")
