"""Components of an ensemble: heads that train on a frozen trunk, and checkpoints that hold the heads alone (DECU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import sha256
from ldm.ensembles.heads import (
    Component,
    freeze_all_but,
    initialise,
    initialise_low_rank,
    merge,
    resolve_patterns,
    row_deviations,
    split,
)
from ldm.models.diffusion.anchor import Anchor
from ldm.models.diffusion.optimisation import TrainingSet, require_base
from ldm.models.diffusion.row_adam import RowRule, equal_rates, visit_probability
from ldm.util import generator

DEFAULTS: Mapping[str, Any] = {
    "names": ("class_embedding",),
    "init": "perturbed",
    "noise": 0.5,
    "null_class": "shared",
    "anchor": None,
    "row_rates": "none",
    "row_cap": 2000.0,
}
# 2 sigma^2, sigma^2 = 0.05 being what a trained network's prediction of a unit-variance noise is off by.
DEFAULT_ANCHOR = 0.1


class ComponentTraining:
    """What a LightningModule needs to train one component of an ensemble; goes before it among the bases.

    The module sets `component` and `anchor` to None, and `pretrained_path` and `head_options` to what it was given.
    """

    head_patterns: Mapping[str, Sequence[str]] = {
        "class_embedding": ("cond_stage_model.embedding.*",),
        "output": ("model.diffusion_model.out.*",),
        "time_embedding": ("model.diffusion_model.time_embed.*",),
        "lora": ("cond_stage_model.lora_*",),
    }
    # Class embeddings: {table: axis of the classes}; names of low-rank factors and the table they correct; a label.
    tables: Mapping[str, int] = MappingProxyType({})
    low_rank: tuple[str, str, str] | None = None
    null_class: int | None = None
    _training_set: TrainingSet | None = None

    def start_from_pretrained(self, component: int, seed: int) -> Component:
        """Load and freeze the trunk of `pretrained_path`, start this member's heads; see `start`."""
        require_base(self.pretrained_path)
        self.component = start(self, self.pretrained_path, component, seed, self.head_options)
        return self.component

    @property
    def training_set(self) -> TrainingSet:
        """What was set here, or what the trainer's data module says of its training data."""
        return self._training_set or TrainingSet.of(self)

    @training_set.setter
    def training_set(self, data: TrainingSet) -> None:
        self._training_set = data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.component is not None:
            keep_heads(checkpoint, self.component)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "component" in checkpoint:
            merge_heads(checkpoint, self.component, self.state_dict())


