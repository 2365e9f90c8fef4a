"""The options of a member's heads, as `model.params.heads` of a config says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ldm.arguments import check_value, suggest_key
from ldm.checkpoint import sha256
from ldm.ensembles.heads import resolve_patterns, select
from ldm.ensembles.record import INITIALISATIONS, NULL_CLASSES, ROW_RATES, MemberRecord
from ldm.models.protocols import HasHeads
from ldm.modules.low_rank import ATTENTION
from ldm.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_range

DEFAULTS: Mapping[str, Any] = {
    "names": ("class_embedding",),
    "init": "perturbed",
    "noise": 0.5,
    "null_class": "shared",
    "anchor": None,
    "targets": "plain",
    "row_rates": "none",
    "row_cap": 2000.0,
    "lora": None,
}
LOW_RANK: Mapping[str, Any] = {"layers": (ATTENTION,), "rank": 4}
HEAD_TYPES: Mapping[str, Any] = {
    "names": str | Sequence[str],
    "init": Literal[INITIALISATIONS],
    "noise": float,
    "null_class": Literal[NULL_CLASSES],
    "anchor": float | None,
    "row_rates": Literal[ROW_RATES],
    "row_cap": float,
    "lora": Mapping[str, Any] | None,
}
HEAD_RANGES = {"noise": NOT_NEGATIVE, "anchor": POSITIVE, "row_cap": COUNT}
# Fits the factors of all layers, and those of an embedder's table.
FACTOR_PATTERN = "*.lora_[AB]"
# 2 sigma^2, sigma^2 = 0.05 being what a trained network's prediction of a unit-variance noise is off by.
DEFAULT_ANCHOR = 0.1


def check_head_options(options: Any, place: str = "model.params.heads") -> None:
    """Make sure that the options of heads exist, with their types and ranges, whether or not a member is trained.

    Raises:
        ValueError: naming the key, and what it takes.
    """
    check_value(options, Mapping[str, Any], place)
    for name, value in options.items():
        if name not in DEFAULTS:
            raise ValueError(f"{place} has an unknown key '{name}': {suggest_key(str(name), DEFAULTS)}")
        check_value(value, HEAD_TYPES.get(name, Any), f"{place}.{name}")
        check_range(name, value, HEAD_RANGES, f"{place}.{name}")
    if not options.get("names", "given"):
        raise ValueError(f"{place}.names is empty, so nothing would train: name a head, class_embedding for example")
    for name in options.get("lora") or {}:
        if name not in LOW_RANK:
            raise ValueError(f"{place}.lora has an unknown key '{name}': {suggest_key(str(name), LOW_RANK)}")


def describe_member(model: HasHeads, base: str, index: int, seed: int, options: Mapping[str, Any]) -> MemberRecord:
    """Complete the options of a member's heads, and check that they fit the model; arguments: see `start_member`.

    Raises:
        ValueError: for an unknown option, head or value, or one that the model has no use for.
    """
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown keys in model.params.heads: {sorted(unknown)}; known are {sorted(DEFAULTS)}")
    chosen = {**DEFAULTS, **options}
    names = chosen.pop("names")
    names = (names,) if isinstance(names, str) else tuple(names)
    if chosen["init"] == "anchored" and chosen["anchor"] is None:
        chosen["anchor"] = DEFAULT_ANCHOR
    for name in ("noise", "anchor", "row_cap"):
        chosen[name] = None if chosen[name] is None else float(chosen[name])
    factors = _read_low_rank(model, names, chosen.pop("lora"))
    plain = [name for name in names if name != "lora" or not factors]
    patterns = resolve_patterns(plain, model.head_patterns) + ((FACTOR_PATTERN,) if factors else ())
    record = MemberRecord(index, seed, str(base), sha256(base), names, patterns, **chosen, **factors)
    if record.null_class != "shared" and not model.class_tables.has_null:
        raise ValueError(f"heads.null_class is {record.null_class}, and the model has no null class: leave it out")
    return record


def _read_low_rank(model: HasHeads, names: Sequence[str], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `layers` and `rank` of the factors that the head lora adds; nothing if it is no head or the embedder's.

    Raises:
        ValueError: for options without that head, or of another name.
    """
    if "lora" not in names:
        if given is not None:
            raise ValueError("heads.lora says which layers the head 'lora' has: add lora to heads.names")
        return {}
    if given is None and model.class_tables.low_rank is not None:
        return {}
    chosen = {**LOW_RANK, **(given or {})}
    if chosen.keys() != LOW_RANK.keys():
        raise ValueError(f"heads.lora takes {sorted(LOW_RANK)}, got {sorted(chosen)}")
    layers = (chosen["layers"],) if isinstance(chosen["layers"], str) else tuple(chosen["layers"])
    return {"layers": layers, "rank": int(chosen["rank"])}


def own_names(model: HasHeads, options: Mapping[str, Any]) -> list[str]:
    """Return the parameters of the heads that a model has already: factors of the head lora are added at its start."""
    names = options.get("names", DEFAULTS["names"])
    known = [name for name in ([names] if isinstance(names, str) else names) if name != "lora"]
    if "lora" in model.head_patterns and "lora" in names:
        known.append("lora")
    return select(dict(model.named_parameters()), resolve_patterns(known, model.head_patterns))
