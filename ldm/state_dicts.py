"""Names in state dicts: what other programs put before them or around them, and messages of a few names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What a parallel, compiled or averaged module puts before the names of the module in it.
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "ema_model.")
# Entries of a file in which trainings keep the weights, and their averages.
WEIGHT_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGE_ENTRIES = ("ema", "ema_state_dict", "model_ema", "params_ema", "ema_model")
SHOWN_NAMES = 5
# Beginnings of the names that blocks have in networks of diffusers.
DIFFUSERS_KEYS = ("down_blocks.", "encoder.down_blocks.", "transformer_blocks.")


def name_some(names: Iterable[Any], shown: int = SHOWN_NAMES) -> str:
    """Return the first few names as words, and how many more there are."""
    given = [str(name) for name in names]
    more = f" and {len(given) - shown} more" if len(given) > shown else ""
    return ", ".join(given[:shown]) + more


def is_state_dict(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors, at least one."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def choose_weights(content: Mapping[str, Any], averaged: bool = False) -> Mapping[str, Any]:
    """Return the state dict among the entries of a file, {model, ema, opt} for example; the file's own where none is.

    Args:
        averaged: take the averages, where it has any.
    """
    if "state_dict" in content or is_state_dict(content):
        return content.get("state_dict", content)
    known = (*AVERAGE_ENTRIES, *WEIGHT_ENTRIES) if averaged else (*WEIGHT_ENTRIES, *AVERAGE_ENTRIES)
    found = next((name for name in known if is_state_dict(content.get(name))), None)
    return content if found is None else content[found]


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what wrappers put before all names, and a compiled module before those in it."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while plain and (wrapper := next((one for one in WRAPPERS if all(map(_begins(one), plain))), None)):
        plain = {name.removeprefix(wrapper): value for name, value in plain.items()}
    return plain if len(plain) == len(state) else dict(state)


def _begins(prefix: str) -> Any:
    return lambda name: name.startswith(prefix)


def fit_names(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict under the names of a module, where it has them but for one prefix on all of them.

    Args:
        own: the names of the module.
    """
    own = set(own)
    if own & state.keys():
        plain = {name: name.replace("_orig_mod.", "") for name in state}
        return {plain[name] if name not in own and plain[name] in own else name: one for name, one in state.items()}
    candidates = [plain_names(state), *(shorten(plain_names(state), prefix) for prefix in find_prefixes(state))]
    best = max(candidates, key=lambda names: len(own & names.keys()))
    return best if own & best.keys() else dict(state)


def bare_names(state: Mapping[str, Tensor], firsts: Sequence[str]) -> dict[str, Tensor] | None:
    """Return a state dict without the one prefix on all its names behind which a network's own begin; None for others.

    Args:
        firsts: beginnings of the names of the first layers, by which the network is known.
    """
    plain = plain_names(state)
    for prefix in ("", *find_prefixes(plain)):
        if any(name.removeprefix(prefix).startswith(tuple(firsts)) for name in plain):
            return shorten(plain, prefix)
    return None


def shorten(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a state dict whose names lack a prefix that all of them have."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def find_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted beginnings that all names share, the shortest first."""
    names = list(plain_names(state))
    parts: Sequence[str] = names[0].split(".")[:-1] if names else []
    prefixes = [".".join(parts[: count + 1]) + "." for count in range(len(parts))]
    return [prefix for prefix in prefixes if all(map(_begins(prefix), names))]


def refuse_diffusers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that a file is not in the names of diffusers while the network is not.

    Raises:
        ValueError: saying what takes such a file.
    """
    found = next((name for name in state if name.startswith(DIFFUSERS_KEYS)), None)
    if found is not None and not any(name.endswith(found) for name in own):
        raise ValueError(
            f"the file holds a network of diffusers ('{found}'), whose config lies beside it: load its folder, on the "
            "command line by --run FOLDER, in Python by load_model(diffusers=FOLDER)"
        )


def is_coded(value: Tensor, own: Tensor) -> bool:
    """Whether the numbers of a tensor stand for others, so that to copy them into `own` would give wrong ones."""
    bytes_alone = value.dtype in (torch.uint8, torch.int8) and own.is_floating_point() and value.numel() > 1
    return value.layout != torch.strided or value.is_complex() or value.is_quantized or bytes_alone