def describe(model: nn.Module, trunk: str, index: int, seed: int, options: Mapping[str, Any]) -> Component:
    """The component that the options name; see `start`.

    Raises:
        ValueError: for an unknown option, head or value, and for one that this model cannot follow.
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
    if "lora" in names and model.low_rank is None:
        raise ValueError(
            "the head 'lora' needs a low-rank embedder: set model.params.cond_stage_config.params.lora: true"
        )
    patterns = resolve_patterns(names, model.head_patterns)
    component = Component(index, seed, str(trunk), sha256(trunk), names, patterns, **chosen)
    if component.null_class != "shared" and model.null_class is None:
        raise ValueError(f"heads.null_class is {component.null_class}, and the model has no null class: leave it out")
    return component


def start(model: nn.Module, trunk: str, index: int, seed: int, options: Mapping[str, Any]) -> Component:
    """Load the trunk, freeze everything but the heads, and start them from draws seeded by (seed, index).

    Args:
        model: with `init_from_ckpt`, `head_patterns`, `tables`, `low_rank`, `null_class`, `channels`, `image_size`
            and, where it averages weights, `model_ema`; `model.anchor` becomes the `Anchor` of an anchored member.
        trunk: checkpoint of the trained base model.
        index, seed: of this member.
        options: `names` of heads or patterns; `init` (pretrained, perturbed, random, anchored); `noise` in row
            standard deviations; `null_class` (shared, trained, random); `anchor`, precision of an anchored member's
            prior (see `Anchor`); `row_rates` (none, equal) and `row_cap`, see `row_rules`. Defaults in `DEFAULTS`.

    Raises:
        ValueError: for an unknown option, head or value, and for weight decay that would move a shared null class.
    """
    component = describe(model, trunk, index, seed, options)
    model.init_from_ckpt(trunk, use_averaged=True)
    if model.use_ema:
        model.use_ema = False
        del model.model_ema
    parameters = freeze_all_but(model, component.patterns)
    null = model.null_class if component.null_class == "shared" else None
    tables = {name: axis for name, axis in model.tables.items() if name in parameters and null is not None}
    if model.weight_decay and 0 in tables.values():
        raise ValueError(
            f"weight_decay {model.weight_decay} would shrink the shared null class: set model.params.weight_decay to "
            "0, or heads.null_class to trained or random"
        )
    deviations = _start_values(model, parameters, component, null)
    for name, axis in tables.items():
        parameters[name].register_hook(_without_row(axis, null))
    if component.init == "anchored":
        for name, axis in tables.items():
            everywhere = deviations[name].expand_as(parameters[name])
            deviations[name] = everywhere.index_fill(axis, torch.tensor([null], device=everywhere.device), torch.inf)
        model.anchor = Anchor(parameters, deviations, component.anchor, model.channels * model.image_size**2)
    return component


def _start_values(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], component: Component, null: int | None
) -> dict[str, Tensor]:
    """Draw the heads' start; return the deviations of the draw around what was loaded, broadcasting to each."""
    draws, factors = generator("heads", component.seed, component.index), (model.low_rank or ())[:2]
    if not all(name in parameters for name in factors):
        factors = ()
    plain = {name: value for name, value in parameters.items() if name not in factors}
    deviations = {name: component.noise * row_deviations(value) for name, value in plain.items()}
    rows = component.noise * row_deviations(model.get_parameter(model.low_rank[2]))[:, 0] if factors else None
    kept = {name: null for name, axis in model.tables.items() if axis == 0 and null is not None}
    initialise(plain, component.init, draws, component.noise, kept)
    if factors:
        a, b = (parameters[name] for name in factors)
        if bool(b.any()):
            raise ValueError(f"the trunk has a low-rank correction of its own: add it to {model.low_rank[2]} first")
        spread = initialise_low_rank(a, b, rows, component.init, draws, null)
        deviations.update(zip(factors, spread, strict=True))
    return deviations


def _without_row(axis: int, row: int) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.select(axis, row).zero_()
        return gradient

    return hook


def row_rules(model: nn.Module) -> dict[nn.Parameter, RowRule]:
    """With `heads.row_rates: equal`, how the rows of the tables that train are updated (see `RowAdam`); else nothing.

    A row's rate is the learning rate times min(row_cap, p_max / p), p being its probability to be in a batch, so that
    the expected sum of its steps is the same for every row with data. An anchored row is pulled whenever it is
    visited, by 1 / p of its pull, so that the minimum stays where the loss has it; rows without data stay at their
    anchor.
    """
    component = model.component
    if component is None or component.row_rates == "none":
        return {}
    data, rules = model.training_set, {}
    for name, axis in model.tables.items():
        table = model.get_parameter(name)
        if not table.requires_grad:
            continue
        dropped = model.label_dropout
        visits = visit_probability(data.counts(table.shape[axis]), data.images, data.batch, dropped)
        if dropped:
            visits[model.null_class] = 1 - (1 - dropped) ** min(data.batch, data.images)
        centre = pull = None
        if model.anchor is not None:
            shape = [-1 if dimension == axis else 1 for dimension in range(table.ndim)]
            pull = model.anchor.pull(name, data.images)  # a joint training's table may be on its device before it
            pull = pull * torch.where(visits > 0, 1 / visits, 0).to(pull).reshape(shape)
            centre = model.anchor.centre(name)
        rules[table] = RowRule(axis, equal_rates(visits, component.row_cap), centre, pull)
    if not rules:
        raise ValueError(f"heads.row_rates: equal acts on tables of classes, and {list(component.heads)} have none")
    return rules


def anchor_penalty(model: nn.Module) -> Tensor:
    """The anchored member's penalty []; where tables are trained by row, their pull is the optimiser's (`RowRule`)."""
    by_row = model.tables if model.component.row_rates == "equal" else ()
    return model.anchor.penalty(model, model.training_set.images, by_row)


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
