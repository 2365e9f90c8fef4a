"""CelebA: faces with 40 attributes, from the aligned and cropped images.

Source: Liu, Luo, Wang, Tang 2015; mmlab.ie.cuhk.edu.hk/projects/CelebA.html. For non-commercial research only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.base import Transform, check_choice
from ldm.data.folder import FileImages
from ldm.data.pictures import Files
from ldm.files import reading
from ldm.util import ImageSize

CELEBA_FOLDER = "img_align_celeba"
PARTS = {"train": "0", "valid": "1", "test": "2"}
# The 128x128 pixels around (row 121, column 89) that the models of 64x64 were trained on (DDIM, Song et al. 2021).
FACE = (57, 25, 128, 128)


class CelebA(FileImages):
    """CelebA as images [H, W, 3] in [-1, 1], classed by one of its attributes, or by nothing.

    Args:
        root: folder of `img_align_celeba.zip` (or the folder that it unpacks to) and of the published lists.
        split: "train" (162,770), "valid" (19,867), "test" (19,962) or "all".
        label: an attribute, such as Smiling: class 1 has it, class 0 has not; "identity" for the persons; with None
            all images are of one class.
        image_size: side in pixels, or [height, width].
        crop: "face" for the 128x128 pixels around the face that models of 64x64 are trained on, else see `FileImages`.
        flip: mirror with probability one half.
        transform: see `LabelledImages`.
        seed: seed of the draws.

    Raises:
        ValueError: if the root lacks a file, or there is no such attribute.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        label: str | None = None,
        image_size: ImageSize = 64,
        crop: str = "face",
        flip: bool = False,
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_choice("split", split, (*PARTS, "all"))
        folder = Path(root)
        archive = folder / f"{CELEBA_FOLDER}.zip"
        if not (archive.is_file() or (folder / CELEBA_FOLDER).is_dir()):
            raise ValueError(
                f"{root} holds no {archive.name} and no {CELEBA_FOLDER}; fetch CelebA with: "
                f"decu data prepare --dataset celeba --root {folder.parent}"
            )
        listed = folder / "list_eval_partition.txt"
        parts = read_columns(listed)
        with reading(listed, "CelebA's list of its parts", "fetch it again"):
            names = [name for name, (part,) in parts.items() if split == "all" or part == PARTS[split]]
        class_names, labels = read_face_labels(folder, label)
        unlabelled = [name for name in names if labels and name not in labels]
        if unlabelled:
            raise ValueError(
                f"CelebA's list of {label} lacks {len(unlabelled)} pictures, {unlabelled[0]} for one: fetch it again"
            )
        files = Files(archive if archive.is_file() else folder)
        first = f"{CELEBA_FOLDER}/{names[0]}" if names else ""
        if not files.has(first):
            said = f"names '{names[0]}', and there is no {files.roots[0]}/{first}" if names else f"has no split {split}"
            raise ValueError(f"list_eval_partition.txt {said}: unpack {archive.name} so that its pictures lie there")
        super().__init__(
            files,
            [f"{CELEBA_FOLDER}/{name}" for name in names],
            [labels[name] if labels else 0 for name in names],
            class_names,
            image_size=image_size,
            crop="center" if crop == "face" else crop,
            flip=flip,
            transform=transform,
            seed=seed,
        )
        self.box = FACE if crop == "face" else None


def read_columns(path: Path, skip: int = 0) -> dict[str, list[str]]:
    """Return {file name: the words after it} of a published list whose first `skip` lines are something else.

    Raises:
        ValueError: if the list is absent.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} lacks {path.name}, one of CelebA's published lists; fetch it again")
    with reading(path, "a published list of CelebA", "fetch it again"):
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[skip:] if line.strip()]
    return {name: words for name, *words in rows}


def read_face_labels(folder: Path, label: str | None) -> tuple[list[str], dict[str, int]]:
    """Return the names of the classes, and {file name: class}; see `CelebA` for `label`.

    Raises:
        ValueError: if a list is absent, or there is no such attribute.
    """
    if label is None:
        return ["face"], {}
    if label == "identity":
        path = folder / "identity_CelebA.txt"
        rows = read_columns(path)
        with reading(path, "CelebA's list of persons", "fetch it again"):
            persons = {name: int(words[0]) for name, words in rows.items()}
        numbers = {person: number for number, person in enumerate(sorted(set(persons.values())))}
        return [f"person {person}" for person in numbers], {name: numbers[one] for name, one in persons.items()}
    path = folder / "list_attr_celeba.txt"
    rows = read_columns(path, skip=2)
    with reading(path, "CelebA's list of attributes", "fetch it again"):
        attributes = path.read_text().split("\n", 2)[1].split()
    if label not in attributes:
        raise ValueError(f"label must be identity or an attribute of CelebA ({', '.join(attributes)}), got '{label}'")
    column = attributes.index(label)
    with reading(path, "CelebA's list of attributes", "fetch it again"):
        return [f"not {label}", label], {name: int(words[column] == "1") for name, words in rows.items()}
