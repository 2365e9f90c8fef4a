"""Reading of configs: where they are, `bases`, files from left to right, `components`, dotlists; the rate and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.files import reading
from ldm.trust import accept_config

# Data sets that a config may name.
SPLITS = ("train", "validation", "test", "predict")


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain dictionaries, lists and values, with what it refers to filled in.

    Raises:
        OmegaConfBaseException: if it refers to what is not there, or leaves a value open (???).
    """
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def merge_configs(base: DictConfig, over: DictConfig) -> DictConfig:
    """`over` on top of `base`, key by key; a node that names another `target` replaces the whole node of `base`."""
    plain = [OmegaConf.to_container(config, resolve=False) for config in (base, over)]
    return OmegaConf.create(_merge(*plain))


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "target" in base and "target" in over and base["target"] != over["target"]:
        return over
    return {**base, **{key: _merge(base[key], value) if key in base else value for key, value in over.items()}}


def packaged_configs() -> Path:
    """Return the folder of this project's configs: that of the installed package, or configs/ of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(file: str | Path) -> Path:
    """Return the path of a config, which may be one that the package brings along.

    A file that exists, seen from the current folder, is taken as it is. A relative path that begins with `configs/`
    and names none is looked up among the configs of the package, so that the project's own configs are known by the
    same words in every folder.

    Raises:
        ValueError: if neither is there.
    """
    path = Path(file)
    if path.is_file():
        return path
    folder = packaged_configs()
    packaged = folder.joinpath(*path.parts[1:])
    if path.parts[:1] == ("configs",) and packaged.is_file():
        return packaged
    raise ValueError(
        f"there is no config {file}, neither from the current folder {Path.cwd()} nor among the package's own, which "
        f"are named configs/FOLDER/NAME.yaml in any folder and lie in {folder}"
    )


def read_config(file: str | Path) -> DictConfig:
    """Read one YAML file (`find_config`), with the files that it names in `bases` merged below its own keys.

    `bases` is a path or a list of paths, relative to the file that names them. They are merged from left to right by
    the rules of `merge_configs`: a list is replaced, not appended. A base may have bases of its own. The key `bases`
    is not part of the result.

    Raises:
        ValueError: if a file does not exist or holds no mapping, if `bases` holds no paths, or if a file is a base of
            itself, directly or through others.
    """
    return OmegaConf.create(_read(find_config(file), ()))


def _read(file: Path, readers: tuple[Path, ...]) -> dict[Any, Any]:
    """Read a file that `readers`, from the outermost inwards, have reached through their bases."""
    chain = (*readers, file)
    if file.resolve() in [reader.resolve() for reader in readers]:
        raise ValueError(f"a config cannot be its own base; remove a link of {' -> '.join(map(str, chain))}")
    with reading(file, "a config (YAML)", "mend it, or give another"):
        try:
            own = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        except OmegaConfBaseException as error:  # an interpolation that is none
            raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(own, dict):
        raise ValueError(f"{file} must hold a mapping of keys to values, and it holds a {type(own).__name__}")
    config: dict[Any, Any] = {}
    for base in _base_paths(own.pop("bases", []), file):
        config = _merge(config, _read(base, chain))
    return _merge(config, own)


def _base_paths(named: Any, file: Path) -> list[Path]:
    """Return the paths of what a file names in `bases`."""
    names = [named] if isinstance(named, str) else named
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"bases in {file} must be a path or a list of paths, got {named!r}")
    paths = [file.parent / name for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise ValueError(f"{file} names {name} in bases, which are relative to it, but there is no file {path}")
    return paths


def load_config(
    files: Sequence[str],
    dotlist: Sequence[str] = (),
    component: bool = False,
    start: Sequence[DictConfig] = (),
    needs: Sequence[str] = ("model",),
) -> DictConfig:
    """Merge `start`, the files, their `components` section if a component is trained, and `a.b=c` words.

    Every config of the project is read here, so that `bases` (`read_config`) acts everywhere.

    Raises:
        ValueError: if a file cannot be read (`read_config`) or is no YAML, if a word sets `bases`, which only a file
            can, or if the result lacks a section of `needs`.
    """
    try:
        config = _load(files, dotlist, component, start)
    except YAMLError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"a word A.B=C over the config is no YAML, among {list(dotlist)}: {words}") from error
    if missing := set(needs) - set(config):
        raise ValueError(f"no section {sorted(missing)} in {list(files)}: this needs {' and '.join(needs)}")
    return config


def _load(files: Sequence[str], dotlist: Sequence[str], component: bool, start: Sequence[DictConfig]) -> DictConfig:
    config = OmegaConf.create()
    for part in start:
        config = merge_configs(config, part)
    for file in files:
        part = read_config(file)
        # The section `run` is in what a training wrote: that stays a run's config under whatever option it is named.
        config = merge_configs(config, accept_config(part, file) if "run" in part else part)
    components = config.pop("components", None)
    words = OmegaConf.from_dotlist(list(dotlist))
    own = words.pop("components", None)
    if own is not None and not component:
        raise ValueError("words components.A=B change members, which train with --start_from_pretrained: add it")
    for part in (components, own):
        if component and part is not None:
            config = merge_configs(config, _take_replaced(_as_components(part), config))
    if "bases" in words:
        raise ValueError(f"bases={words.bases} acts only in a YAML file; give several files instead: --base A B")
    return merge_configs(config, words)


def take_section(config: DictConfig, name: str) -> tuple[DictConfig, DictConfig]:
    """Return a config without one of its sections, and the section; what refers to what is in the other is filled in.

    Other references, such as ${paths.data_root}, stay as they are.
    """
    section = OmegaConf.to_container(config[name], resolve=True) if name in config else {}
    rest = {
        key: value for key, value in cast(dict, OmegaConf.to_container(config, resolve=False)).items() if key != name
    }
    resolved = to_plain(config) if _refers(rest, f"${{{name}.") else rest
    return OmegaConf.create(_fill_in(rest, resolved, f"${{{name}.")), OmegaConf.create(section)


def _refers(node: Any, mark: str) -> bool:
    if isinstance(node, dict | list):
        return any(_refers(value, mark) for value in (node.values() if isinstance(node, dict) else node))
    return isinstance(node, str) and mark in node


def _fill_in(node: Any, resolved: Any, mark: str) -> Any:
    """Return a node whose values with the mark are those of the same node with all references filled in."""
    if isinstance(node, dict):
        return {key: _fill_in(value, resolved[key], mark) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill_in(value, other, mark) for value, other in zip(node, resolved, strict=True)]
    return resolved if _refers(node, mark) else node


def _as_components(section: Any) -> DictConfig:
    if not isinstance(section, DictConfig):
        raise ValueError(f"components must be a mapping of sections, got '{section}'")
    return section


def _take_replaced(section: DictConfig, config: DictConfig) -> DictConfig:
    """Return a section that goes on top of a config, where ${a.b} inside its own key a.b is what the config has there.

    So members' training data can wrap those of the base model, `dataset: ${data.params.train}`, whatever these are.
    """
    return OmegaConf.create(_fill_replaced(OmegaConf.to_container(section, resolve=False), "", config))


def _fill_replaced(node: Any, path: str, config: DictConfig) -> Any:
    if isinstance(node, dict):
        return {key: _fill_replaced(value, f"{path}{key}.", config) for key, value in node.items()}
    if isinstance(node, str) and node.startswith("${") and path.startswith(f"{node[2:-1]}."):
        found = OmegaConf.select(config, node[2:-1])
        return OmegaConf.to_container(found, resolve=False) if OmegaConf.is_config(found) else node
    return node


def point_data(config: DictConfig, component: int | None, root: str = "", synset_bins: bool = False) -> DictConfig:
    """A config whose training data are those of a component, or whose data lie below another root folder.

    `component` goes where the training set's parameters name `component` or `comp_numb`, and `synset_bins` where a data
    set's do.

    Raises:
        ValueError: if `synset_bins` is given and no data set takes it.
    """
    config = config.copy()
    takes = []
    for split in ("train", "validation"):
        params = OmegaConf.select(config, f"data.params.{split}.params")
        if params is None:
            continue
        if root:
            own = params
            while "dataset" in own and OmegaConf.is_dict(own.dataset):  # a subset of a data set
                own = own.dataset.params
            own["overwrite_root" if "overwrite_root" in own or "data_root" in own else "root"] = root
        if component is not None and split == "train":
            params.update({key: component for key in ("component", "comp_numb") if key in params})
        if synset_bins and "synset_bins" in params:
            params.synset_bins = True
            takes.append(split)
    if synset_bins and not takes:
        raise ValueError(
            "--synset_bins acts on data sets whose params name synset_bins, and neither data.params.train nor "
            "validation does: leave it out, or add synset_bins: false to data.params.train.params"
        )
    return config


def learning_rate(config: DictConfig, scale: bool, devices: int, accumulate: int) -> float:
    """`model.learning_rate` as it is; else the base rate, with `scale` times devices * batch size * accumulation.

    Raises:
        ValueError: if the config lacks one of them, or gives two rates that differ.
    """
    keys = ("model.learning_rate", "model.base_learning_rate", "data.params.batch_size")
    rate, base, batch = (OmegaConf.select(config, key) for key in keys)
    if rate is None and (base is None or (scale and batch is None)):
        raise ValueError("the config needs model.base_learning_rate, and data.params.batch_size to scale it by")
    scaled = base if base is None or not scale else base * accumulate * devices * (batch or 1)
    if None not in (rate, base) and not math.isclose(rate, scaled):
        raise ValueError(
            f"the config gives two learning rates: model.learning_rate {rate:g}, taken as it is, and "
            f"model.base_learning_rate {base:g}, which would make {scaled:g}; drop one: "
            "model.base_learning_rate=null or model.learning_rate=null"
        )
    return float(scaled if rate is None else rate)


def shared_batch(config: DictConfig, parts: int) -> DictConfig:
    """A config whose `data.params.global_batch_size`, where it has one, is shared out to so many devices and parts.

    Raises:
        ValueError: if it comes with a batch size of one device, or does not divide.
    """
    whole = OmegaConf.select(config, "data.params.global_batch_size")
    if whole is None:
        return config
    if "batch_size" in config.data.params:
        raise ValueError("give data.params.batch_size, of one device, or global_batch_size, of all: not both")
    if whole % parts:
        raise ValueError(
            f"data.params.global_batch_size {whole} does not divide by {parts} (devices times "
            "accumulate_grad_batches): choose another number of devices, or accumulate"
        )
    config = config.copy()
    del config.data.params.global_batch_size
    config.data.params.batch_size = whole // parts
    return config
