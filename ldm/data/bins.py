"""Which images each member of an ensemble sees: class_sizes per class, classes hidden from members, bootstraps.

`plan_binned` and `plan_masked` draw a plan; `ldm.data.subsets` keeps plans on disk and trains on them.
All draws come from generators named by (seed, class, member): nothing depends on the order of the calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.data.base import by_class
from ldm.ensembles.classes import MASKED, class_size_order
from ldm.util import generator

ClassSize = int | str  # images of a class, or "all"

ALL = "all"
BINNED = "binned_classes"
DATASET_NAMES = (BINNED, MASKED)


@dataclass(frozen=True)
class Subsets:
    """A plan: which classes have which class_size, which member sees which classes, and the lists drawn from it.

    Attributes:
        dataset_name: "binned_classes" or "masked_classes".
        class_names: names of the data set's classes.
        images: number of images of the full data set.
        members: how many members there are.
        bins: {class: class_size}; every class at "all" in a masked plan.
        sees: {member: its classes}; every class in a binned plan.
        record: how it was drawn (seed, rotation, bootstrap, ...) and from which data set, as kept on disk.
        positions: {member: positions in the full data set}, None standing for the subset without bootstrap;
            empty for a plan read from disk.
    """

    dataset_name: str
    class_names: list[str]
    images: int
    members: int
    bins: dict[int, ClassSize]
    sees: dict[int, list[int]]
    record: dict[str, Any] = field(default_factory=dict)
    positions: dict[int | None, Tensor] = field(default_factory=dict)

    def seen_by(self, label: int) -> list[int]:
        """Return the members that see class `label`."""
        return [member for member, classes in self.sees.items() if label in classes]


def has_default_bins(n_classes: int) -> bool:
    """Whether there is a convention for the bins of so many classes."""
    return n_classes == 10 or n_classes >= 100


def default_classes_per_bin(n_classes: int) -> dict[ClassSize, int]:
    """Return {class size: number of classes}.

    Ten classes have 3/2/2/3 at 1/10/50/all images, any other number 10/10/10/70 % at 1/10/100/all.

    Raises:
        ValueError: for fewer than 100 classes that are not ten, for which there is no convention.
    """
    if n_classes == 10:
        return {1: 3, 10: 2, 50: 2, ALL: 3}
    if not has_default_bins(n_classes):
        raise ValueError(
            f"no default bins for {n_classes} classes (there are for 10, and for 100 or more): "
            "say how many classes each class_size has, for example --classes_per_bin 1:3 10:2 all:3, or leave the "
            "classes as they are with --natural"
        )
    tenth = n_classes // 10
    return {1: tenth, 10: tenth, 100: tenth, ALL: n_classes - 3 * tenth}


def assign_bins(
    n_classes: int, classes_per_bin: Mapping[ClassSize, int], seed: int, rotation: int = 0
) -> dict[int, ClassSize]:
    """Return {class: class_size}: a seeded order of the classes is cut into the bins.

    Each `rotation` moves every class on by the size of the smallest bin, round the end. So no class jumps over a bin,
    and ceil(n_classes / smallest bin) rotations show every class at every class_size.

    Raises:
        ValueError: unless the counts add up to `n_classes` and the class_sizes are positive or "all".
    """
    for class_size, count in classes_per_bin.items():
        if not (class_size == ALL or (isinstance(class_size, int) and class_size > 0)) or count < 1:
            raise ValueError(
                f"a bin needs a class_size of 1 or more, or 'all', and 1 or more classes; got {class_size}:{count}"
            )
    total = sum(classes_per_bin.values())
    if total != n_classes:
        raise ValueError(f"the bins must hold all {n_classes} classes, got {total}: {dict(classes_per_bin)}")
    slots = [
        class_size
        for class_size in sorted(classes_per_bin, key=class_size_order)
        for _ in range(classes_per_bin[class_size])
    ]
    shift = rotation * min(classes_per_bin.values())
    order = torch.randperm(n_classes, generator=generator("bins", seed)).tolist()
    return {label: slots[(place + shift) % n_classes] for place, label in sorted(enumerate(order), key=lambda x: x[1])}


def binned_indices(
    labels: Tensor, class_sizes: Mapping[int, ClassSize], seed: int, names: Sequence[str] = ()
) -> Tensor:
    """Return the positions of the images within class_size, class after class.

    Nested: the order of a class's images depends on (seed, class) only, and a class_size takes the first of them.

    Args:
        labels: class of each image, [N].
        class_sizes: {class: class_size}; classes that are not named have no images.
        seed: seed of the order.
        names: of the classes, for the error; none where there are none.

    Raises:
        ValueError: if a class has fewer images than its class_size.
    """
    chosen = []
    places, none = by_class(labels), torch.zeros(0, dtype=torch.int64)
    for label in sorted(class_sizes):
        images = places.get(label, none)
        wanted = len(images) if class_sizes[label] == ALL else int(class_sizes[label])
        if not 0 < wanted <= len(images):
            name = names[label] if names else label
            raise ValueError(
                f"class {name} has {len(images)} images, its class_size is {class_sizes[label]}: "
                "choose a smaller class_size, or 'all' for a class that has images"
            )
        order = torch.randperm(len(images), generator=generator("images", seed, label))
        chosen.append(images[order[:wanted]])
    return torch.cat([none, *chosen])


def draw_bootstrap(indices: Tensor, labels: Tensor, seed: int, member: int) -> Tensor:
    """Draw from `indices` with replacement within each class, so that every class keeps its number of images.

    Args:
        indices: positions to draw from, [K].
        labels: class of each image of the full data set, [N].
        seed: seed of the draw, with `member` and the class.
        member: number of the member.
    """
    drawn = indices.clone()
    for label, places in by_class(labels[indices]).items():
        source = generator("bootstrap", seed, member, label)
        drawn[places] = indices[places[torch.randint(len(places), (len(places),), generator=source)]]
    return drawn


def assign_masks(
    n_classes: int, members: int, hidden_from: int, seed: int, only: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Return {member: classes it sees}: each class is hidden from `hidden_from` members, drawn at random.

    Balanced: the numbers of classes hidden from two members differ by at most one. With `only` only these classes
    are hidden, and all members see the others.

    Raises:
        ValueError: unless 1 <= hidden_from < members.
    """
    if not 1 <= hidden_from < members:
        raise ValueError(f"hidden_from must lie between 1 and {members - 1} for {members} members, got {hidden_from}")
    source = generator("masks", seed)
    hidden: dict[int, set[int]] = {member: set() for member in range(members)}
    for label in torch.randperm(n_classes, generator=source).tolist():
        if only is not None and label not in only:
            continue
        order = torch.randperm(members, generator=source).tolist()
        for member in sorted(order, key=lambda one: len(hidden[one]))[:hidden_from]:
            hidden[member].add(label)
    return {one: sorted(set(range(n_classes)) - missing) for one, missing in hidden.items()}


