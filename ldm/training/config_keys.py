"""Whether every key of a config is one that something reads: sections, targets with their arguments, paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.arguments import check_arguments, check_value, suggest_key
from ldm.diffusion.weighting import make_loss_weight
from ldm.models.diffusion.alignment import read_alignment
from ldm.models.diffusion.head_options import check_head_options
from ldm.ranges import COUNT, FINITE, UP_TO_ONE, Range, check_range
from ldm.settings.training import CHOSEN_FIELDS, KEPT_FIELDS
from ldm.training.checkpoints import IGNORED_OPTIONS, OWN_OPTIONS, KeepCheckpoints
from ldm.training.config import SPLITS, load_config, to_plain
from ldm.training.runs import RunDirectory
from ldm.util import get_obj_from_str

# Values of `lightning` that are no sections of it, see `ldm.training.blocks`.
BLOCK_KEYS = ("compile", "gradient_checkpointing")
# Sections, and the keys that each may have; None: any, which are checked where they are read.
SECTIONS: dict[str, tuple[str, ...] | None] = {
    "model": ("target", "params", "base_learning_rate", "learning_rate"),
    "data": ("target", "params"),
    "lightning": ("trainer", "callbacks", "modelcheckpoint", *BLOCK_KEYS),
    "uncertainty": ("n", "steps", "branch_at", "distance_of", "bins"),
    "classifier": ("epochs", "batch_size", "learning_rate", "shift", "width", "num_features"),
    "probe": ("grid", "at", "layer"),
    "churn": ("S_churn", "S_min", "S_max", "S_noise"),
    "epsilon_scaling": None,
    "diffusers": None,  # how a folder of diffusers samples, in the config that `decu export` writes of it
    "paths": None,
    "run": (*KEPT_FIELDS, *CHOSEN_FIELDS, "images_per_step", "learning_rate"),
}
LEVELS = ("t", "logsnr", "index")
NODE = ("target", "params")
# Values of sections without a target: what they are, and in which range.
SECTION_VALUES: dict[str, tuple[Any, Range]] = {
    "model.base_learning_rate": (float | None, Range(low=0)),
    "model.learning_rate": (float | None, Range(low=0)),
    **{f"lightning.{key}": (bool, FINITE) for key in BLOCK_KEYS},
    "uncertainty.n": (int, COUNT),
    "uncertainty.steps": (int | str, COUNT),
    "uncertainty.branch_at": (float | list[float], UP_TO_ONE),
    "uncertainty.distance_of": (str, FINITE),
    "classifier.epochs": (int, COUNT),
    "classifier.batch_size": (int, COUNT),
    "classifier.learning_rate": (float, Range(low=0, open_low=True)),
    "classifier.shift": (int, Range(low=0)),
    "classifier.width": (int, COUNT),
    "classifier.num_features": (int, COUNT),
    "probe.layer": (str, FINITE),
    "data.params.batch_size": (int, COUNT),
    "data.params.global_batch_size": (int, COUNT),
}
_REFERENCE = re.compile(r"\$\{\s*paths\.([\w-]+)")


# Callbacks of `lightning.callbacks` that need no target.
NAMED_CALLBACKS = {
    "early_stopping": "pytorch_lightning.callbacks.EarlyStopping",
    "image_logger": "ldm.training.callbacks.ImageLogger",
    "posthoc_ema": "ldm.training.posthoc.PosthocEMA",
    "sample_metrics": "ldm.training.sample_metrics.SampleMetrics",
}
# What a training builds of a config.
BUILT = ("model", "data", "lightning")


def load_checked_config(
    files: Sequence[str],
    dotlist: Sequence[str] = (),
    component: bool = False,
    start: Sequence[DictConfig] = (),
    needs: Sequence[str] = ("model",),
    build: Sequence[str] = BUILT,
) -> DictConfig:
    """Read a config as `load_config` does, and check it with and without what its `components` put on top.

    Args:
        build: see `check_config`; the other arguments are those of `load_config`.

    Raises:
        ValueError: see `check_config` and `load_config`.
    """
    kept = [word for word in dotlist if word.startswith("run.")]
    if kept:
        raise ValueError(f"{kept[0]}: the section run is what a run wrote of its options: give the option itself")
    config = load_config(files, dotlist, component, start, needs)
    check_config(config, build)
    whole = config if component else load_config(files, start=start, component=True, needs=())
    if not component:
        check_config(whole, build, "components (with --start_from_pretrained): ")
    if not start:
        _check_paths([config, whole], dotlist)
    return config


def check_config(config: DictConfig | Mapping[str, Any], build: Sequence[str] = BUILT, before: str = "") -> None:
    """Make sure that a config holds no key that nothing reads, and no value of a type that is not taken.

    Args:
        config: without `components`.
        build: sections whose targets are imported and compared with the arguments that they take; of the others only
            the keys are checked, since they may name what is not installed here.
        before: what a message begins with.

    Raises:
        ValueError: for the first that is wrong, with its dotted key, the nearest that is known, or what it takes.
    """
    given = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    try:
        plain = to_plain(given)
    except OmegaConfBaseException as error:
        raise ValueError(f"{before}the config refers to what it lacks: {' '.join(str(error).split())}") from error
    check_sections(plain, before)
    _build(plain, build, before)


def check_sections(config: Mapping[str, Any], before: str = "") -> None:
    """Check the names of sections, their keys and the values that belong to no target; see `check_config`."""
    for name, section in config.items():
        if name not in SECTIONS:
            raise ValueError(f"{before}the config has an unknown section '{name}': {suggest_key(str(name), SECTIONS)}")
        _check_section(name, section, before)
    lightning = config.get("lightning") or {}
    _check_callbacks(lightning.get("callbacks"), before)
    checkpoint = lightning.get("modelcheckpoint")
    if checkpoint is not None:
        place = f"{before}lightning.modelcheckpoint"
        _check_keys(checkpoint, NODE, place)
        if "target" not in checkpoint:
            known = (*OWN_OPTIONS, *IGNORED_OPTIONS, "every_n_train_steps")
            _check_keys(checkpoint.get("params") or {}, known, f"{place}.params")
            KeepCheckpoints.check_values(checkpoint.get("params") or {}, f"{place}.params")
    for name, part in lightning.items():
        if name not in BLOCK_KEYS:
            check_value(part, Mapping[str, Any], f"{before}lightning.{name}")
    probe = config.get("probe") or {}
    for name in ("grid", "at"):
        if probe.get(name) is not None:
            _check_keys(probe[name], LEVELS, f"{before}probe.{name}")
            check_range("", list(probe[name].values()), {}, f"{before}probe.{name}")
    for place, (hint, allowed) in SECTION_VALUES.items():
        holder, _, key = place.rpartition(".")
        node = _find(config, holder)
        if isinstance(node, Mapping) and key in node:
            check_value(node[key], hint, before + place)
            check_range(key, node[key], {key: allowed}, before + place)
    heads = _find(config, "model.params.heads")
    if heads is not None:
        check_head_options(heads, f"{before}model.params.heads")
    make_loss_weight(_find(config, "model.params.loss_weight"), f"{before}model.params.loss_weight")
    read_alignment(_find(config, "model.params.alignment_config"), f"{before}model.params.alignment_config")


def _find(config: Mapping[str, Any], place: str) -> Any:
    node: Any = config
    for key in place.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _check_section(name: str, section: Any, before: str = "") -> None:
    known = SECTIONS[name]
    if name == "epsilon_scaling":
        check_value(section, list[Any], f"{before}{name}")
    else:
        _check_keys(section, known, f"{before}{name}")


def _check_keys(node: Any, known: Sequence[str] | None, place: str) -> None:
    if not isinstance(node, Mapping):
        raise ValueError(f"{place} must be a mapping of keys, got {node!r}")
    for key in node if known is not None else ():
        if key not in (known or ()):
            raise ValueError(f"{place} has an unknown key '{key}': {suggest_key(str(key), known or ())}")


def _check_callbacks(callbacks: Any, before: str) -> None:
    for name, callback in (callbacks or {}).items() if isinstance(callbacks, Mapping) else ():
        place = f"{before}lightning.callbacks.{name}"
        if callback is None:
            continue
        _check_keys(callback, NODE, place)
        if "target" not in callback and name not in NAMED_CALLBACKS:
            raise ValueError(
                f"{place} needs a target, the class of the callback; without one only {', '.join(NAMED_CALLBACKS)} are "
                f"known: {suggest_key(str(name), NAMED_CALLBACKS)}"
            )


def _check_paths(configs: Sequence[DictConfig], words: Sequence[str]) -> None:
    """Make sure that one of the configs refers to every entry of `paths` that a word sets.

    An entry of a file that nothing refers to any more, since a word put a path in its place, stays; one that is nearly
    the name of another is misspelt.
    """
    config = {str(number): OmegaConf.to_container(one, resolve=False) for number, one in enumerate(configs)}
    paths = configs[0].get("paths") or {}
    if not isinstance(paths, Mapping):
        raise ValueError(f"paths must be a mapping of names to paths, got {paths!r}")
    used = {name for text in _texts(config) for name in _REFERENCE.findall(text)}
    for name, path in paths.items():
        check_value(path, str | list[str] | None, f"paths.{name}")
        told = any(word.startswith(f"paths.{name}=") for word in words)
        near = told or difflib.get_close_matches(str(name), used, n=1, cutoff=0.6)
        if name not in used and near:
            raise ValueError(f"paths.{name} is not referred to: {suggest_key(str(name), used)}")


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for one in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _texts(one)


def _build(config: Mapping[str, Any], build: Sequence[str], before: str = "") -> None:
    for name in ("model", "data"):
        if isinstance(config.get(name), Mapping):
            _check_node(config[name], before + name, name in build, SECTIONS[name] or NODE)
    splits = _find(config, "data.params")
    for split in SPLITS if isinstance(splits, Mapping) else ():
        check_value(splits.get(split), Mapping[str, Any] | None, f"{before}data.params.{split}")
    lightning = config.get("lightning") or {}
    for name, callback in (lightning.get("callbacks") or {}).items():
        if name in NAMED_CALLBACKS and callback is not None:
            callback = {"target": NAMED_CALLBACKS[name], **callback}
        if isinstance(callback, Mapping) and "target" in callback:
            _check_node(callback, f"{before}lightning.callbacks.{name}", "lightning" in build, NODE)


def _check_node(node: Mapping[str, Any], place: str, build: bool, known: Sequence[str]) -> None:
    """Check a node with `target` and `params`, and those within its params."""
    _check_keys(node, known, place)
    target, params = node.get("target"), node.get("params")
    if target is None and build:
        raise ValueError(f"{place} needs a target, the class that takes its params")
    check_value(target, str | None, f"{place}.target")
    check_value(params, Mapping[str, Any] | None, f"{place}.params")
    if build:
        shared = ("global_batch_size",) if place.endswith("data") else ()  # which the training divides
        given = {key: value for key, value in (params or {}).items() if key not in shared}
        # What is lacking is said by what builds it, which may find a better word.
        taker = get_obj_from_str(target)
        check_arguments(taker, given, f"{place}.params", complete=False)
        for key, inner_taker in getattr(taker, "keyword_arguments", {}).items():
            if isinstance(given.get(key), Mapping):
                check_arguments(inner_taker, given[key], f"{place}.params.{key}", complete=False)
    for key, value in (params or {}).items():
        for found, inner in _nodes(value, f"{place}.params.{key}"):
            _check_node(inner, found, build, NODE)


def _nodes(value: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the outermost nodes with a target in a value, or without one where only that is missing."""
    if isinstance(value, Mapping):
        if "target" in value or "params" in value:
            yield place, value
            return
        for key, inner in value.items():
            yield from _nodes(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _nodes(inner, f"{place}[{number}]")


def read_model_config(run: RunDirectory | None, base: str | Path | None) -> DictConfig:
    """Read and check the config of a run, or where there is none that of a file.

    Raises:
        ValueError: see `check_config`.
    """
    if run is None:
        return load_checked_config([str(base)], build=("model",))
    config = run.config()
    check_config(config, ("model",), f"the config in {run.path}: ")
    return config
