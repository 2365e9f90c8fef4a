"""Reading and writing of weights: the only `torch.load`, which never executes code; writes are atomic.

State dicts are plain `{name: tensor}`. Torch pickles (`.ckpt`, `.pth`, `.pt`), `.safetensors` files and the modules
that NVIDIA pickles whole (`.pkl`) are read alike.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.file_kinds import SAFETENSORS, find_kind
from ldm.pickles import BROKEN_PICKLE, read_pickled_module
from ldm.state_dicts import choose_weights, fit_names, is_coded, name_some, refuse_diffusers
from ldm.util import atomic_write


class _CallbackKey:
    """Stands in for the callback classes that Lightning 1.x used as dictionary keys in its checkpoints."""


CALLBACK_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)


# Where NVIDIA's pickles hold the averaged network.
PICKLED_ENTRY = "ema"


def _read_storage(content: bytes) -> Any:
    """Read a storage as torch pickles it inside other pickles, on the CPU."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return everything in a checkpoint file, on the CPU, without running any code stored in it.

    Nearly all files hold a dictionary; DDIM's training writes a list. See `load_content`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or nothing by name.
    """
    content = load_content(path)
    if not isinstance(content, (Mapping, list)):
        raise ValueError(f"{path} is not a state dict: it holds a {type(content).__name__}; give a checkpoint")
    nameless = next((key for key in content if not isinstance(key, str)), None) if isinstance(content, dict) else None
    if nameless is not None:
        raise ValueError(f"{path} is no checkpoint: one of its entries has the name {nameless!r}, expected words")
    return content  # type: ignore[return-value]


def load_content(path: str | os.PathLike) -> Any:
    """Return what a file of tensors holds, a single tensor included, without running any code stored in it.

    What a file is follows from its content, not from its name, but for NVIDIA's pickles.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is something else (with what it is), holds something other than tensors and plain
            containers, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder, and a checkpoint is a file: a run directory and a folder of diffusers are given as "
            "--run, in Python as load_model(FOLDER)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; check the path (model.params.ckpt_path, pretrained_path)")
    if find_kind(path) == SAFETENSORS:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is a damaged safetensors file: {error}; fetch it again") from None
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        module = read_pickled_module(path, PICKLED_ENTRY, _read_storage)
        return {"state_dict": module.state, "class_name": module.class_name}
    known: list[Any] = [(_CallbackKey, name) for name in CALLBACK_CLASSES]
    try:
        with torch.serialization.safe_globals(known), path.open("rb") as file:  # of a path torch believes the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        found = error.__context__ or error  # PyTorch's own text advises to run the code
        reason = str(found).split("\n")[0].split(". ")[0].rstrip(".")[:300] or "it ends too early"
        raise ValueError(
            f"{path} was refused: expected tensors and plain containers only (code in a checkpoint is never run), or "
            f"the file is damaged: {reason}. Save its tensors alone (docs/files.md says how), or fetch it again"
        ) from None
    return content


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the `{name: tensor}` of a file; a Lightning checkpoint's `state_dict` is unwrapped."""
    return unwrap_state_dict(load_checkpoint(path), path)


def unwrap_state_dict(content: Any, path: str | os.PathLike, averaged: bool = False) -> dict[str, Tensor]:
    """The `{name: tensor}` in what was read from a file, of {model, ema, opt} the weights or the averages.

    Raises:
        ValueError: if it is none, with what it holds.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a state dict: it holds a {type(content).__name__}")
    state = choose_weights(content, averaged)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is not a state dict: its state_dict is a {type(state).__name__}")
    bad = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if bad:
        raise ValueError(f"{path} is not a state dict: these entries are no tensors: {name_some(bad)}")
    return {str(name): value for name, value in state.items()}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if `name` equals a pattern, starts with one (as latent-diffusion's `ignore_keys`), or fits its wildcards."""
    return any(name.startswith(pattern) or fnmatchcase(name, pattern) for pattern in patterns)


def load_into(
    module: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = (), file: str | Path = "the state dict"
) -> None:
    """Copy `state` into `module`; every key must match but those under a name or pattern in `ignore`.

    One prefix on all names, and what a parallel or compiled module puts before its own, is taken off (`fit_names`).

    Args:
        module, state: what is filled, and with what.
        ignore: names and patterns that need not match.
        file: where the state comes from, for messages.

    Raises:
        ValueError: counting the missing, unknown and differently shaped keys, with the first few of each.
    """
    own, given = module.state_dict(), check_fit(module, state, ignore, file)
    module.load_state_dict({name: one for name, one in given.items() if own[name].shape == one.shape}, strict=False)


