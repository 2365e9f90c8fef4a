"""Components of an ensemble: heads that train on a frozen trunk, and checkpoints that hold the heads alone (DECU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint import sha256
from ldm.heads import Component, freeze_trunk, initialise, merge, resolve_patterns, split
from ldm.util import generator

DEFAULTS: Mapping[str, Any] = {
    "names": ("class_embedding",),
    "init": "perturbed",
    "noise": 0.5,
    "null_class": "shared",
}


def start(model: nn.Module, trunk: str, index: int, seed: int, options: Mapping[str, Any]) -> Component:
    """Load the trunk, freeze everything but the heads, and start them from draws seeded by (seed, index).

    Args:
        model: with `init_from_ckpt`, `head_patterns`, `shared_rows` and, where it averages weights, `model_ema`.
        trunk: checkpoint of the trained base model.
        index, seed: of this member.
        options: `names` of heads or patterns, `init` (pretrained, perturbed, random), `noise` in row standard
            deviations, `null_class` (shared, trained, random); defaults in `DEFAULTS`.

    Raises:
        ValueError: for an unknown option, head or value, and for weight decay that would move a shared null class.
    """
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown keys in model.params.heads: {sorted(unknown)}; known are {sorted(DEFAULTS)}")
    chosen = {**DEFAULTS, **options}
    names = (chosen["names"],) if isinstance(chosen["names"], str) else tuple(chosen["names"])
    patterns = resolve_patterns(names, model.head_patterns)
    component = Component(
        index,
        seed,
        str(trunk),
        sha256(trunk),
        names,
        patterns,
        chosen["init"],
        float(chosen["noise"]),
        chosen["null_class"],
    )
    model.init_from_ckpt(trunk, use_averaged=True)
    if model.use_ema:
        model.use_ema = False
        del model.model_ema
    parameters = freeze_trunk(model, patterns)
    rows = model.shared_rows() if component.null_class == "shared" else {}
    rows = {name: row for name, row in rows.items() if name in parameters}
    if rows and model.weight_decay:
        raise ValueError(
            f"weight_decay {model.weight_decay} would shrink the shared null class: set model.params.weight_decay to "
            "0, or heads.null_class to trained or random"
        )
    initialise(parameters, component.init, generator("heads", seed, index), component.noise, rows)
    for name, row in rows.items():
        parameters[name].register_hook(_without_row(row))
    return component


def _without_row(row: int) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[row] = 0
        return gradient

    return hook


def keep_heads(checkpoint: dict[str, Any], component: Component) -> None:
    """Replace a checkpoint's weights by the heads and a reference to the trunk."""
    checkpoint["state_dict"] = split(checkpoint["state_dict"], component.patterns)[0]
    checkpoint["component"] = component.as_dict()


def merge_heads(checkpoint: dict[str, Any], component: Component | None, trunk: Mapping[str, Tensor]) -> None:
    """Put a component's checkpoint together again with the trunk that is loaded already.

    Raises:
        ValueError: if the run is no component, or stands on another trunk.
    """
    if component is None:
        raise ValueError("this checkpoint holds the heads of a component: resume with --start_from_pretrained")
    found, expected = component.trunk_sha256, checkpoint["component"]["trunk_sha256"]
    if found != expected:
        raise ValueError(
            f"the component was trained on a trunk with sha256 {expected[:12]}, {component.trunk_path} has "
            f"{found[:12]}: use the trunk it was trained on"
        )
    checkpoint["state_dict"] = merge(trunk, checkpoint["state_dict"])
