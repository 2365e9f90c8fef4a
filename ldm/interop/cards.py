"""The page beside a shared model: how to open it, what it was trained on, and what is known of its uncertainty."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.ensembles.classes import class_size_order

UNCERTAINTY_TABLE = "uncertainty.csv"
# Numbers of images of a class that get a line each; of more of them the range is said.
MOST_SIZES = 20
_INTERVAL = ("estimate", "low", "high")
_FRONT = """---
library_name: decu-uncertainty
tags: [diffusion, uncertainty{tag}]
---

# {title}

Written by `decu export --to folder`. It holds tensors, YAML and text; opening it executes nothing.

```python
from ldm import {loader}

{name} = {loader}("{place}")
images = {name}.sample(n=4)
```
"""


@dataclass(frozen=True)
class Card:
    """What the page says; what is empty is said to be missing.

    Args:
        title: of the page.
        place: the folder or name that the lines of Python open.
        config: of the model.
        data: what the training data tell: dataset, class_names, bins (images of each class), split.
        members: number of members of an ensemble; 0 for a model.
        table: rows of the mutual information of each class, as `decu uncertainty classes` wrote them.
        summary: what it wrote of all classes together.
        record: of the export.
    """

    title: str
    place: str
    config: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    members: int = 0
    table: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as Markdown."""
        loader = "load_ensemble" if self.members else "load_model"
        name = "ensemble" if self.members else "model"
        front = _FRONT.format(
            tag=", ensemble" if self.members else "", title=self.title, loader=loader, name=name, place=self.place
        )
        return "\n".join([front, *self._model(), *self._uncertainty(), *self._origin()]).rstrip() + "\n"

    def _model(self) -> list[str]:
        params = (self.config.get("model") or {}).get("params") or {}
        network = params.get("unet_config") or {}
        rows = [
            ("network", network.get("target", "")),
            ("image size, channels", f"{params.get('image_size', '')}, {params.get('channels', '')}"),
            ("regresses", params.get("parameterization", "eps")),
            ("loss weight", _list_values(params.get("loss_weight") or "none")),
            ("guidance scale", params.get("guidance_scale", 1.0)),
            ("data set", self.data.get("dataset", "not recorded")),
        ]
        if self.members:
            rows.append(("members", self.members))
        return ["## Model", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows), ""]

    def _uncertainty(self) -> list[str]:
        lines = ["## Uncertainty card", ""]
        lines += self._budgets()
        if self.table:
            lines += [
                "Mutual information of a sample and the member, in nats, with 95 % intervals over noises; at most the",
                f"logarithm of the number of members. Measured by `decu uncertainty classes` ({UNCERTAINTY_TABLE}):",
                "",
                "| class | images | mutual information | interval |",
                "| --- | --- | --- | --- |",
            ]
            for row in self.table:
                shown = row.get("name", row["class"])
                low, high = (_short(row.get(key, "")) for key in ("mi_low", "mi_high"))
                images = row.get("bin", "")
                lines.append(f"| {shown} | {images} | {_short(row.get('mi_mean', ''))} | {low} to {high} |")
            lines.append("")
        else:
            lines += ["Mutual information per class was not measured before this was written.", ""]
        return [*lines, *self._calibration()]

    def _calibration(self) -> list[str]:
        """Return how well the numbers follow the images per class, where that was measured."""
        ranks, detects = self.summary.get("spearman"), self.summary.get("auroc")
        if not (ranks and detects and "ceiling" in ranks and {"positives", "negatives"} <= set(detects)):
            return ["The calibration of these numbers was not measured before this was written.", ""]
        few = ", ".join(f"{size:g}" for size in detects["positives"])
        return [
            "Calibration against the numbers of training images, of which fewer should mean more information, with",
            "95 % intervals over classes. Whether the information is as large as the spread of whole trainings would",
            "give was not measured.",
            "",
            f"- rank correlation with the number of images: {_interval(ranks)}; ties cap it at {ranks['ceiling']:.3f}",
            f"- AUROC of classes with {few} images against those with {detects['negatives']}: {_interval(detects)}",
            "",
        ]

    def _budgets(self) -> list[str]:
        bins = self.data.get("bins") or {}
        if not bins:
            return ["The number of training images of each class is not recorded.", ""]
        names = list(self.data.get("class_names") or [])
        sizes: dict[str, list[str]] = {}
        for label, size in bins.items():
            shown = names[int(label)] if str(label).isdigit() and int(label) < len(names) else str(label)
            sizes.setdefault(str(size), []).append(shown)
        if len(sizes) > MOST_SIZES:
            numbers = sorted(bins.values(), key=class_size_order)
            middle = numbers[len(numbers) // 2]
            words = f"{len(numbers)} classes have {numbers[0]} to {numbers[-1]} training images each, median {middle}."
            return [words, ""]
        rows = [
            f"| {size} | {len(sizes[size])} | {_some(sizes[size])} |" for size in sorted(sizes, key=class_size_order)
        ]
        return ["| training images of a class | classes | which |", "| --- | --- | --- |", *rows, ""]

    def _origin(self) -> list[str]:
        known = {key: self.record[key] for key in ("command", "revision", "time") if self.record.get(key)}
        if "command" in known:
            known["command"] = shlex.join(map(str, known["command"]))
        if not known:
            return []
        return ["## Record", "", *(f"- {key}: `{value}`" for key, value in known.items()), "- all of it: `record.json`"]


def _list_values(given: Any) -> str:
    """Return a name, or a mapping such as {name: min_snr, gamma: 5}, as "min_snr, gamma 5"."""
    if not isinstance(given, Mapping):
        return str(given)
    options = [f"{key} {value}" for key, value in given.items() if key != "name"]
    return ", ".join([str(given.get("name", "")), *options])


def _some(classes: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(classes[:most])
    return shown if len(classes) <= most else f"{shown}, ..."


def _interval(written: Mapping[str, Any]) -> str:
    estimate, low, high = (math.nan if written.get(key) is None else float(written[key]) for key in _INTERVAL)
    if math.isnan(estimate):
        return "not defined"
    return f"{estimate:.3f}" + (" (no interval)" if math.isnan(low + high) else f" [{low:.3f}, {high:.3f}]")


def _short(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return "" if value is None else str(value)
