"""Members from scratch: whole trainings as the members of an ensemble, for networks that are small enough to hold M of.

Such members share no backbone. Their files hold all that trained, and one call evaluates them as it does members that
differ in heads (`ldm.ensembles.members`), a pass of the network for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import averaged, free_name, load_checkpoint, matches, save_tensors, sha256, unwrap_state_dict
from ldm.ensembles.storage import write_ensemble
from ldm.models.diffusion.weights import WEIGHT_KEYS
from ldm.modules.conditioned import EMBEDDER, UNET
from ldm.records import refuse_existing
from ldm.training.gathering import describe_training_data
from ldm.training.posthoc import put_averages, read_averages
from ldm.training.runs import RunDirectory, find_run
from ldm.trust import escape

# What a training from scratch trains: the network, and the embedder of its condition.
TRAINED = (UNET, EMBEDDER)


@dataclass(frozen=True)
class WholeRun:
    """A training of a whole model.

    Args:
        run: its directory.
        state: its weights, averaged where it kept averages.
        step: optimiser steps that were made.
    """

    run: RunDirectory
    state: Mapping[str, Tensor]
    step: int

    @property
    def params(self) -> dict[str, Any]:
        """What its config says of the model, without the places of files."""
        plain = OmegaConf.to_container(self.run.config().model.params, resolve=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items() if key not in ("ckpt_path", "pretrained_path")}


def read_whole_run(path: str | Path, ema: float | None = None) -> WholeRun:
    """Read a run directory, or a checkpoint in one.

    Args:
        path: of the run.
        ema: width of the averages that are taken (`ldm.training.posthoc`); None: those that the run kept.

    Raises:
        ValueError: if it is no run, or that of a member on a base model.
    """
    run, checkpoint = find_run(path)
    content = load_checkpoint(checkpoint)
    if {"component", "components"} & set(content):
        raise ValueError(
            f"{path} trained heads on a base model, and --runs takes whole trainings: gather its ensemble with --path"
        )
    state = unwrap_state_dict(content, checkpoint)
    found = averaged(state) if ema is None else put_averages(state, read_averages(run, ema, content["global_step"]))
    return WholeRun(run, found, int(content["global_step"]))


def check_alike(runs: Sequence[WholeRun]) -> None:
    """Make sure that runs are members of one ensemble: one model, and what does not train the same in all.

    Raises:
        ValueError: naming the run and what differs.
    """
    first, others = runs[0], runs[1:]
    if not others:
        raise ValueError("--runs takes at least two trainings: one model alone disagrees with nobody")
    twice = next((one for place, one in enumerate(runs) if one.run.path.resolve() in
                  [other.run.path.resolve() for other in runs[:place]]), None)  # fmt: skip
    if twice is not None:
        raise ValueError(f"{twice.run.path} comes twice, and a member counts once")
    for other in others:
        own = first.params
        differing = sorted(key for key in own.keys() | other.params.keys() if own.get(key) != other.params.get(key))
        if differing:
            raise ValueError(
                f"{other.run.path} is of another model than {first.run.path}: they differ in model.params."
                f"{', model.params.'.join(differing)}"
            )
        for name, value in first.state.items():
            kept = not name.startswith(TRAINED) and not matches(name, WEIGHT_KEYS) and name != "logvar"
            if kept and not torch.equal(value, other.state[name]):
                raise ValueError(
                    f"{other.run.path} has another {name} than {first.run.path}: members share a first stage and a "
                    "schedule; train them with one first stage, and scale_by_std: false"
                )


def gather_runs(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    name: str = "whole",
    ema: float | None = None,
    overwrite: bool = False,
    prepare: Callable[[Path], object] | None = None,
) -> Path:
    """Write whole trainings as the members of an ensemble, and return its folder.

    The folder holds the first member's weights as the base model as well: what the members have in common is read from
    them.

    Args:
        paths: run directories, or checkpoints in them.
        out: the folder.
        name: of the ensemble.
        ema: see `read_whole_run`.
        prepare: see `write_ensemble`.

    Raises:
        ValueError: if the runs are not of one model.
        FileExistsError: if there is an ensemble and `overwrite` is False.
    """
    folder = Path(out)
    refuse_existing([folder / "ensemble.yaml"], overwrite)
    runs = [read_whole_run(path, ema) for path in paths]
    check_alike(runs)
    config = runs[0].run.config()
    folder.mkdir(parents=True, exist_ok=True)
    earlier = set(folder.glob("base*.safetensors"))
    base = free_name(folder, "base", ".safetensors")
    save_tensors(runs[0].state, folder / base)
    spec = {
        "name": name,
        "trunk": {"path": base, "sha256": sha256(folder / base)},
        "heads": ["whole"],
        "patterns": [f"{begins}*" for begins in TRAINED if any(key.startswith(begins) for key in runs[0].state)],
        "null_class": "trained",
        "initialisation": {"how": "random", "noise": None},
        **({} if ema is None else {"ema": ema}),
        **(describe_training_data(config) if "data" in config else {}),
        "config": escape(OmegaConf.to_container(config, resolve=True)),
        "members": [
            {
                "component": index,
                "seed": OmegaConf.select(one.run.config(), "run.seed"),
                "run": one.run.path.name,
                "step": one.step,
            }
            for index, one in enumerate(runs)
        ],
    }
    members = [{key: value for key, value in one.state.items() if key.startswith(TRAINED)} for one in runs]
    write_ensemble(folder, spec, members, overwrite, prepare)
    for replaced in earlier:
        replaced.unlink()
    return folder
