"""Published subset files, DECU's pickles and file lists, as plans of `ldm.data.bins`.

    subsets_binned_classes.pkl      {1 | 10 | 100 | 1300: [synset, ...]}, 1300 standing for all images of a class
    subsets_masked_classes.pkl      {member: [synsets that it saw]}
    filelist_comp{N}_*_classes.txt  what member N saw, where it was published too

Source: github.com/nwaftp23/DECU. Pickles are read without running what they name (`ldm.data.safe_pickle`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoint import sha256
from ldm.data.base import by_class
from ldm.data.bins import ALL, DATASET_NAMES, MASKED, ClassSize, Subsets, binned_indices, draw_bootstrap
from ldm.data.plans import list_file, pickle_file, read_list, read_plan, read_subsets, subsets_file
from ldm.data.safe_pickle import load_plain

ALL_IMAGES = 1300  # the bin of the published subsets that stands for all images (732 to 1300 a class)
COMPONENTS = 5  # members of a published binned plan without lists


def parse_dataset_name(path: str | Path) -> str | None:
    """Return which of DATASET_NAMES a pickle's file name says, None where it says neither."""
    return next((name for name in DATASET_NAMES if Path(path).name == pickle_file("", name).name), None)


def subsets_from_pickle(path: str | Path) -> dict[int, list[str]]:
    """Read a published subsets pickle, {bin or member: [synset, ...]}, without running anything it names.

    Raises:
        ValueError: if it holds anything but a dict of integers to lists of strings.
    """
    content = load_plain(path)
    plain = isinstance(content, dict) and all(
        isinstance(key, int) and isinstance(value, list) and all(isinstance(one, str) for one in value)
        for key, value in content.items()
    )
    if not plain:
        raise ValueError(f"{path} must hold {{integer: [synset, ...]}}, got {type(content).__name__} of something else")
    return content


def parse_bins(subsets: Mapping[int, Sequence[str]], class_names: Sequence[str]) -> dict[int, ClassSize]:
    """Return {class: class_size} of published bins; the bin 1300 means all images.

    Raises:
        ValueError: unless the bins name every class once, and no other.
    """
    named = [name for names in subsets.values() for name in names]
    faults = {
        "unknown": set(named) - set(class_names),
        "missing": set(class_names) - set(named),
        "named twice": {name for name, count in Counter(named).items() if count > 1},
    }
    if any(faults.values()) or any(class_size < 1 for class_size in subsets):
        said = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in faults.items() if names)
        raise ValueError(
            f"published bins must name each of the data set's {len(class_names)} classes once, under a number of "
            f"images (1, 10, 100, ...); got bins {sorted(subsets)}" + (f" with {said}" if said else "")
        )
    class_sizes = {
        name: ALL if class_size == ALL_IMAGES else class_size for class_size, names in subsets.items() for name in names
    }
    return {label: class_sizes[name] for label, name in enumerate(class_names)}


def parse_seen_classes(subsets: Mapping[int, Sequence[str]], class_names: Sequence[str]) -> dict[int, list[int]]:
    """Return {member: classes it saw} of published masks.

    Raises:
        ValueError: unless the members are 0, 1, ... and every name is one of a class.
    """
    if not subsets or sorted(subsets) != list(range(len(subsets))):
        raise ValueError(f"published masks must be of the members 0, 1, ...; got {sorted(subsets)}")
    place = {name: label for label, name in enumerate(class_names)}
    unknown = {name for names in subsets.values() for name in names} - set(place)
    if unknown:
        raise ValueError(
            f"published masks must name classes of the data set ({len(place)}, such as {class_names[0]}); "
            f"got {len(unknown)} unknown ones, such as {min(unknown)}"
        )
    return {one: sorted({place[name] for name in subsets[one]}) for one in sorted(subsets)}


def published_plan(
    path: str | Path, dataset_name: str, class_names: Sequence[str], images: int, members: int | None = None
) -> Subsets:
    """Return the plan of a published pickle, without lists.

    Args:
        path: the pickle.
        dataset_name: "binned_classes" or "masked_classes".
        class_names: names of the data set's classes, as the pickle gives them (synsets).
        images: number of images of the full data set.
        members: members of a binned plan; where not given one for each list beside the pickle, or five.

    Raises:
        ValueError: if it is no such pickle, or of other classes, or its masks are of another number of members.
    """
    content = subsets_from_pickle(path)
    if dataset_name == MASKED:
        sees = parse_seen_classes(content, class_names)
        bins: dict[int, ClassSize] = dict.fromkeys(range(len(class_names)), ALL)
        if members not in (None, len(sees)):
            raise ValueError(f"{path} holds the masks of {len(sees)} members, got members={members}")
    else:
        bins = parse_bins(content, class_names)
        listed = [one for one in published_lists(Path(path).parent, dataset_name) if one is not None]
        count = members or (max(listed) + 1 if listed else COMPONENTS)
        everything = list(range(len(class_names)))
        sees = dict.fromkeys(range(count), everything)
    record = {"source": Path(path).name, "sha256": sha256(path)}
    return Subsets(dataset_name, list(class_names), images, len(sees), bins, sees, record)