def check_fit(
    module: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = (), file: str | Path = "the state dict"
) -> dict[str, Tensor]:
    """Return `state` by the module's names, once every key matches; see `load_into`."""
    ignore = tuple(ignore)
    own = module.state_dict()
    refuse_diffusers(state, own)
    state = fit_names(state, own)
    given = {name: value for name, value in state.items() if not (matches(name, ignore) and name not in own)}
    missing = sorted(name for name in own.keys() - given.keys() if not matches(name, ignore))
    unknown = sorted(given.keys() - own.keys())
    shapes = [
        f"{name}: file {tuple(value.shape)}, model {tuple(own[name].shape)}"
        for name, value in given.items()
        if name in own and own[name].shape != value.shape and not matches(name, ignore)
    ]
    coded = [name for name, value in given.items() if name in own and is_coded(value, own[name])]
    if coded:
        raise ValueError(
            f"{file} holds sparse, complex or quantised tensors, and {type(module).__name__} takes plain numbers: "
            f"{name_some(coded)}"
        )
    if missing or unknown or shapes:
        lines = [
            f"{what}: {name_some(names)}"
            for what, names in (
                ("missing from the file", missing),
                ("unknown to the model", unknown),
                ("other shape", shapes),
            )
            if names
        ]
        raise ValueError(
            f"{file} does not fit {type(module).__name__} "
            f"({len(missing)} missing, {len(unknown)} unknown, {len(shapes)} of another shape): "
            + "; ".join(lines)
            + ("; ignore_keys in the params of the config leaves unknown names out" if unknown and not missing else "")
        )
    return given


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with latent-diffusion's EMA copies (`model_ema.*`) in place of the weights they average.

    The copies' names are those of `model.*` without dots; a state dict without copies comes back as it is.
    """
    copies = {name.removeprefix("model_ema."): value for name, value in state.items() if name.startswith("model_ema.")}
    kept = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    return {
        name: copies.get(name.removeprefix("model.").replace(".", ""), value) if name.startswith("model.") else value
        for name, value in kept.items()
    }


def restore_averaged(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict that holds the averages of a network (`model_ema.*`) and not the network, with both.

    Args:
        network: the module `model`, whose names the averages have without their dots.
    """
    if any(name.startswith("model.") for name in state) or not any(name.startswith("model_ema.") for name in state):
        return dict(state)
    copies = {name: state.get(f"model_ema.{name.replace('.', '')}") for name in network.state_dict()}
    return {**state, **{f"model.{name}": value for name, value in copies.items() if value is not None}}


def save_checkpoint(content: Mapping[str, Any], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write plain containers and tensors with `torch.save`, whole or not at all; equal contents give equal bytes."""
    with atomic_write(path, overwrite) as partial, partial.open("wb") as file:
        torch.save(dict(content), file)  # given a path, the file would hold the partial's name


# Suffixes of files of weights that torch writes.
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")


def check_suffix(path: str | os.PathLike, known: Sequence[str] = (*TORCH_SUFFIXES, ".safetensors")) -> Path:
    """Return the path of a file of weights whose name says what will be in it.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    if path.suffix not in known:
        raise ValueError(f"--out {path}: weights go to a file that ends in {' or '.join(known)}")
    return path


def save_state_dict(state: Mapping[str, Tensor], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write weights as the suffix says, whole or not at all: safetensors, or torch's file with `state_dict`.

    Raises:
        ValueError: for a suffix that says neither.
    """
    if check_suffix(path).suffix == ".safetensors":
        save_tensors(state, path, overwrite=overwrite)
    else:
        save_checkpoint({"state_dict": dict(state)}, path, overwrite)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None, overwrite=False
) -> None:
    """Write `{name: tensor}` and string metadata as safetensors, whole or not at all."""
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if place in places else value  # the format holds each tensor by itself
        places.add(place)
    content = save(plain, metadata=dict(metadata or {}))
    with atomic_write(path, overwrite) as partial:
        # safetensors itself would write to a file of its own name, which a kill leaves behind, and for its owner alone.
        partial.write_bytes(content)


def free_name(folder: str | os.PathLike, stem: str, suffix: str) -> str:
    """Return `{stem}{suffix}`, or with a number behind the stem where a folder has that already."""
    names = itertools.chain([f"{stem}{suffix}"], (f"{stem}_{count}{suffix}" for count in itertools.count(1)))
    return next(name for name in names if not (Path(folder) / name).exists())


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks; once in a process, unless its size or time changes."""
    state = os.stat(path)
    return _sha256(os.fspath(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over the names and values of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
