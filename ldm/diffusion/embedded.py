"""Embedded conditions in latent-diffusion's forms: tensors, lists of them, mappings of lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def describe_condition(cond: Any) -> str:
    """Return the form of an embedded condition in words: a tensor's shape, a list's length, a mapping's keys."""
    if isinstance(cond, Tensor):
        return f"a tensor {list(cond.shape)}"
    if isinstance(cond, Mapping):
        return f"a mapping of {', '.join(map(str, cond)) or 'nothing'}"
    return f"a list of {len(cond)}" if isinstance(cond, (list, tuple)) else type(cond).__name__
