"""Heads: the named parts of a model that train per ensemble member while the trunk stays frozen.

A head is a tuple of state-dict patterns (`fnmatch` wildcards). A model names its own through `head_patterns`
(`{"class_embedding": ("cond_stage_model.embedding.*",), ...}`); any list of patterns does as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

INITIALISATIONS = ("pretrained", "perturbed", "random")
NULL_CLASSES = ("shared", "trained", "random")


def resolve_patterns(heads: str | Sequence[str], named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Turn head names and patterns into patterns: `["output", "model.x.*"]` -> `("model...out.*", "model.x.*")`."""
    heads = [heads] if isinstance(heads, str) else list(heads)
    patterns: list[str] = []
    for head in heads:
        if head in named:
            patterns.extend(named[head])
        elif "." in head or "*" in head:
            patterns.append(head)
        else:
            raise ValueError(f"unknown head '{head}': this model has {sorted(named)}; or give a state-dict pattern")
    return tuple(patterns)


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that fit any of the patterns, in their order.

    Raises:
        ValueError: if a pattern fits no name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"head pattern '{pattern}' fits no parameter of the model; for example '{names[0]}' does exist"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def freeze_trunk(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let only the heads' parameters train; return them by name."""
    parameters = dict(module.named_parameters())
    chosen = set(select(parameters, patterns))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return {name: parameters[name] for name in parameters if name in chosen}


def split(state: Mapping[str, Tensor], patterns: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (heads, trunk)."""
    chosen = set(select(state, patterns))
    heads = {name: value for name, value in state.items() if name in chosen}
    return heads, {name: value for name, value in state.items() if name not in chosen}


def merge(trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the heads' tensors in place of the trunk's.

    Raises:
        ValueError: if a head has a name or shape that the trunk does not know.
    """
    for name, value in heads.items():
        if name not in trunk:
            raise ValueError(
                f"head '{name}' is not in the trunk it should be merged into: was it trained on another model?"
            )
        if trunk[name].shape != value.shape:
            raise ValueError(f"head '{name}' has shape {tuple(value.shape)}, the trunk {tuple(trunk[name].shape)}")
    return {**trunk, **heads}


@torch.no_grad()
def initialise(
    parameters: Mapping[str, Tensor],
    how: str,
    generator: torch.Generator,
    noise: float = 0.5,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Set a member's starting point, in place.

    `pretrained` keeps the loaded values; `perturbed` adds N(0, (noise * row standard deviation)^2), where a row is
    all of a tensor but its first axis (the whole tensor for a vector); `random` draws N(0, 1) for tables and
    N(0, 1 / fan_in) for the rest (biases are 0, scales of norms 1). `rows` names a row per tensor that keeps its value:
    the shared null class of an embedding table.

    Raises:
        ValueError: if `how` is none of these.
    """
    if how not in INITIALISATIONS:
        raise ValueError(f"head initialisation must be one of {INITIALISATIONS}, got '{how}'")
    for name, tensor in parameters.items():
        kept = None if rows is None or name not in rows else tensor[rows[name]].clone()
        draw = torch.randn(tensor.shape, generator=generator).to(tensor)
        flat = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor[None]
        if how == "perturbed":
            deviation = flat.std(1, unbiased=False) if flat.shape[1] > 1 else flat.abs().mean(1)
            tensor.add_(noise * deviation.reshape(-1, *[1] * (tensor.ndim - 1)) * draw)
        elif how == "random":
            if tensor.ndim > 1:
                table = "embedding" in name or "label_emb" in name
                tensor.copy_(draw if table else draw / flat.shape[1] ** 0.5)
            else:
                tensor.fill_(float(name.endswith("weight")))
        if kept is not None:
            tensor[rows[name]] = kept


@dataclass(frozen=True)
class Component:
    """Which ensemble member a run trains, from which trunk, and how its heads start.

    `null_class` is "shared" (the pretrained row, one for all members, never trained), "trained" (each member's own, by
    label dropout), or "random" (each member's own start, never trained: as published).
    """

    index: int
    seed: int
    trunk_path: str
    trunk_sha256: str
    heads: tuple[str, ...]
    patterns: tuple[str, ...]
    init: str = "perturbed"
    noise: float = 0.5
    null_class: str = "shared"

    def __post_init__(self):
        if self.null_class not in NULL_CLASSES:
            raise ValueError(f"heads.null_class must be one of {NULL_CLASSES}, got '{self.null_class}'")
        if self.init not in INITIALISATIONS:
            raise ValueError(f"heads.init must be one of {INITIALISATIONS}, got '{self.init}'")

    def as_dict(self) -> dict[str, object]:
        """Plain containers, for checkpoints and YAML."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
