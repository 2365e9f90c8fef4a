"""Draw which images each member of an ensemble sees, or take what DECU published; write the lists, and show them.

Binned classes: every class has a class_size of images, and each member a bootstrap of them.
Masked classes: every class is hidden from some of the members; the others see a bootstrap of all its images.
--convert reads DECU's subsets_binned_classes.pkl or subsets_masked_classes.pkl (nothing a pickle names is run). File
lists that lie beside it are kept, others are drawn. Words paths.NAME=VALUE change the config's section `paths`.

Examples:
  python scripts/make_bins.py --target ldm.data.digits.Digits --out data/digits_bins
  python scripts/make_bins.py --base configs/latent-diffusion/digits.yaml --classes_per_bin 1:3 10:2 50:2 all:3
  python scripts/make_bins.py --base configs/latent-diffusion/digits.yaml --rotation 1 --out data/digits_bins_r1
  python scripts/make_bins.py --base configs/latent-diffusion/omniglot.yaml --classes_per_bin 1:60 3:60 8:60 all:62
  python scripts/make_bins.py --target ldm.data.digits.Digits --dataset masked_classes --hidden_from 2
  python scripts/make_bins.py --base configs/latent-diffusion/cin256-v2.yaml paths.data_root=imagenet_data
  python scripts/make_bins.py --base configs/latent-diffusion/cin256-v2.yaml paths.data_root=imagenet_data \\
      --convert imagenet_data/data_train/subsets_binned_classes.pkl
  python scripts/make_bins.py --show data/digits_bins
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.cli import HelpFormatter, run_script
from ldm.data.prepare.published import plan_published
from ldm.data.subsets import (
    ALL,
    BINNED,
    DATASET_NAMES,
    MASKED,
    ClassSize,
    Subsets,
    class_size_order,
    list_file,
    plan_binned,
    plan_masked,
    read_member_subset,
    read_subsets,
    sample_keys,
    subsets_file,
    write_subsets,
)
from ldm.training.config import load_config
from ldm.util import instantiate_from_config

# What chooses a part of a data set that reads its own lists, and so does not belong to the full one.
CHOOSES = ("component", "comp_numb", "dataset_name", "synset_bins")
PATHS_WORD = re.compile(r"paths(\.\w+)+=")
SHOWN = 10  # classes named in a row, at most
COMPONENT_SUBSET = "ldm.data.subsets.ComponentSubset"


def bin_argument(text: str) -> tuple[ClassSize, int]:
    """Read `BUDGET:CLASSES`, such as 10:2 or all:3."""
    class_size, _, count = text.partition(":")
    if not count.isdigit() or not (class_size == ALL or class_size.isdigit()):
        raise argparse.ArgumentTypeError(f"expected BUDGET:CLASSES such as 10:2 or all:3, got '{text}'")
    return (class_size if class_size == ALL else int(class_size)), int(count)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--base", metavar="CONFIG", help="YAML whose data.params.train names the data set")
    parser.add_argument("--target", help="data set class, instead of --base")
    parser.add_argument("--params", nargs="+", default=[], metavar="NAME=VALUE", help="parameters of the data set")
    where = "folder to write; default: where the data set looks for lists, the pickle's, or data/<config or class>_bins"
    parser.add_argument("--out", help=where)
    kinds = f"kind of subsets; default: {BINNED}, or what the name of --convert's file says"
    parser.add_argument("--dataset", choices=DATASET_NAMES, help=kinds)
    parser.add_argument(
        "--classes_per_bin",
        nargs="+",
        type=bin_argument,
        metavar="BUDGET:CLASSES",
        help="classes at each class_size; default: 1:3 10:2 50:2 all:3 for ten classes, "
        "10/10/10/70 percent at 1/10/100/all for 100 or more (ImageNet: 100/100/100/700)",
    )
    parser.add_argument("--hidden_from", type=int, default=None, help="masked_classes: members a class is hidden from")
    members = "number of members; default: 5, or those of --convert"
    parser.add_argument("--components", type=int, help=members)
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--rotation", type=int, default=0, help="move the classes on through the bins, this many times")
    parser.add_argument("--no_bootstrap", action="store_true", help="give every member all images of its classes")
    parser.add_argument("--overwrite", action="store_true", help="replace other subsets in the folder")
    parser.add_argument("--convert", metavar="PICKLE", help="take the subsets that DECU published in this file")
    parser.add_argument("--show", metavar="DIR", help="print the subsets of an existing folder, write nothing")
    words = list(sys.argv[1:] if argv is None else argv)
    # Taken out first: an option of several words before one would take it for its own.
    options = parser.parse_args([word for word in words if not PATHS_WORD.match(word)])
    options.paths = [word for word in words if PATHS_WORD.match(word)]
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where options exclude each other or would not act."""
    masked = options.dataset == MASKED
    if options.show is None and (options.base is None) == (options.target is None):
        parser.error("give one of --base CONFIG, --target CLASS, --show DIR")
    if options.components is not None and options.components < 1:
        parser.error(f"--components must be 1 or more, got {options.components}")
    if masked and (options.classes_per_bin or options.rotation):
        parser.error("--classes_per_bin and --rotation act on binned_classes only")
    if not masked and options.hidden_from is not None:
        parser.error("--hidden_from acts on masked_classes only")
    if options.convert and (options.classes_per_bin or options.rotation or options.hidden_from is not None):
        parser.error("--classes_per_bin, --rotation and --hidden_from draw subsets; --convert takes published ones")
    if options.paths and options.base is None:
        parser.error(f"{options.paths[0]} changes a config; give one with --base")


