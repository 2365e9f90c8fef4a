"""Gather the components of an ensemble: their trained heads, the trunk they share, and how they were made.

Examples:
  python save_ensemble.py --path logs --ensemble_name bootstrapped --ensemble_comps 5
  python save_ensemble.py --published model.pth --base configs/latent-diffusion/cin256-v2-published.yaml --out decu_5

Writes {path}/{ensemble_name}_{dataset}_{comps}/ensemble.yaml and one small file a member. Of several runs of one
component the newest counts. The second form converts an ensemble of DECU's published code: --out then also holds the
trunk, once.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.checkpoint import load_checkpoint, load_into, save_tensors, sha256
from ldm.cli import HelpFormatter, run_script
from ldm.data.bins import MASKED
from ldm.ensembles.storage import load_published, save_ensemble
from ldm.pipelines import build_model
from ldm.records import write_record
from ldm.training.config import load_config
from ldm.training.runs import RunDirectory, runs_named
from ldm.util import get_obj_from_str, instantiate_from_config

TRUNK = "trunk.safetensors"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", help="the --logdir that the components were trained with")
    source.add_argument("--published", help="model.pth of DECU's published code; needs --base and --out")
    parser.add_argument("--base", help="config of --published")
    parser.add_argument("--out", help="folder for --published")
    parser.add_argument("--ensemble_name", default="bootstrapped", help="their --ensemble_name")
    parser.add_argument("--ensemble_comps", type=int, default=5, help="number of components")
    parser.add_argument("--data_name", help="name of the data in the folder's name (default: from the data set)")
    parser.add_argument("--checkpoint", default="last.ckpt", help="file under each run's checkpoints/")
    parser.add_argument("--overwrite", action="store_true", help="replace an ensemble that exists")
    return parser


def find_components(
    runs: list[RunDirectory], checkpoint: str, count: int
) -> dict[int, tuple[RunDirectory, dict[str, Any]]]:
    """Newest run of each component 0 .. count - 1, with its checkpoint.

    Raises:
        ValueError: if a component is missing, or the runs disagree on trunk or heads.
    """
    found: dict[int, tuple[RunDirectory, dict[str, Any]]] = {}
    for run in runs:
        file = run.checkpoints / checkpoint
        content = load_checkpoint(file) if file.exists() else {}
        if "component" in content:
            found[content["component"]["index"]] = (run, content)
    missing = [index for index in range(count) if index not in found]
    if missing:
        raise ValueError(
            f"components {missing} are missing: found {sorted(found)} in {len(runs)} runs with {checkpoint}; "
            "train them with main.py --start_from_pretrained --component N"
        )
    chosen = {index: found[index] for index in range(count)}
    for key in ("trunk_sha256", "patterns", "null_class"):
        values = {index: content["component"][key] for index, (_, content) in chosen.items()}
        if len({str(value) for value in values.values()}) > 1:
            raise ValueError(f"the components differ in {key}: {values}; train them on one trunk with the same heads")
    return chosen


def runs_of(path: str, name: str) -> list[RunDirectory]:
    """Runs of the components of an ensemble below a log directory, by the name in their configs, oldest first."""
    runs = runs_named(path, f"_{re.escape(name)}[0-9]+")
    recorded = [OmegaConf.select(run.config(), "run.ensemble_name") if run.has_config else None for run in runs]
    return [run for run, own in zip(runs, recorded, strict=True) if own in (None, name)]


def data_record(config: Any) -> dict[str, Any]:
    """Name of the data set, its class names, the subset's bins, and who saw what, where the training data tell them."""
    train = config.data.params.train
    inner = train.params.get("dataset", train) if "params" in train and train.params is not None else train
    target = get_obj_from_str(inner.target)
    record: dict[str, Any] = {"dataset": getattr(target, "data_name", target.__module__.rpartition(".")[2])}
    data = instantiate_from_config(train)
    names = getattr(data, "human_names", None) or getattr(data, "class_names", None)
    record["class_names"] = [str(name) for name in names or []]
    record["bins"] = dict(getattr(data, "bins", None) or {})
    subsets = getattr(data, "subsets", None)
    record["split"] = getattr(subsets, "dataset_name", None)
    if record["split"] == MASKED:
        record["sees"] = {int(member): list(classes) for member, classes in subsets.sees.items()}
    return record