def published_lists(folder: str | Path, dataset_name: str) -> dict[int | None, Path]:
    """Return {member: its list} of the lists in a folder, None standing for the subset without bootstrap.

    Where a plan made from the pickle lies there too, those lists are left out that were drawn for it.
    """
    folder = Path(folder)
    start, end = list_file("", dataset_name, 0).name.split("0", 1)
    numbers = [path.name.removeprefix(start).removesuffix(end) for path in folder.glob(f"{start}*{end}")]
    members: list[int | None] = [None, *sorted(int(number) for number in numbers if number.isdigit())]
    if subsets_file(folder, dataset_name).exists():
        given = read_subsets(folder, dataset_name).record.get("published_lists", [])
        members = [one for one in members if one in given]
    files = {one: list_file(folder, dataset_name, one) for one in members}
    return {one: file for one, file in files.items() if file.exists()}


def read_folder_plan(
    folder: str | Path, dataset_name: str, member: int | None, dataset: Dataset, config: Mapping[str, Any]
) -> Subsets | None:
    """Return the plan in a folder: the YAML of `decu data bins`, else the published pickle's; None without both.

    Arguments and errors are those of `ldm.data.subsets.read_plan`.
    """
    if subsets_file(folder, dataset_name).exists():
        return read_plan(folder, dataset_name, member, dataset, config)
    path = pickle_file(folder, dataset_name)
    return published_plan(path, dataset_name, dataset.class_names, len(dataset)) if path.exists() else None


def plan_published(
    path: str | Path,
    dataset: Dataset,
    dataset_name: str | None = None,
    members: int | None = None,
    seed: int = 0,
    resample: bool = True,
) -> Subsets:
    """Return the plan of a published pickle with its lists: those that lie beside it, the missing ones drawn.

    The subset without bootstrap is its own list where that lies there, else what the members' lists name together,
    else drawn from the bins like that of `plan_binned`.

    Args:
        path: the pickle.
        dataset: the full data set.
        dataset_name: "binned_classes" or "masked_classes"; by the file's name where not given.
        members: members of a binned plan, see `published_plan`.
        seed: seed of what is drawn.
        resample: bootstrap the lists that are drawn.

    Raises:
        ValueError: if the pickle does not fit the data set, or the lists do not fit the pickle.
    """
    kind = dataset_name or parse_dataset_name(path)
    if kind is None:
        raise ValueError(f"the name of {path} says neither of {', '.join(DATASET_NAMES)}; say which (--dataset)")
    plan = published_plan(path, kind, dataset.class_names, len(dataset), members)
    files = published_lists(Path(path).parent, kind)
    lists = {one: read_list(file, dataset) for one, file in files.items() if one is None or one < plan.members}
    check_lists(plan, lists, dataset.labels)
    record = {**plan.record, "seed": seed, "bootstrap": resample, "published_lists": list(lists)}
    return replace(plan, record=record, positions=complete_lists(plan, lists, dataset.labels, seed, resample))


def complete_lists(
    plan: Subsets, lists: Mapping[int | None, Tensor], labels: Tensor, seed: int, resample: bool
) -> dict[int | None, Tensor]:
    """Return the lists of a plan: the given ones, and the others drawn; see `plan_published`."""
    if None in lists:
        whole = lists[None]
    elif lists:
        whole = torch.cat(list(lists.values())).unique()
    else:
        whole = binned_indices(labels, plan.bins, seed)
    found: dict[int | None, Tensor] = {None: whole}
    for one, classes in plan.sees.items():
        inside = whole[torch.isin(labels[whole], torch.tensor(classes))]
        found[one] = lists[one] if one in lists else draw_bootstrap(inside, labels, seed, one) if resample else inside
    return found


def check_lists(plan: Subsets, lists: Mapping[int | None, Tensor], labels: Tensor) -> None:
    """Check published lists against the plan: no more images of a class than its class_size, none that are hidden.

    Raises:
        ValueError: naming the first class that does not fit; DECU ships two pickles of different bins.
    """
    if not lists:
        return
    for label, places in by_class(labels[torch.cat(list(lists.values())).unique()]).items():
        if plan.bins[label] != ALL and len(places) > plan.bins[label]:
            raise ValueError(
                f"the lists name {len(places)} images of class {plan.class_names[label]}, its bin in "
                f"{plan.record['source']} is {plan.bins[label]}: they are of different splits; "
                "use the pickle that they were made with, or move the lists away to have new ones drawn"
            )
    for member, classes in plan.sees.items():
        if member in lists:
            shown = set(labels[lists[member]].tolist()) - set(classes)
            if shown:
                raise ValueError(
                    f"the list of member {member} names images of class {plan.class_names[min(shown)]}, which "
                    f"{plan.record['source']} hides from it: they are of different splits"
                )