def dataset_config(options: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """Return `target`/`params` of the full data set, and the folder of subsets that the config names, if any."""
    if options.base is None:
        config: dict[str, Any] = {"target": options.target}
    else:
        whole = load_config([options.base], options.paths, needs=())
        node = OmegaConf.select(whole, "data.params.train")
        if node is None:
            raise ValueError(f"{options.base} has no data.params.train; name the data set with --target and --params")
        config = OmegaConf.to_container(node, resolve=True)
    params = dict(config.get("params") or {})
    if config["target"] == COMPONENT_SUBSET:
        folder = params.get("folder")
        config, params = params["dataset"], dict(params["dataset"].get("params") or {})
    else:
        folder = params.pop("subset", None)
        params = {name: value for name, value in params.items() if name not in CHOOSES}
    params |= OmegaConf.to_container(OmegaConf.from_dotlist(list(options.params)))
    return {"target": config["target"], "params": params}, folder


def default_folder(options: argparse.Namespace, dataset: Any) -> str:
    """Return where subsets go that neither the command line nor the config places."""
    if options.convert:
        return str(Path(options.convert).parent)
    own = getattr(dataset, "lists_folder", None)
    stem = Path(options.base).stem if options.base else options.target.rpartition(".")[2].lower()
    return str(own or f"data/{stem}_bins")


def some(classes: Sequence[int]) -> str:
    """Return the numbers of the first few classes."""
    return " ".join(map(str, classes[:SHOWN])) + (" ..." if len(classes) > SHOWN else "")


def rows(subsets: Subsets, lists: dict[int | None, Tensor], labels: Tensor) -> list[list[str]]:
    """Return the table: of each bin its classes, images without bootstrap, per member, and distinct per member."""
    members = [one for one in lists if one is not None]
    table = [["bin", "classes", "images", "per member", "distinct per member", "class ids"]]
    for class_size in sorted(set(subsets.bins.values()), key=class_size_order):
        classes = [label for label, value in subsets.bins.items() if value == class_size]
        in_bin = torch.zeros(len(subsets.class_names), dtype=torch.bool)
        in_bin[classes] = True
        inside = {one: positions[in_bin[labels[positions]]] for one, positions in lists.items()}
        sizes = " ".join(str(len(inside[one])) for one in members)
        distinct = " ".join(str(len(inside[one].unique())) for one in members)
        table.append([str(class_size), str(len(classes)), str(len(inside[None])), sizes, distinct, some(classes)])
    return table


def show(folder: str, subsets: Subsets, lists: dict[int | None, Tensor], labels: Tensor) -> None:
    """Print a plan as a table."""
    facts = ", ".join(f"{name} {value}" for name, value in subsets.record.items() if name != "dataset")
    print(f"{subsets_file(folder, subsets.dataset_name)}: {subsets.members} members, {facts}")
    table = rows(subsets, lists, labels)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if subsets.dataset_name != BINNED:
        for member, classes in subsets.sees.items():
            hidden = [label for label in range(len(subsets.class_names)) if label not in set(classes)]
            print(f"  member {member} sees {len(classes)} classes; hidden: {some(hidden) or 'none'}")


def show_folder(folder: str) -> None:
    """Print the plans that a folder holds, from its files."""
    names = [name for name in DATASET_NAMES if subsets_file(folder, name).exists()]
    if not names:
        raise ValueError(f"{folder} holds no {' or '.join(subsets_file('', name).name for name in DATASET_NAMES)}")
    for name in names:
        subsets = read_subsets(folder, name)
        if "dataset" not in subsets.record:
            raise ValueError(f"{subsets_file(folder, name)} does not name its data set, so its lists cannot be counted")
        dataset = instantiate_from_config(subsets.record["dataset"])
        members = [None, *range(subsets.members)]
        positions = {one: read_member_subset(folder, name, one, dataset)[1] for one in members}
        show(folder, subsets, positions, dataset.labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, write and show the subsets, or show those of a folder."""
    options = parse(argv)
    if options.show is not None:
        show_folder(options.show)
        return
    config, folder = dataset_config(options)
    dataset = instantiate_from_config(config)
    folder = options.out or folder or default_folder(options, dataset)
    plan = plan_of(options, dataset)
    keep = [list_file(folder, plan.dataset_name, one) for one in plan.record.get("published_lists", ())]
    elsewhere = options.convert is not None and Path(folder).resolve() != Path(options.convert).parent.resolve()
    keep = [] if elsewhere else keep
    files = write_subsets(folder, plan, sample_keys(dataset), config, options.overwrite, keep)
    show(folder, plan, plan.positions, dataset.labels)
    print(f"wrote {len(files)} files to {folder}" + (f"; kept {len(keep)} published lists" if keep else ""))


def plan_of(options: argparse.Namespace, dataset: Any) -> Subsets:
    """Draw the plan that the options ask for, or take the published one."""
    common = {"seed": options.seed, "resample": not options.no_bootstrap}
    if options.convert:
        return plan_published(options.convert, dataset, options.dataset, options.components, **common)
    common["members"] = options.components or 5
    if options.dataset == MASKED:
        hidden_from = 2 if options.hidden_from is None else options.hidden_from
        return plan_masked(dataset.labels, dataset.class_names, hidden_from, **common)
    counts = dict(options.classes_per_bin) if options.classes_per_bin else None
    return plan_binned(dataset.labels, dataset.class_names, counts, rotation=options.rotation, **common)


if __name__ == "__main__":
    run_script(main)
