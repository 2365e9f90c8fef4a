"""A folder as diffusers' `save_pretrained` writes it: which networks it holds, their arguments, and their weights.

Only JSON files and tensors are read. Nothing of the folder is executed, and nothing that a config names is imported
but the classes of `ldm.util.DIFFUSERS_TARGETS`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import load_state_dict
from ldm.files import read_mapping
from ldm.interop.library import find_class, require_diffusers

log = logging.getLogger(__name__)

INDEX = "model_index.json"
CONDITIONING = "conditioning.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
NETWORK_PARTS = ("unet", "transformer")
FIRST_STAGES = ("vae", "vqvae")
DOWNLOADED = ("*.json", "*.txt", "*.model", "*.safetensors")
# Names of attention layers in weights written before diffusers 0.15.
FORMER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What the published folders of DiT and PixArt call their network, and its present class by its `norm_type`.
FORMER_TRANSFORMER = "Transformer2DModel"
PRESENT_TRANSFORMERS = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
# Values of arguments that change nothing where the installed version does not know them.
WITHOUT_EFFECT = (None, False, "default")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Component:
    """One network of a folder.

    Args:
        folder: holds its config and weights.
        class_name: of diffusers.
        config: arguments of the class's constructor.
    """

    folder: Path
    class_name: str
    config: Mapping[str, Any]

    @property
    def target(self) -> dict[str, Any]:
        """The component as a config of ours names it."""
        return {"target": f"diffusers.{self.class_name}", "params": dict(self.config)}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files of its weights: safetensors, in several parts where an index says so, or a torch pickle.

        Raises:
            FileNotFoundError: if there are none.
        """
        for suffix in ("", ".fp16"):
            index = self.folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
            if index.is_file():
                parts = sorted(set(_read_config(index)["weight_map"].values()))
                # A name in the index is that of a file beside it, whatever folders it mentions.
                return [self.folder / Path(part).name for part in parts]
            for end in (f"{suffix}.safetensors", f"{suffix}.bin"):
                file = self.folder / f"{WEIGHTS}{end}"
                if file.is_file():
                    return [file]
        raise FileNotFoundError(f"{self.folder} holds no weights: expected {WEIGHTS}.safetensors (or .bin)")

    def read_weights(self) -> dict[str, Tensor]:
        """Return its state dict, floating-point tensors in float32, attention layers under their present names."""
        state: dict[str, Tensor] = {}
        for file in self.weight_files:
            state |= load_state_dict(file)
        return {_present_name(name): _single(tensor) for name, tensor in state.items()}


@dataclass(frozen=True)
class ModelFolder:
    """The networks of a folder and what it says of noise and conditions.

    Args:
        root: the folder.
        pipeline: class name of the pipeline that it is written for; empty for a network alone.
        network: what predicts noise.
        first_stage: None for a model of pixels.
        scheduler: scheduler_config.json.
        conditioning: conditioning.json, which `decu export` writes where no pipeline of diffusers says it.
        class_names: of the pipeline's classes, where it names them.
    """

    root: Path
    pipeline: str
    network: Component
    first_stage: Component | None
    scheduler: Mapping[str, Any]
    conditioning: Mapping[str, Any]
    class_names: tuple[str, ...] = ()


def is_model_folder(path: str | Path) -> bool:
    """Whether a path is a folder of diffusers: one with model_index.json, or with the config of a network."""
    folder = Path(path)
    configs = [folder / "config.json", *(folder / name / "config.json" for name in NETWORK_PARTS)]
    known = any(config.is_file() and "_diffusers_version" in _read_config(config) for config in configs)
    return known or (folder / INDEX).is_file()


def read_folder(path: str | Path) -> ModelFolder:
    """Read what a folder, or a name on the hub, holds; weights are left where they are.

    Raises:
        FileNotFoundError: if it is no folder of diffusers.
        ValueError: if diffusers is not installed, or a class is none of those that are taken.
    """
    require_diffusers()
    root = find_folder(path)
    index = _read_config(root / INDEX) if (root / INDEX).is_file() else {}
    name = next((name for name in NETWORK_PARTS if (root / name / "config.json").is_file()), None)
    stage = next((name for name in FIRST_STAGES if (root / name / "config.json").is_file()), None)
    if name is None and not (root / "config.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no network: expected config.json in one of {list(NETWORK_PARTS)}, or in it"
        )
    return ModelFolder(
        root,
        str(index.get("_class_name", "")),
        _read_component(root if name is None else root / name),
        None if stage is None else _read_component(root / stage),
        _read_scheduler_file(root),
        _read_config(root / CONDITIONING) if (root / CONDITIONING).is_file() else {},
        _read_class_names(index),
    )


def _read_class_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of classes 0 .. K - 1 by DiT's `id2label`; none where it is absent, or leaves a class out."""
    named = index.get("id2label") or {}
    numbers = [str(number) for number in range(len(named))]
    return tuple(str(named[number]) for number in numbers) if set(numbers) == set(named) else ()


def find_folder(path: str | Path) -> Path:
    """Return a local folder: `path` itself, or what the hub has under this name, fetched where there is a network.

    Raises:
        FileNotFoundError: if there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(str(path)):
        raise FileNotFoundError(f"no folder {path}: give one that diffusers' save_pretrained wrote, or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"there is no folder {path}, and the hub gave none of this name: {reason}") from None


def _read_component(folder: Path) -> Component:
    """Read the config of one network, of its present class; arguments that this does not know are left out."""
    found = _read_config(folder / "config.json")
    name = str(found.get("_class_name"))
    if name == FORMER_TRANSFORMER:
        name = PRESENT_TRANSFORMERS.get(str(found.get("norm_type")), name)
    cls = find_class(name)
    known = {argument for base in cls.__mro__ for argument in inspect.signature(base.__init__).parameters}
    given = {key: value for key, value in found.items() if not key.startswith("_")}
    unknown = sorted(key for key, value in given.items() if key not in known and value not in WITHOUT_EFFECT)
    if unknown:
        log.warning("%s: %s does not know %s; left out", folder, name, ", ".join(unknown))
    return Component(folder, name, {key: value for key, value in given.items() if key in known})


def _read_scheduler_file(root: Path) -> dict[str, Any]:
    places = (root / "scheduler" / SCHEDULER, root / SCHEDULER)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{root} holds no {SCHEDULER}, which says what the network was trained to predict")
    return _read_config(found)


def _read_config(path: Path) -> dict[str, Any]:
    return read_mapping(path, "a config of diffusers", "fetch the folder again")


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _present_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in FORMER_ATTENTION:
        parts[-2] = FORMER_ATTENTION[parts[-2]]
    return ".".join(parts)
