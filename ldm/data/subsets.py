"""The data set that trains one member of an ensemble on its list; plans and their files under one name.

`ldm.data.bins` draws plans, `ldm.data.plans` keeps them on disk, `ldm.data.prepare.published` reads those of DECU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from ldm.data.base import occurrences
from ldm.data.bins import (
    ALL,
    BINNED,
    DATASET_NAMES,
    MASKED,
    ClassSize,
    Subsets,
    assign_bins,
    assign_masks,
    binned_indices,
    class_size_order,
    default_classes_per_bin,
    draw_bootstrap,
    plan_binned,
    plan_masked,
    plan_natural,
)
from ldm.data.own import build_dataset
from ldm.data.plans import (
    list_file,
    make_bins_command,
    pickle_file,
    read_list,
    read_member_subset,
    read_plan,
    read_subsets,
    sample_keys,
    subsets_file,
    write_subsets,
)

__all__ = [
    "ALL",
    "BINNED",
    "DATASET_NAMES",
    "MASKED",
    "ClassSize",
    "ComponentSubset",
    "Subsets",
    "assign_bins",
    "assign_masks",
    "binned_indices",
    "class_size_order",
    "default_classes_per_bin",
    "draw_bootstrap",
    "list_file",
    "make_bins_command",
    "pickle_file",
    "plan_binned",
    "plan_masked",
    "plan_natural",
    "read_list",
    "read_member_subset",
    "read_plan",
    "read_subsets",
    "sample_keys",
    "subsets_file",
    "write_subsets",
]


class ComponentSubset(Dataset):
    """What one member of an ensemble sees of a data set, with that data set's attributes and items.

    Args:
        dataset: the full data set, or its `target`/`params` config.
        folder: folder that `decu data bins` wrote.
        component: the member; None for the subset without bootstrap.
        dataset_name: "binned_classes" or "masked_classes".

    Attributes:
        labels: class of each item, int64 [K].
        bins: {class: class_size}.
        subsets: the whole plan.

    Raises:
        ValueError: see `read_member_subset`.
    """

    def __init__(
        self,
        dataset: Dataset | Mapping[str, Any],
        folder: str,
        component: int | None = None,
        dataset_name: str = BINNED,
    ):
        config = dataset if isinstance(dataset, Mapping) else None
        self.dataset = build_dataset(dataset) if config is not None else dataset
        self.subsets, self.positions = read_member_subset(folder, dataset_name, component, self.dataset, config)
        self.component = component
        self.bins = self.subsets.bins
        self.labels = self.dataset.labels[self.positions]
        self.n_classes = self.dataset.n_classes
        self.class_names = self.dataset.class_names
        self.human_names = getattr(self.dataset, "human_names", self.class_names)
        self.image_shape = self.dataset.image_shape
        self._draws = occurrences(self.positions)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = int(self.positions[position])
        if hasattr(self.dataset, "item"):
            return self.dataset.item(index, int(self._draws[position]))
        return self.dataset[index]
