"""A model or an ensemble as a folder that others open: safetensors, a config, a card; and the hub that carries it.

    config.yaml, model.safetensors                              a model
    ensemble.yaml, base.safetensors, member_000.safetensors     an ensemble
    README.md, record.json                                      what it is, and how it was made

Only tensors, YAML and text are written, and nothing of a folder is executed when it is opened: what its config names is
looked up among the classes of this project (`ldm.trust`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.checkpoint import averaged, load_state_dict, save_tensors, sha256
from ldm.ensembles.storage import read_ensemble, write_ensemble
from ldm.records import refuse_existing
from ldm.training.config import load_config
from ldm.training.config_keys import check_config
from ldm.trust import accept_config, escape
from ldm.util import atomic_write

HUB = "hf://"
WEIGHTS_FILE, CONFIG_FILE, BASE_FILE = "model.safetensors", "config.yaml", "base.safetensors"
# Sections of a config that say where the files of one machine lie, or how a run went.
LOCAL_SECTIONS = ("data", "paths", "lightning", "run", "components")
# Files that are fetched: none that could hold code.
FETCHED = ("*.safetensors", "*.yaml", "*.json", "*.md")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def make_shared_config(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return what of a config belongs to a model anywhere: its references filled in, without files of this machine."""
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    plain = escape(OmegaConf.to_container(node, resolve=True))
    assert isinstance(plain, dict)
    found = {str(name): section for name, section in plain.items() if name not in LOCAL_SECTIONS}
    _drop_files(found)
    return found


def _drop_files(node: Any) -> None:
    """Take the files of weights out of a config, at every depth: those of the folder hold all parts.

    What a training was aligned with is a file as well, and no part of the model.
    """
    if isinstance(node, dict):
        for key in ("ckpt_path", "pretrained_path", "alignment_config"):
            node.pop(key, None)
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _drop_files(value)


def write_shared_model(
    folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], overwrite: bool = False
) -> Path:
    """Write a model's weights and config.

    Args:
        folder: where they go.
        state: the model's state dict.
        config: of its training.

    Raises:
        FileExistsError: if there is a model and `overwrite` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_existing([folder / WEIGHTS_FILE, folder / CONFIG_FILE], overwrite)
    save_tensors(state, folder / WEIGHTS_FILE, {"format": "pt"}, overwrite=True)
    with atomic_write(folder / CONFIG_FILE, overwrite=True) as partial:
        partial.write_text(OmegaConf.to_yaml(OmegaConf.create(make_shared_config(config))), encoding="utf-8")
    return folder


def write_shared_ensemble(source: str | Path, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an ensemble with its base model, so that the folder needs no other.

    Args:
        source: the folder of the ensemble.
        folder: where it goes.

    Raises:
        FileExistsError: if there is an ensemble and `overwrite` is False.
        ValueError: if the source holds none, or its base checkpoint is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_existing([folder / BASE_FILE, folder / "ensemble.yaml"], overwrite)
    ensemble = read_ensemble(source)
    # Members stand on the averages of the base, which are all that is needed of it.
    state = averaged(load_state_dict(ensemble.base_checkpoint()))
    save_tensors(state, folder / BASE_FILE, {"format": "pt"}, overwrite=True)
    overrides = ensemble.members.overrides
    heads = [{name: value[number] for name, value in overrides.items()} for number in range(len(ensemble.members))]
    spec = {
        **ensemble.spec,
        "trunk": {"path": BASE_FILE, "sha256": sha256(folder / BASE_FILE)},
        "config": make_shared_config(ensemble.spec["config"]),
    }
    return write_ensemble(folder, spec, heads, overwrite)


def is_shared_model(path: str | Path) -> bool:
    """Whether a path is a folder that `write_shared_model` wrote."""
    folder = Path(path)
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_shared_config(folder: Path) -> DictConfig:
    """Read and check the config of a shared model; what it names must be known.

    Raises:
        ValueError: naming a class that is not, or a key that nothing reads.
    """
    file = folder / CONFIG_FILE
    config = accept_config(load_config([str(file)]), file)
    check_config(config, ("model",), f"{file}: ")
    return config


def find_shared(path: str | Path, endpoint: str | None = None) -> Path:
    """Return the folder of a shared model or ensemble: `path` itself, or what the hub has as hf://OWNER/NAME.

    Args:
        endpoint: address of the hub; huggingface_hub's where None.

    Raises:
        ValueError: for another name, or if the extra `hub` is not installed.
        FileNotFoundError: if the hub has nothing of this name.
    """
    if not str(path).startswith(HUB):
        return Path(path)
    name = check_hub_name(str(path))
    hub = require_hub()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(FETCHED), endpoint=endpoint))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"the hub gave nothing for {path}: {reason}") from None


def push_folder(folder: str | Path, name: str, private: bool = False, endpoint: str | None = None) -> str:
    """Send a folder to the hub as the model repository OWNER/NAME, which is made where it is not there.

    Returns:
        the repository's address.

    Raises:
        ValueError: for another name, if the extra `hub` is not installed, or if the hub refuses.
    """
    name = check_hub_name(name)
    hub = require_hub()
    api = hub.HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model, config, cards and record")
    except (hub.errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the hub did not take {folder} as {name}: {reason} (a token comes from `hf auth login`, or HF_TOKEN)"
        ) from None
    return str(made)


def check_hub_name(name: str) -> str:
    """Return OWNER/NAME of a name on the hub, with or without hf:// before it.

    Raises:
        ValueError: for anything else.
    """
    bare = name.removeprefix(HUB)
    if not _NAME.fullmatch(bare):
        raise ValueError(f"a name on the hub is OWNER/NAME, got '{name}'")
    return bare


def require_hub() -> ModuleType:
    """Return huggingface_hub.

    Raises:
        ValueError: naming the extra, where it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ValueError(f"the hub needs the extra `hub`: pip install 'decu-uncertainty[hub]' ({error})") from None
    return huggingface_hub