def plan_binned(
    labels: Tensor,
    class_names: Sequence[str],
    classes_per_bin: Mapping[ClassSize, int] | None = None,
    members: int = 5,
    seed: int = 0,
    rotation: int = 0,
    resample: bool = True,
    named: Mapping[str, ClassSize] | None = None,
) -> Subsets:
    """Plan binned classes: class sizes of `assign_bins`, and for each member a bootstrap (or all of it).

    Args:
        named: {name: class size} of classes that are not drawn; the others are drawn by `classes_per_bin`, or keep
            all their images where it is None.

    Raises:
        ValueError: for a name that no class has, or that several have, and as `assign_bins` and `binned_indices`.
    """
    record: dict[str, Any] = {"seed": seed, "rotation": rotation, "bootstrap": resample}
    if not named:
        counts = dict(classes_per_bin or default_classes_per_bin(len(class_names)))
        bins = assign_bins(len(class_names), counts, seed, rotation)
    else:
        bins = _assign_named(class_names, named, classes_per_bin, seed, rotation)
        record["named"] = dict(named)
    kept = binned_indices(labels, bins, seed, class_names)
    return _plan_members(labels, class_names, bins, kept, members, record)


def _assign_named(
    class_names: Sequence[str],
    named: Mapping[str, ClassSize],
    classes_per_bin: Mapping[ClassSize, int] | None,
    seed: int,
    rotation: int,
) -> dict[int, ClassSize]:
    """Return {class: class size}: those of named classes as given, those of the others drawn."""
    wrong = [name for name in named if list(class_names).count(name) != 1]
    if wrong:
        known = ", ".join(class_names[:12]) + (", .." if len(class_names) > 12 else "")
        raise ValueError(f"no class, or more than one, is called '{wrong[0]}'; the names are {known}")
    fixed = {list(class_names).index(name): size for name, size in named.items()}
    others = [label for label in range(len(class_names)) if label not in fixed]
    if not others:
        return dict(sorted(fixed.items()))
    drawn = assign_bins(len(others), classes_per_bin or {ALL: len(others)}, seed, rotation)
    return dict(sorted({**fixed, **{others[place]: size for place, size in drawn.items()}}.items()))