def convert(options: argparse.Namespace) -> Path:
    """Write a published ensemble as one of ours: trunk, members, record.

    Raises:
        ValueError: if --base or --out is missing, or the file does not fit the config.
    """
    if not (options.base and options.out):
        raise ValueError("--published needs --base CONFIG, the model it was made with, and --out FOLDER")
    config, folder = load_config([options.base]), Path(options.out)
    trunk, members = load_published(options.published)
    model = build_model(config)
    load_into(model, trunk)
    data = {}
    try:
        data = data_record(config) if "data" in config else {}
    except (ValueError, FileNotFoundError) as error:
        print(f"the record names no classes or bins, since the training data cannot be read: {error}")
    if (folder / "ensemble.yaml").exists() and not options.overwrite:
        raise FileExistsError(f"{folder} holds an ensemble; use --overwrite to replace it")
    save_tensors(trunk, folder / TRUNK, overwrite=options.overwrite)
    heads = "class_embedding"
    spec = {
        "name": options.ensemble_name,
        "trunk": {"path": TRUNK, "sha256": sha256(folder / TRUNK)},
        "heads": [heads],
        "patterns": list(model.head_patterns[heads]),
        "null_class": "random",
        "initialisation": {"how": "random", "noise": None},
        **data,
        "config": OmegaConf.to_container(config, resolve=True),
        "members": [
            {"component": index, "seed": None, "run": Path(options.published).name, "step": None}
            for index in range(len(members))
        ],
    }
    each = [{name: value[index] for name, value in members.overrides.items()} for index in range(len(members))]
    save_ensemble(folder, spec, each, options.overwrite)
    write_record(folder / "record.json", options, overwrite=True)
    print(f"{folder}: {len(members)} members of {options.published} on {folder / TRUNK}")
    return folder


def gather(options: argparse.Namespace) -> Path:
    """Write the components' runs as an ensemble."""
    runs = runs_of(options.path, options.ensemble_name)
    chosen = find_components(runs, options.checkpoint, options.ensemble_comps)
    run, first = chosen[0]
    steps = {index: content["global_step"] for index, (_, content) in chosen.items()}
    if len(set(steps.values())) > 1:
        print(f"the components were trained for different numbers of steps: {steps}")
    config = run.config()
    data = data_record(config)
    component = first["component"]
    members = [
        {"component": index, "seed": content["component"]["seed"], "run": run.path.name, "step": content["global_step"]}
        for index, (run, content) in chosen.items()
    ]
    spec = {
        "name": options.ensemble_name,
        "trunk": {"path": component["trunk_path"], "sha256": component["trunk_sha256"]},
        "heads": component["heads"],
        "patterns": component["patterns"],
        "null_class": component["null_class"],
        "initialisation": {"how": component["init"], "noise": component["noise"], "anchor": component.get("anchor")},
        "row_rates": component.get("row_rates", "none"),
        **data,
        "config": OmegaConf.to_container(config, resolve=True),
        "members": members,
    }
    folder = (
        Path(options.path) / f"{options.ensemble_name}_{options.data_name or data['dataset']}_{options.ensemble_comps}"
    )
    save_ensemble(folder, spec, [content["state_dict"] for _, content in chosen.values()], options.overwrite)
    write_record(folder / "record.json", options, overwrite=True)
    size = sum(file.stat().st_size for file in folder.glob("member_*")) / len(members)
    print(f"{folder}: {len(members)} members of {size / 1024:.1f} KiB each on {component['trunk_path']}")
    return folder


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    return convert(options) if options.published else gather(options)


if __name__ == "__main__":
    run_script(main)
