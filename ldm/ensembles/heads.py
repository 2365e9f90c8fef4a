"""Heads: the named parts of a model that each ensemble member trains, while all else stays as it was.

A head is a tuple of state-dict patterns (`fnmatch` wildcards). A model's `head_patterns` say which it has by name, as
its network's parts are (`{"class_embedding": ("cond_stage_model.embedding.*",), ...}`); any list of patterns does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.ensembles.record import INITIALISATIONS
from ldm.ensembles.record import MemberRecord as MemberRecord
from ldm.ensembles.tables import ClassTables
from ldm.modules.parts import Parts

# Endings of the names of tables.
TABLE_NAMES = ("embedding.weight", "label_emb.weight", "embedding_table.weight")


class HasNamedParameters(Protocol):
    """Parameters by name, as every `nn.Module` has them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter with its name."""


def name_heads(parts: Parts, tables: ClassTables) -> dict[str, tuple[str, ...]]:
    """Return the patterns of the heads that a model has by name.

    They are class_embedding, token_embedding, output, time_embedding, lora.

    Args:
        parts: of the model's network.
        tables: of the model.
    """
    factors = (tables.low_rank or ())[:2]
    tables_alone = [name for name in tables.axes if name not in factors]
    named = {
        "class_embedding": tuple(_table_pattern(name, tables.axes[name]) for name in tables_alone),
        "token_embedding": tuple(_table_pattern(name, 0) for name in parts.token_tables),
        "output": parts.output,
        "time_embedding": parts.time_embedding,
        "lora": tuple(f"{name.removesuffix('A')}*" for name in factors[:1]),
    }
    return {head: patterns for head, patterns in named.items() if patterns}


def _table_pattern(name: str, axis: int) -> str:
    """Return the pattern of a table: of all parameters of its module, or its own name where it is no module's.

    Of a linear map of one-hot labels, whose columns count the classes, it is the columns: all classes share its bias.
    """
    return f"{name.removesuffix('.weight')}.*" if name.endswith(".weight") and axis == 0 else name


def resolve_patterns(heads: str | Sequence[str], named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Turn head names and patterns into patterns: `["output", "model.x.*"]` -> `("model...out.*", "model.x.*")`.

    Raises:
        ValueError: for a name that the model does not have.
    """
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
    """Return the names that fit any of the patterns, in their order.

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


def freeze_all_but(module: HasNamedParameters, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let only the heads' parameters train; return them by name.

    Raises:
        ValueError: if a pattern fits no parameter, or only such as are empty.
    """
    parameters = dict(module.named_parameters())
    chosen = set(select(parameters, patterns))
    for pattern in patterns:
        if not any(parameters[name].numel() for name in chosen if fnmatchcase(name, pattern)):
            raise ValueError(f"head pattern '{pattern}' trains no parameter: all that it fits are empty")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return {name: parameters[name] for name in parameters if name in chosen}


def split(state: Mapping[str, Tensor], patterns: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (heads, all else)."""
    chosen = set(select(state, patterns))
    heads = {name: value for name, value in state.items() if name in chosen}
    return heads, {name: value for name, value in state.items() if name not in chosen}


def merge(base: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a base model with a member's heads in place of its own.

    Raises:
        ValueError: if a head has a name or shape that the base model does not know.
    """
    for name, value in heads.items():
        if name not in base:
            raise ValueError(
                f"head '{name}' is not in the base model it should be merged into: was it trained on another model?"
            )
        if base[name].shape != value.shape:
            raise ValueError(f"head '{name}' has shape {tuple(value.shape)}, the base model {tuple(base[name].shape)}")
    return {**base, **heads}


def row_deviations(tensor: Tensor) -> Tensor:
    """Standard deviation of each row [K, 1, ...], where a row is all of a tensor but its first axis.

    A vector is one row [1]; rows of a single entry give its size.
    """
    flat = tensor.detach().reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.detach()[None]
    deviation = flat.std(1, unbiased=False) if flat.shape[1] > 1 else flat.abs().mean(1)
    return deviation.reshape(-1, *[1] * (tensor.ndim - 1))


@torch.no_grad()
def initialise(
    parameters: Mapping[str, Tensor],
    how: str,
    generator: torch.Generator,
    noise: float = 0.5,
    rows: Mapping[str, Sequence[int]] | None = None,
    tables: Sequence[str] = (),
) -> None:
    """Set a member's starting point, in place.

    `pretrained` keeps the loaded values; `perturbed` adds N(0, (noise * row standard deviation)^2), where a row is
    all of a tensor but its first axis (the whole tensor for a vector), and `anchored` starts as it does; `random` draws
    N(0, 1) for tables and N(0, 1 / fan_in) for the rest (biases are 0, scales of norms 1). `rows` names the rows of a
    tensor that keep their values: those of the shared null condition. `tables` names those of classes; any
    other tensor is a table where its module is called so.

    Raises:
        ValueError: if `how` is none of these.
    """
    if how not in INITIALISATIONS:
        raise ValueError(f"head initialisation must be one of {INITIALISATIONS}, got '{how}'")
    for name, tensor in parameters.items():
        row = None if rows is None or name not in rows else list(rows[name])
        kept = None if row is None else tensor[row].clone()
        draw = torch.randn(tensor.shape, generator=generator).to(tensor)
        if how in ("perturbed", "anchored"):
            tensor.add_(noise * row_deviations(tensor) * draw)
        elif how == "random":
            if tensor.ndim > 1:
                table = name in tables or name.endswith(TABLE_NAMES)
                tensor.copy_(draw if table else draw / tensor[0].numel() ** 0.5)
            else:
                tensor.fill_(float(name.endswith("weight")))
        if row is not None and kept is not None:
            tensor[row] = kept


@torch.no_grad()
def initialise_low_rank(
    a: Tensor, b: Tensor, deviations: Tensor, how: str, generator: torch.Generator, null: int | None = None
) -> tuple[Tensor, Tensor]:
    """Set a member's low-rank correction B A of a table [K, D], in place; return the deviations of the two draws.

    `pretrained` (as published): A ~ N(0, 1), B = 0, so the rows are the table's, and members differ in A.
    `perturbed`, `anchored`: A[:, c] ~ N(0, deviations[c]^2), B ~ N(0, 1 / R), so that an entry of row c's correction
    has mean 0 and variance deviations[c]^2. `random`: the same with deviations of 1.

    Args:
        a: [R, K]; b: [D, R]; deviations: of the rows' perturbation [K].
        null: column of A that is zero, so that this class has no correction while A's gradient there is zero.

    Returns:
        (of A [1, K], of B [1, 1]).

    Raises:
        ValueError: if `how` is no initialisation.
    """
    if how not in INITIALISATIONS:
        raise ValueError(f"head initialisation must be one of {INITIALISATIONS}, got '{how}'")
    spread = deviations if how in ("perturbed", "anchored") else torch.ones_like(deviations)
    spread = spread.to(a)[None].clone()  # [1, K]
    if null is not None:
        spread[:, null] = 0
    a.copy_(spread * torch.randn(a.shape, generator=generator).to(a))
    width = torch.full((1, 1), 0.0 if how == "pretrained" else len(a) ** -0.5).to(b)
    b.copy_(width * torch.randn(b.shape, generator=generator).to(b))
    return spread, width
