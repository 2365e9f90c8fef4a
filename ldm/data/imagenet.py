"""ImageNet (ILSVRC2012) in the layout of latent-diffusion and DECU, with their file lists and label files.

    <root>/data_train/data/<synset>/*.JPEG        <root>/data_val/data/<synset>/*.JPEG
    filelist.txt                    one "<synset>/<name>.JPEG" a line; the folders are listed where it is absent
    filelist_comp{N}_binned_classes.txt           what member N sees
    index_synset.yaml               {class: synset}; the sorted synsets where it is absent
    synset_human.txt                "n01440764 tench, Tinca tinca" a line; else imagenet1000_clsidx_to_labels.txt

Source: github.com/CompVis/latent-diffusion ldm/data/imagenet.py; github.com/nwaftp23/DECU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldm.data.bins import BINNED, ClassSize, Subsets
from ldm.data.folder import FileImages, class_numbers
from ldm.data.pictures import Files, read_names
from ldm.data.plans import list_file, make_bins_command, read_list
from ldm.data.prepare.published import read_folder_plan
from ldm.files import reading

N_CLASSES = 1000
IGNORED_NAME = "n06596364_9591.JPEG"  # not a JPEG file; left out by latent-diffusion as well
TRAIN_PART = "data_train"
CONFIG_KEYS = ("size", "random_crop", "flip", "broken", "seed", "train")
LABEL_LINE = re.compile(r"^\W*(\d+)\s*:\s*(['\"])(.*)\2\W*$")


class ImageNetPart(FileImages):
    """One part of ImageNet as images [size, size, 3] in [-1, 1]: shortest side scaled to `size`, then cropped.

    Items also hold `relpath`, `synsets` (the image's synset) and `file_path_`, as published.

    Args:
        part: "data_train" or "data_val".
        process_images: whether items hold `image`; without it only labels and paths.
        data_root: folder that holds the parts.
        overwrite_root: another such folder, used instead where given (`--overwrite_data_root`).
        random_crop: crop at random rather than in the centre, unless `config` says.
        config: any of `size` (pixels, 256), `random_crop`, `flip`, `broken` ("error" or "skip"), `seed`; and `train`,
            with which DECU's files say again which part it is.
    """

    ignored_keys = (f"{IGNORED_NAME.partition('_')[0]}/{IGNORED_NAME}",)

    def __init__(
        self,
        part: str,
        process_images: bool,
        data_root: str | None,
        overwrite_root: str,
        random_crop: bool,
        config: Mapping[str, Any] | None,
    ):
        options = dict(config or {})
        if set(options) - set(CONFIG_KEYS):
            raise ValueError(f"config may hold {', '.join(CONFIG_KEYS)}, got {', '.join(sorted(map(str, options)))}")
        if options.get("train", part == TRAIN_PART) != (part == TRAIN_PART):
            raise ValueError(
                f"config says train: {options['train']}, and this is {part}: name the other class, or drop it"
            )
        if not (overwrite_root or data_root):
            raise ValueError("ImageNet needs data_root, the folder that holds data_train and data_val; got none")
        self.root = Path(overwrite_root or data_root) / part
        if not (self.root / "data").is_dir():
            raise ValueError(
                f"{self.root / 'data'} does not exist; set data_root or --overwrite_data_root, or prepare it with\n"
                "  decu data prepare --dataset imagenet --root data\n"
                "and set it to data/imagenet"
            )
        files = Files(self.root / "data")
        listed = self.root / "filelist.txt"
        relpaths = read_names(listed.read_bytes(), listed) if listed.exists() else files.images()
        relpaths = [path for path in relpaths if not path.endswith(IGNORED_NAME)]
        check_layout(relpaths, self.root / "data", f"{listed}" if listed.exists() else "")
        owners = [path.partition("/")[0] for path in relpaths]
        synsets = read_synsets(self.root / "index_synset.yaml") or sorted(set(owners))
        super().__init__(
            files,
            relpaths,
            class_numbers(owners, synsets),
            synsets,
            human_names=read_human_names(self.root, synsets),
            image_size=options.get("size", 256),
            crop="random" if options.get("random_crop", random_crop) else "center",
            flip=options.get("flip", False),
            broken=options.get("broken", "error"),
            seed=options.get("seed", 0),
        )
        self.process_images = process_images

    def item(self, index: int, draw: int = 0) -> dict[str, Any]:
        """Return image `index` of the full data set, or only its description where images are not processed."""
        return super().item(index, draw) if self.process_images else self.describe(index)

    def describe(self, index: int) -> dict[str, Any]:
        """Return everything of an item but its image."""
        facts = super().describe(index)
        path = self.root / "data" / facts["relpath"]
        return {**facts, "synsets": self.class_names[facts["class_label"]], "file_path_": str(path)}


class ImageNetTrain(ImageNetPart):
    """ImageNet's training images, or one member's list of them; random crops unless `config` says otherwise.

    Args:
        process_images: see `ImageNetPart`, like the others not named here.
        comp_numb: the member, whose `filelist_comp{N}_{dataset_name}.txt` is used; all images where not given.
        synset_bins: without a member, use the subset `filelist_{dataset_name}.txt` rather than all images.
        dataset_name: "binned_classes" or "masked_classes".

    Attributes:
        subsets: the plan in the folder (YAML, or the published pickle); None where there is none.
        bins: its {class: class_size}; empty without one.
        lists_folder: where the lists of its members are looked for.
    """

    def __init__(
        self,
        process_images: bool = True,
        data_root: str | None = None,
        overwrite_root: str = "",
        comp_numb: int | None = None,
        synset_bins: bool = False,
        config: Mapping[str, Any] | None = None,
        dataset_name: str = BINNED,
    ):
        super().__init__(TRAIN_PART, process_images, data_root, overwrite_root, True, config)
        self.lists_folder = self.root
        self.subsets: Subsets | None = None
        self.bins: dict[int, ClassSize] = {}
        if comp_numb is None and not synset_bins:
            return
        config = {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"data_root": str(self.root.parent)}}
        path = list_file(self.root, dataset_name, comp_numb)
        if not path.exists():
            command = make_bins_command(self.root, dataset_name, comp_numb, config)
            raise ValueError(f"{path} does not exist; make it with: {command}")
        self.subsets = read_folder_plan(self.root, dataset_name, comp_numb, self, config)
        self.bins = self.subsets.bins if self.subsets is not None else {}
        self.select(read_list(path, self))


class ImageNetValidation(ImageNetPart):
    """ImageNet's 50,000 validation images; centre crops unless `config` says otherwise. Arguments: `ImageNetPart`."""

    def __init__(
        self,
        process_images: bool = True,
        data_root: str | None = None,
        overwrite_root: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__("data_val", process_images, data_root, overwrite_root, False, config)


def check_layout(relpaths: Sequence[str], folder: Path, listed: str) -> None:
    """Make sure that images lie in one folder for each synset, and that a list names files that are there.

    Args:
        relpaths: of the images, below `folder`.
        folder: the part's `data`.
        listed: the file that named them; "": the folder did.

    Raises:
        ValueError: naming an image that lies higher or deeper, or is not there.
    """
    odd = next((path for path in relpaths if path.count("/") != 1), None)
    if odd is not None:
        hint = ""
        if "/" not in odd:
            hint = "; the published archive of validation images is flat, and `decu data prepare` sorts it into classes"
        raise ValueError(
            f"images of ImageNet lie in {folder}/SYNSET/NAME.JPEG, one folder a class, and {listed or 'there'} is "
            f"'{odd}', {'without a' if '/' not in odd else 'in more than one'} folder{hint}"
        )
    by_name = not any(folder.iterdir())  # plans are made of lists alone as well
    ends = [path for path in (*relpaths[:1], *relpaths[-1:]) if listed and not (by_name or (folder / path).is_file())]
    if ends or not relpaths:
        found = f"'{ends[0]}', which is not in {folder}" if ends else "no image"
        raise ValueError(
            f"{listed} names {found}: one SYNSET/NAME.JPEG a line is expected; write it again or remove it"
        )


def read_synsets(path: Path) -> list[str] | None:
    """Return the synsets in the order of their classes from `index_synset.yaml`, None where it is absent.

    Raises:
        ValueError: unless it maps 0..n-1 to different synsets.
    """
    if not path.exists():
        return None
    with reading(path, "a list of synsets by class", "fetch it again, or remove it"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or sorted(content) != list(range(len(content))):
        raise ValueError(f"{path} must map the classes 0, 1, ... to synsets, got {type(content).__name__}")
    synsets = [str(content[label]) for label in range(len(content))]
    if len(set(synsets)) < len(synsets):
        raise ValueError(f"{path} names a synset twice; each class needs its own")
    return synsets


def read_human_names(root: Path, synsets: list[str]) -> list[str]:
    """Return a readable name for each synset, from the published label files where they are present."""
    human = root / "synset_human.txt"
    numbered = root / "imagenet1000_clsidx_to_labels.txt"
    if human.exists():
        with reading(human, "the names of synsets", "fetch it again, or remove it"):
            lines = human.read_text(encoding="utf-8").splitlines()
        names = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
        return [names.get(synset, synset) for synset in synsets]
    if numbered.exists() and len(synsets) == N_CLASSES:
        with reading(numbered, "the names of classes", "fetch it again, or remove it"):
            found = [LABEL_LINE.match(line) for line in numbered.read_text(encoding="utf-8").splitlines()]
        names = {int(match[1]): match[3] for match in found if match}
        return [names.get(label, synset) for label, synset in enumerate(synsets)]
    return list(synsets)