def plan_natural(
    labels: Tensor, class_names: Sequence[str], members: int = 5, seed: int = 0, resample: bool = True
) -> Subsets:
    """Plan classes as they are: each has its own number of images, and each member a bootstrap of all of them.

    A class without images stays without. The bins of the plan are the numbers of images.
    """
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    bins: dict[int, ClassSize] = dict(enumerate(counts))
    kept = binned_indices(labels, {label: ALL for label, count in bins.items() if count}, seed)
    record = {"seed": seed, "natural": True, "bootstrap": resample}
    return _plan_members(labels, class_names, bins, kept, members, record)


def _plan_members(
    labels: Tensor,
    class_names: Sequence[str],
    bins: dict[int, ClassSize],
    kept: Tensor,
    members: int,
    record: dict[str, Any],
) -> Subsets:
    """Give each member a bootstrap of the images at `kept` [K], or all of them where the record has no bootstrap."""
    resample, seed = record["bootstrap"], record["seed"]
    lists = {one: draw_bootstrap(kept, labels, seed, one) if resample else kept for one in range(members)}
    everything = list(range(len(class_names)))
    return Subsets(
        dataset_name=BINNED,
        class_names=list(class_names),
        images=len(labels),
        members=members,
        bins=bins,
        sees=dict.fromkeys(range(members), everything),
        record=record,
        positions={None: kept, **lists},
    )


def plan_masked(
    labels: Tensor,
    class_names: Sequence[str],
    hidden_from: int,
    members: int = 5,
    seed: int = 0,
    resample: bool = True,
    hidden: Sequence[int] | None = None,
) -> Subsets:
    """Plan masked classes: each member sees the images of its classes (`assign_masks`), with `resample` a bootstrap."""
    bins: dict[int, ClassSize] = dict.fromkeys(range(len(class_names)), ALL)
    sees = assign_masks(len(class_names), members, hidden_from, seed, hidden)
    lists: dict[int | None, Tensor] = {None: binned_indices(labels, bins, seed)}
    for one, classes in sees.items():
        kept = binned_indices(labels, dict.fromkeys(classes, ALL), seed)
        lists[one] = draw_bootstrap(kept, labels, seed, one) if resample else kept
    return Subsets(
        dataset_name=MASKED,
        class_names=list(class_names),
        images=len(labels),
        members=members,
        bins=bins,
        sees=sees,
        record={"seed": seed, "hidden_from": hidden_from, "bootstrap": resample},
        positions=lists,
    )
