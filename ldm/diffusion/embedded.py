"""Embedded conditions in latent-diffusion's forms: tensors, lists of them, mappings of lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_condition(cond: Any, batch_size: int) -> Any:
    """Return an embedded condition as it came.

    Raises:
        ValueError: if it is neither a tensor of so many images nor a list or a mapping of such.
    """
    parts = list(cond.values()) if isinstance(cond, Mapping) else cond if isinstance(cond, (list, tuple)) else None
    if parts:
        for part in parts:
            check_condition(part, batch_size)
    elif cond is not None and (not isinstance(cond, Tensor) or cond.shape[0] != batch_size):
        raise ValueError(
            f"conditioning must be an embedded context of {batch_size} images [B, L, D], or latent-diffusion's "
            f"mapping of lists of such; got {describe_condition(cond)}"
        )
    return cond


def join_conditions(first: Any, second: Any) -> Any:
    """Return two embedded conditions as one of both batches, the first one's before the second's.

    Args:
        first, second: tensors [B, ...], lists of such, or mappings of these by equal keys (latent-diffusion's
            `{"c_crossattn": [c], "c_concat": [z]}`); None goes with None.

    Raises:
        ValueError: if the two are not of one form.
    """
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: join_conditions(first[name], second[name]) for name in first}
    lists = isinstance(first, (list, tuple)) and isinstance(second, (list, tuple))
    if lists and len(first) == len(second):
        return [join_conditions(one, other) for one, other in zip(first, second, strict=True)]
    raise ValueError(
        f"a condition and its null must be of one form to be guided, got {describe_condition(second)} "
        f"and {describe_condition(first)}"
    )


def describe_condition(cond: Any) -> str:
    """Return the form of an embedded condition in words: a tensor's shape, a list's length, a mapping's keys."""
    if isinstance(cond, Tensor):
        return f"a tensor {list(cond.shape)}"
    if isinstance(cond, Mapping):
        return f"a mapping of {', '.join(map(str, cond)) or 'nothing'}"
    return f"a list of {len(cond)}" if isinstance(cond, (list, tuple)) else type(cond).__name__
