"""A grid of samples: a row for each member of the ensemble, a column for each class, the same noise everywhere.

Examples:
  python sample_model.py --path logs/bootstrapped_digits_5
  python sample_model.py --path logs/bootstrapped_digits_5 --classes 0 3 7 --branch_at 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ldm.arguments import add_ensemble_arguments
from ldm.checkpoint import save_tensors
from ldm.cli import HelpFormatter, run_script, write_record
from ldm.data.subsets import budget_order
from ldm.images import labelled_grid
from ldm.opened import OpenEnsemble, open_ensemble


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    parser.add_argument("--out", help="folder of the output (default: PATH/samples)")
    return parser


def spread_classes(bins: dict[int, Any], classes: int, count: int = 10) -> list[int]:
    """Up to `count` classes, evenly over the bins in their order, else evenly over the numbers."""
    if not bins:
        return sorted({round(k * (classes - 1) / max(1, count - 1)) for k in range(min(count, classes))})
    by_bin: dict[Any, list[int]] = {}
    for label in sorted(bins, key=lambda label: (budget_order(bins[label]), label)):
        by_bin.setdefault(bins[label], []).append(label)
    share = max(1, -(-count // len(by_bin)))
    return [label for labels in by_bin.values() for label in labels[:share]][:count]


def describe_class(opened: OpenEnsemble, label: int) -> str:
    """Name and budget of a class, for a picture."""
    budget = opened.bins.get(label)
    return opened.class_names[label] + ("" if budget is None else f"\n{budget} image{'s' * (budget != 1)}")


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    opened = open_ensemble(options)
    classes = options.classes or spread_classes(opened.bins, opened.model.null_class)
    branched = opened.walk(classes, images=[0] * len(classes))
    images = opened.decode(branched.samples)
    out = Path(options.out or Path(options.path) / "samples")
    columns = [describe_class(opened, label) for label in classes]
    title = f"members part at step {opened.branch} of {len(opened.grid) - 1}, guidance {opened.scale:g}"
    path = out / f"members_branch{opened.branch}.png"
    labelled_grid(
        images, path, [f"member {index}" for index in range(opened.members)], columns, title, options.overwrite
    )
    save_tensors(
        {"latents": branched.samples, "classes": torch.tensor(classes)},
        path.with_suffix(".safetensors"),
        overwrite=True,
    )
    write_record(path.with_suffix(".json"), options, overwrite=True, settings=opened.describe())
    print(path)
    return path


if __name__ == "__main__":
    run_script(main)
