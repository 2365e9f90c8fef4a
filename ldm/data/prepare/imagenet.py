"""ILSVRC2012's published tars, unpacked into the layout that `ldm.data.imagenet` reads."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

import yaml
from scipy.io import loadmat
from tqdm import tqdm

from ldm.data.prepare.archives import tar_entries, unpack, write_entries
from ldm.data.prepare.download import find_fault
from ldm.files import reading
from ldm.util import atomic_write

TRAIN_TAR, VAL_TAR, DEVKIT = TARS = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
MD5 = {
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
LOGIN = """ImageNet may be fetched only after a login, so this script does not fetch it. Please
  1. sign in at https://image-net.org and accept its terms,
  2. download, from the ILSVRC2012 page, {missing}
  3. put them into {folder}
and run this command again; it verifies and unpacks them. (--url MIRROR fetches them from a mirror of yours.)"""


def unpack_imagenet(folder: str | Path, verify: bool = True) -> list[Path]:
    """Unpack the tars in `folder` into data_train and data_val there, with file lists and label files.

    A part whose `filelist.txt` exists is finished and is left alone; other existing files are kept.

    Args:
        folder: holds the three published tars, and receives the parts.
        verify: check the tars' md5 first (the training one takes minutes).

    Returns:
        the two file lists.

    Raises:
        ValueError: if a tar is missing (with where to get it), is not the published file, or does not fit the labels.
    """
    folder = Path(folder)
    lists = [folder / part / "filelist.txt" for part in ("data_train", "data_val")]
    if all(path.exists() for path in lists):
        return lists
    missing = [name for name in TARS if not (folder / name).exists()]
    if missing:
        raise ValueError(LOGIN.format(missing=", ".join(missing), folder=folder))
    for name in TARS if verify else ():
        fault = find_fault(folder / name, None, MD5[name])
        if fault:
            raise ValueError(f"{folder / name} is not the published file: {fault}; move it away and fetch it again")
    unpack(folder / DEVKIT, folder / "devkit")
    human, truth = read_devkit(folder / "devkit")
    if not lists[0].exists():
        label_files(lists[0].parent, human)
        unpack_train(folder / TRAIN_TAR, lists[0].parent / "data", set(human))
        write_list(lists[0])
    if not lists[1].exists():
        label_files(lists[1].parent, human)
        unpack_validation(folder / VAL_TAR, lists[1].parent / "data", truth)
        write_list(lists[1])
    return lists


def read_devkit(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return {synset: readable name} of the classes, and the synset of each validation image in its order.

    Raises:
        ValueError: if the devkit's files are missing.
    """
    found = {name: next(folder.rglob(name), None) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}; is {DEVKIT} the published one?")
    meta, listed = found["meta.mat"], found["ILSVRC2012_validation_ground_truth.txt"]
    with reading(meta, "the devkit's table of classes", f"unpack {DEVKIT} again"):
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        human = {str(row["WNID"]): str(row["words"]) for row in leaves}
    with reading(listed, "the devkit's classes of the validation images", f"unpack {DEVKIT} again"):
        truth = [by_number[int(line)] for line in listed.read_text().split()]
    return dict(sorted(human.items())), truth


def label_files(part: Path, human: dict[str, str]) -> None:
    """Write `index_synset.yaml` and `synset_human.txt`, where they are absent; classes are the sorted synsets."""
    keep_or_write(part / "index_synset.yaml", yaml.safe_dump(dict(enumerate(human))))
    keep_or_write(part / "synset_human.txt", "".join(f"{synset} {name}\n" for synset, name in human.items()))


def keep_or_write(path: Path, text: str) -> None:
    """Write a text file unless it exists."""
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(text)


def unpack_train(archive: Path, folder: Path, synsets: set[str]) -> None:
    """Unpack a tar of one tar a class, `<synset>.tar`, into class folders.

    Raises:
        ValueError: if it does not hold exactly the classes.
    """
    with tarfile.open(archive) as outer:
        inner = {PurePosixPath(name).stem: source for name, _, source in tar_entries(outer)}
        if set(inner) != synsets:
            raise ValueError(f"{archive} must hold the {len(synsets)} classes of the devkit, got {len(inner)} others")
        for synset, source in tqdm(inner.items(), desc=archive.name, unit="class"):
            with source() as stream, tarfile.open(fileobj=stream) as classes:
                write_entries(list(tar_entries(classes)), folder / synset, synset)


def unpack_validation(archive: Path, folder: Path, truth: list[str]) -> None:
    """Unpack the validation images, in the order of their names, into the folders of their synsets.

    Raises:
        ValueError: if there is not one label for each image.
    """
    with tarfile.open(archive) as content:
        entries = sorted(tar_entries(content), key=lambda entry: entry[0])
        if len(entries) != len(truth):
            raise ValueError(f"{archive} holds {len(entries)} images, the devkit {len(truth)} labels; they must agree")
        placed = [
            (f"{synset}/{PurePosixPath(name).name}", size, source)
            for (name, size, source), synset in zip(entries, truth, strict=True)
        ]
        write_entries(placed, folder, archive.name)


def write_list(path: Path) -> None:
    """Write the file list of a part: "<synset>/<name>" a line, sorted."""
    data = path.parent / "data"
    names = sorted(file.relative_to(data).as_posix() for file in data.glob("*/*.JPEG"))
    keep_or_write(path, "".join(f"{name}\n" for name in names))
