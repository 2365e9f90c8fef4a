"""Bins of classes drawn for the training data of a config, where they are not there yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.bins import ALL, ClassSize, plan_binned
from ldm.data.own import build_dataset
from ldm.data.plans import sample_keys, subsets_file, write_subsets

COMPONENT_SUBSET = "ldm.data.subsets.ComponentSubset"
# What chooses a part of a data set that reads its own lists, and so does not belong to the full one.
CHOOSES = ("component", "comp_numb", "dataset_name", "synset_bins", "subset")


def parse_bin_words(words: Sequence[str]) -> dict[ClassSize, int]:
    """Return {images per class: number of classes} of words IMAGES:CLASSES, such as 10:2 or all:3.

    Raises:
        ValueError: for a word of another form.
    """
    found: dict[ClassSize, int] = {}
    for word in words:
        size, _, count = word.partition(":")
        if not count.isdigit() or not (size == ALL or size.isdigit()):
            raise ValueError(f"expected IMAGES:CLASSES such as 10:2 or all:3, got '{word}'")
        found[ALL if size == ALL else int(size)] = int(count)
    return found


def find_full_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `target` and `params` of the whole data set that a member's subset is taken from."""
    if config["target"] == COMPONENT_SUBSET:
        whole = config["params"]["dataset"]
        return {"target": whole["target"], "params": dict(whole.get("params") or {})}
    params = {name: value for name, value in (config.get("params") or {}).items() if name not in CHOOSES}
    return {"target": config["target"], "params": params}


def draw_bins(
    folder: str | Path,
    config: Mapping[str, Any],
    classes_per_bin: Sequence[str] | None = None,
    *,
    members: int = 5,
    seed: int = 0,
    rotation: int = 0,
) -> Path:
    """Write the binned classes of a data set and their lists, unless the folder holds them; return the folder.

    Args:
        folder: where they are written.
        config: `target` and `params` of the training data, a member's subset of it for example.
        classes_per_bin: words IMAGES:CLASSES; the default of `plan_binned` where None.
        members: how many of them have lists.
        seed: of all draws.
        rotation: how many times the classes move on through the bins.
    """
    folder = Path(folder)
    if subsets_file(folder, "binned_classes").exists():
        return folder
    whole = find_full_data(config)
    data = build_dataset(whole)
    counts = parse_bin_words(classes_per_bin) if classes_per_bin else None
    plan = plan_binned(data.labels, data.class_names, counts, members=members, seed=seed, rotation=rotation)
    write_subsets(folder, plan, sample_keys(data), whole)
    return folder
