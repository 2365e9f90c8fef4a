"""Subset plans on disk, as text that a person can read.

    subsets_binned_classes.yaml         bins, members, and how they were drawn
    filelist_binned_classes.txt         the subset, one sample a line: index, or relpath where the data set has files
    filelist_comp0_binned_classes.txt   what member 0 sees; a bootstrap repeats lines

The file names are DECU's (github.com/nwaftp23/DECU); the draws are those of `ldm.data.bins`.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from ldm.arguments import check_value
from ldm.data.base import check_choice
from ldm.data.bins import BINNED, DATASET_NAMES, MASKED, Subsets, class_size_order
from ldm.data.pictures import read_names
from ldm.data.plan_words import make_bins_command as make_bins_command
from ldm.data.plan_words import pickle_file as pickle_file
from ldm.data.plan_words import plan_words as plan_words
from ldm.files import read_mapping, reading
from ldm.ranges import COUNT, check_range
from ldm.trust import accept, trusting
from ldm.util import atomic_write

_FORMAT = 1
_SUMS = "lists_sha256"
# What a plan's keys hold; what is absent is None.
_KINDS: dict[str, Any] = {
    "dataset_name": str,
    "dataset": Mapping[str, Any] | None,
    "images": int,
    "components": int,
    "seed": int | None,
    "rotation": int | None,
    "bootstrap": bool | None,
    "bins": Mapping[int | str, Sequence[int]],
    "sees": Mapping[int, Sequence[int]] | None,
    "class_names": Sequence[str],
    _SUMS: Mapping[str, str] | None,
}


def subsets_file(folder: str | Path, dataset_name: str) -> Path:
    """Path of the YAML file of a plan."""
    check_choice("dataset_name", dataset_name, DATASET_NAMES)
    return Path(folder) / f"subsets_{dataset_name}.yaml"


def list_file(folder: str | Path, dataset_name: str, member: int | None = None) -> Path:
    """Path of the list of samples of a member, or of the subset without bootstrap."""
    check_choice("dataset_name", dataset_name, DATASET_NAMES)
    prefix = "" if member is None else f"comp{member}_"
    return Path(folder) / f"filelist_{prefix}{dataset_name}.txt"


def sample_keys(dataset: Dataset) -> list[str]:
    """Return what names each image of the full data set in a list: its relpath, or its index."""
    relpaths = getattr(dataset, "relpaths", None)
    return list(relpaths) if relpaths is not None else [str(index) for index in range(len(dataset))]


def write_subsets(
    folder: str | Path,
    subsets: Subsets,
    keys: list[str],
    dataset: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    keep: Collection[Path] = (),
) -> list[Path]:
    """Write a plan and its lists, each file whole or not at all; return their paths.

    Args:
        folder: where; made if need be.
        subsets: a plan of `plan_binned` or `plan_masked`.
        keys: name of each image of the full data set (`sample_keys`), [N].
        dataset: `target`/`params` of the data set, kept for the reader.
        overwrite: replace files whose content differs.
        keep: lists that are left as they are.

    Raises:
        ValueError: if a file exists with other content and `overwrite` is off; then nothing is written.
    """
    contents = {
        list_file(folder, subsets.dataset_name, member): "".join(f"{keys[one]}\n" for one in positions.tolist())
        for member, positions in subsets.positions.items()
        if list_file(folder, subsets.dataset_name, member) not in keep
    }
    sums = {path.name: hashlib.sha256(text.encode()).hexdigest() for path, text in contents.items()}
    contents[subsets_file(folder, subsets.dataset_name)] = to_yaml(subsets, dataset, sums)
    earlier = to_yaml(subsets, dataset)  # as it was written before it had sums
    changed = [
        path
        for path, text in contents.items()
        if path.exists() and path.read_bytes() not in (text.encode(), earlier.encode())
    ]
    if changed and not overwrite:
        raise ValueError(
            f"{folder} already holds other subsets ({', '.join(path.name for path in changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}); choose another folder or pass --overwrite (overwrite=True)"
        )
    for path, text in contents.items():
        with atomic_write(path, overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(contents)


def to_yaml(subsets: Subsets, dataset: Mapping[str, Any] | None, sums: Mapping[str, str] | None = None) -> str:
    """Return the YAML text of a plan, with the sha256 of its lists by name; `read_subsets` is its inverse."""
    content: dict[str, Any] = {"format": _FORMAT, "dataset_name": subsets.dataset_name}
    if dataset is not None:
        content["dataset"] = {"target": dataset["target"], "params": dict(dataset.get("params") or {})}
    content |= {"images": subsets.images, "components": subsets.members, **subsets.record}
    class_sizes = sorted(set(subsets.bins.values()), key=class_size_order)
    content["bins"] = {
        one: [label for label, class_size in subsets.bins.items() if class_size == one] for one in class_sizes
    }
    if subsets.dataset_name == MASKED:
        content["sees"] = subsets.sees
    content["class_names"] = subsets.class_names
    content |= {} if sums is None else {_SUMS: dict(sums)}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def read_subsets(folder: str | Path, dataset_name: str = BINNED) -> Subsets:
    """Read the plan in `folder`, without its lists.

    Raises:
        ValueError: if the file is missing, is not a plan of this format, or names a class that is not known
            (`ldm.trust`).
    """
    path = subsets_file(folder, dataset_name)
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with: {make_bins_command(folder, dataset_name)}")
    content = read_mapping(path, "a plan of subsets", "write it again with `decu data bins`")
    content |= accept({key: content[key] for key in ("dataset",) if key in content}, path)
    if content.get("format") != _FORMAT:
        found = content.get("format")
        raise ValueError(
            f"{path} must be a mapping with format: {_FORMAT}, got {found}; write it again with `decu data bins`"
        )
    absent = {"dataset_name", "images", "components", "bins", "class_names"} - set(content)
    if absent:
        raise ValueError(f"{path} lacks {', '.join(sorted(absent))}; write it again with `decu data bins`")
    for key, kind in _KINDS.items():
        check_value(content.get(key), kind, f"{path}: {key}")
    for key in ("images", "components"):
        check_range(key, content[key], {key: COUNT}, f"{path}: {key}")
    if content["dataset_name"] != dataset_name:
        raise ValueError(f"{path} is a plan of {content['dataset_name']}; write it again with `decu data bins`")
    del content["format"]
    content.pop(_SUMS, None)
    names = content.pop("class_names")
    members = content.pop("components")
    with reading(path, "a plan of subsets", "write it again with `decu data bins`"):
        listed = [(label, size) for size, classes in content.pop("bins").items() for label in classes]
        bins = dict(listed)
        complete = sorted(label for label, _ in listed) == list(range(len(names)))
        sorted(bins.values(), key=class_size_order)
        every = {one: list(range(len(names))) for one in range(members)}
        sees = {
            int(member): list(map(int, classes)) for member, classes in (content.pop("sees", None) or every).items()
        }
    if not complete:
        raise ValueError(f"{path}: the bins must name each of the classes 0..{len(names) - 1} once; write it again")
    return Subsets(
        dataset_name=content.pop("dataset_name"),
        class_names=names,
        images=content.pop("images"),
        members=members,
        bins=dict(sorted(bins.items())),
        sees=sees,
        record=content,
    )


def read_list(path: Path, dataset: Dataset) -> Tensor:
    """Return the positions in `dataset` of the samples a list names, in its order, repeats included, int64 [K].

    Samples in the data set's `ignored_keys`, if it has any, are left out.

    Raises:
        ValueError: if the list is empty or names a sample that the data set does not have.
    """
    place = {key: index for index, key in enumerate(sample_keys(dataset))}
    ignored = getattr(dataset, "ignored_keys", ())
    lines = [line for line in read_names(path.read_bytes(), path) if line not in ignored]
    unknown = [line for line in lines if line not in place]
    if unknown or not lines:
        found = f"{len(unknown)} unknown ones, the first '{unknown[0]}'" if unknown else "none"
        raise ValueError(
            f"{path} must name samples of {type(dataset).__name__} ({len(place)} samples, such as "
            f"'{next(iter(place), '')}'), got {found}; was it made for another data set or split?"
        )
    return torch.tensor([place[line] for line in lines], dtype=torch.int64)


def read_member_subset(
    folder: str | Path,
    dataset_name: str,
    member: int | None,
    dataset: Dataset,
    config: Mapping[str, Any] | None = None,
) -> tuple[Subsets, Tensor]:
    """Return the plan in `folder` and the positions in `dataset` that a member sees, int64 [K].

    Args:
        folder: folder that `decu data bins` wrote.
        dataset_name: "binned_classes" or "masked_classes".
        member: its number; None for the subset without bootstrap.
        dataset: the full data set.
        config: its `target`/`params`, for the command named in an error.

    Raises:
        ValueError: if a file is missing (with the command that makes it), or was made for other data.
    """
    subsets = read_plan(folder, dataset_name, member, dataset, config)
    listed = list_file(folder, dataset_name, member)
    if not listed.exists():
        command = make_bins_command(folder, dataset_name, member, config)
        raise ValueError(f"{listed} does not exist; make it with: {command} --seed {subsets.record.get('seed', 0)}")
    positions = read_list(listed, dataset)
    expected = (read_mapping(subsets_file(folder, dataset_name), "a plan of subsets").get(_SUMS) or {}).get(listed.name)
    if expected is not None and expected != hashlib.sha256(listed.read_bytes()).hexdigest():
        more = shlex.join([*shlex.split(make_bins_command(folder, dataset_name, member, config)), *plan_words(subsets)])
        raise ValueError(
            f"{listed} is not the list that {subsets_file(folder, dataset_name)} was written with (sha256): it was cut "
            f"off, changed, or drawn by another call; draw it again with: {more} --overwrite"
        )
    return subsets, positions


def _own_modules(dataset: Any) -> set[str]:
    """Return the modules of a data set's class, and of those that it wraps."""
    return {type(dataset).__module__, *(_own_modules(dataset.dataset) if hasattr(dataset, "dataset") else ())}


