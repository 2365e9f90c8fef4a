"""From trained members to an ensemble on disk: their runs, their heads, and what their data say of the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import load_checkpoint, matches
from ldm.ensembles.classes import MASKED
from ldm.ensembles.storage import write_ensemble
from ldm.files import reading
from ldm.training.posthoc import put_averages, read_averages
from ldm.training.runs import STAMP, RunDirectory, runs_named
from ldm.trust import escape
from ldm.util import check_plain_name, get_obj_from_str, instantiate_from_config

# What a member's checkpoint must say of it.
RECORDED = ("index", "seed", "trunk_path", "trunk_sha256", "heads", "patterns", "null_class", "init", "noise")


@dataclass(frozen=True)
class TrainedMember:
    """A member's run and the content of its checkpoint: `component`, `state_dict`, `global_step`."""

    run: RunDirectory
    content: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """How the member was made, as its checkpoint says."""
        return self.content["component"]

    def read_averages(self, width: float) -> dict[str, Tensor]:
        """Return the heads with averages of a width in their place, at the checkpoint's step."""
        found = read_averages(self.run, width, self.content["global_step"])
        return put_averages(self.content["state_dict"], found)


def find_runs(path: str | Path, name: str, config: str | None = None) -> list[RunDirectory]:
    """Return the runs of an ensemble's members below a log directory, by the name in their configs, oldest first.

    Args:
        path: the log directory.
        name: of the ensemble.
        config: name of the config that they were trained by; where there are such runs, others are left alone.
    """
    ends = f"_{re.escape(name)}[0-9]+"
    own = runs_named(path, f"{STAMP.pattern}_{re.escape(config)}{ends}") if config else []
    runs = own or runs_named(path, ends)
    recorded = [OmegaConf.select(run.config(), "run.ensemble_name") if run.has_config else None for run in runs]
    return [run for run, own in zip(runs, recorded, strict=True) if own in (None, name)]


def find_members(runs: Sequence[RunDirectory], checkpoint: str, count: int) -> list[TrainedMember]:
    """Return the newest run of each member 0 .. count - 1, with its checkpoint.

    Raises:
        ValueError: if a member is missing, or the runs disagree on the base checkpoint or the heads.
    """
    found: dict[int, TrainedMember] = {}
    for run in runs:
        file = run.checkpoints / checkpoint
        content = load_checkpoint(file) if file.exists() else {}
        if "component" in content:
            with reading(file, "the checkpoint of a member", "train this component again"):
                lacking = [key for key in RECORDED if key not in content["component"]]
                if lacking or "global_step" not in content or not dict(content["state_dict"]):
                    raise ValueError(f"it lacks {', '.join(lacking) or 'its weights or its step'}")
                found[int(content["component"]["index"])] = TrainedMember(run, content)
    missing = [index for index in range(count) if index not in found]
    if missing:
        raise ValueError(
            f"components {missing} are missing: found {sorted(found)} in {len(runs)} runs with {checkpoint}; "
            "train them with main.py --start_from_pretrained --component N"
        )
    chosen = [found[index] for index in range(count)]
    for member in chosen:
        heads = member.content["state_dict"]
        lacking = [one for one in member.record["patterns"] if not any(matches(name, [one]) for name in heads)]
        if lacking:
            raise ValueError(f"{member.run.path} holds no weights of the heads {lacking}: train this component again")
    for key in ("trunk_sha256", "patterns", "null_class", "targets"):
        values = {index: member.record.get(key) for index, member in enumerate(chosen)}
        if len({str(value) for value in values.values()}) > 1:
            raise ValueError(
                f"the components differ in {key}: {values}; train them on one base checkpoint with the same heads"
            )
    return chosen


def describe_training_data(config: Any) -> dict[str, Any]:
    """Return the name of the data set, its class names, the subset's bins, and who saw what, as the data tell them."""
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
    if subsets is not None and subsets.record.get("natural"):
        record["natural"] = True
    if subsets is not None and record["split"] == MASKED:
        record["sees"] = {int(member): list(classes) for member, classes in subsets.sees.items()}
    return record


def count_training_images(config: Any) -> dict[int, int]:
    """Return the number of training images of each class, empty where the data have no classes."""
    data = instantiate_from_config(config.data.params.train)
    labels = getattr(data, "labels", None)
    if labels is None:
        return {}
    return dict(enumerate(torch.as_tensor(labels).bincount(minlength=getattr(data, "n_classes", 0)).tolist()))


def gather_members(
    path: str | Path,
    name: str,
    count: int,
    *,
    data_name: str | None = None,
    checkpoint: str = "last.ckpt",
    ema: float | None = None,
    overwrite: bool = False,
    prepare: Callable[[Path], object] | None = None,
) -> Path:
    """Write the newest runs of an ensemble's members as `{path}/{name}_{data}_{count}`, and return that folder.

    Args:
        path: the log directory that the members were trained in.
        name, count: of the ensemble, and of its members.
        data_name: name of the data in the folder's name; the data set's where None. See `find_runs` for its config.
        checkpoint: file below each run's checkpoints/.
        ema: width of the averages that are taken of the heads (`ldm.training.posthoc`); None: the heads themselves.
        prepare: see `write_ensemble`.

    Raises:
        ValueError: if a member is missing, or the members do not fit together.
        FileExistsError: if there is such an ensemble and `overwrite` is False.
    """
    check_plain_name("--ensemble_name", name)
    check_plain_name("--data_name", data_name or "")
    chosen = find_members(find_runs(path, name, data_name), checkpoint, count)
    first = chosen[0]
    config = first.run.config()
    data = describe_training_data(config)
    record = first.record
    spec = {
        "name": name,
        "trunk": {"path": record["trunk_path"], "sha256": record["trunk_sha256"]},
        "heads": record["heads"],
        "patterns": record["patterns"],
        "null_class": record["null_class"],
        "initialisation": {
            "how": record["init"],
            "noise": record["noise"],
            "anchor": record.get("anchor"),
            **{name: record[name] for name in ("targets",) if name in record},
        },
        "row_rates": record.get("row_rates", "none"),
        **({} if ema is None else {"ema": ema}) | data,
        "config": escape(OmegaConf.to_container(config, resolve=True)),
        "members": [
            {
                "component": index,
                "seed": member.record["seed"],
                "run": member.run.path.name,
                "step": member.content["global_step"],
            }
            for index, member in enumerate(chosen)
        ],
    }
    folder = Path(path) / f"{name}_{data_name or data['dataset']}_{count}"
    heads = [member.content["state_dict"] if ema is None else member.read_averages(ema) for member in chosen]
    return write_ensemble(folder, spec, heads, overwrite, prepare)
