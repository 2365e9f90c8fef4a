"""The commands that make a plan of subsets, and that draw it again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.base import check_choice
from ldm.data.bins import BINNED, DATASET_NAMES, MASKED, Subsets, class_size_order


def pickle_file(folder: str | Path, dataset_name: str) -> Path:
    """Path of the pickle that DECU published for such a plan; see `ldm.data.prepare.published`."""
    check_choice("dataset_name", dataset_name, DATASET_NAMES)
    return Path(folder) / f"subsets_{dataset_name}.pkl"


def make_bins_command(
    folder: str | Path,
    dataset_name: str = BINNED,
    member: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Return the shell command that makes the missing files of `folder` for the data set of `config`."""
    words = ["decu", "data", "bins"]
    if config is None:
        words += ["--base", "CONFIG"]
    else:
        words += ["--target", str(config["target"])]
        given = [f"{name}={value}" for name, value in (config.get("params") or {}).items() if value is not None]
        words += ["--params", *given] if given else []
    words += ["--out", str(folder)]
    count = ["--components", str(max(5, (member or 0) + 1))]
    published = pickle_file(folder, dataset_name)
    if published.exists():
        return shlex.join([*words, "--convert", str(published), *(count if dataset_name == BINNED else [])])
    words += ["--dataset", dataset_name]
    words += ["--hidden_from", "2"] if dataset_name == MASKED else []
    return shlex.join([*words, *count])


def plan_words(subsets: Subsets) -> list[str]:
    """Return the options of `decu data bins` that draw a plan again."""
    record = subsets.record
    words = ["--seed", str(record.get("seed", 0))]
    words += [] if record.get("bootstrap", True) else ["--no_bootstrap"]
    if subsets.dataset_name == MASKED:
        return words
    if record.get("natural"):
        return [*words, "--natural"]
    named = record.get("named") or {}
    words += ["--images_of", *(f"{name}={size}" for name, size in named.items())] if named else []
    counts = Counter(size for label, size in subsets.bins.items() if subsets.class_names[label] not in named)
    words += ["--rotation", str(record["rotation"])] if record.get("rotation") else []
    if not counts:
        return words
    return [*words, "--classes_per_bin", *(f"{size}:{counts[size]}" for size in sorted(counts, key=class_size_order))]