def read_plan(
    folder: str | Path,
    dataset_name: str,
    member: int | None,
    dataset: Dataset,
    config: Mapping[str, Any] | None = None,
) -> Subsets:
    """Return the plan in `folder`, once it is known to be of this data set and to have this member.

    Arguments and errors are those of `read_member_subset`.
    """
    command = make_bins_command(folder, dataset_name, member, config)
    if not subsets_file(folder, dataset_name).exists():
        raise ValueError(f"{subsets_file(folder, dataset_name)} does not exist; make it with: {command}")
    with trusting(_own_modules(dataset)):  # what the caller has built already, the plan may name
        subsets = read_subsets(folder, dataset_name)
    if member is not None and not 0 <= member < subsets.members:
        more = shlex.join([*shlex.split(command), *plan_words(subsets), "--overwrite"])
        raise ValueError(
            f"component must lie in 0..{subsets.members - 1}, the members of {folder}, got {member}; draw more "
            f"lists, which leaves those that there are as they are, with: {more}"
        )
    if (subsets.images, subsets.class_names) != (len(dataset), list(dataset.class_names)):
        raise ValueError(
            f"{folder} was made for {subsets.images} images of {len(subsets.class_names)} classes, got a data set of "
            f"{len(dataset)} images of {dataset.n_classes} classes, or of other names; make a folder with\n  {command}"
        )
    return subsets
