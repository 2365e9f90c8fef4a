"""What a file of weights holds of a diffusion model, checked against what the model's config says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoint import averaged, matches, restore_averaged, unwrap_state_dict
from ldm.models.diffusion.process import check_tables
from ldm.modules.conditioned import UNET, network_alone
from ldm.state_dicts import name_some, plain_names

# Of latent-diffusion's averages: their names are those of the network's parameters without dots.
EMA_KEYS = ("model_ema.*",)
IMPORTANCE_KEYS = ("time_importance.*",)
# Of what trains beside the network, and is of no use after: a learned loss weight, an alignment's perceptron.
ALIGNMENT = "alignment."
WEIGHT_KEYS = ("loss_weight.*", f"{ALIGNMENT}*")
NETWORK = "model."
SCALE = "scale_factor"


class TakesWeights(Protocol):
    """A diffusion model whose weights are read here."""

    ignore_keys: Sequence[str]
    model: Any

    @property
    def weights_elsewhere(self) -> tuple[str, ...]:
        """Beginnings of the names of parts that have read their weights from files of their own."""

    def rename_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a released state dict under the names that its tensors have here."""


@dataclass(frozen=True)
class Weights:
    """The tensors that are read into a model.

    Attributes:
        state: of the whole model, under its names.
        network_alone: whether the network is all that is read.
    """

    state: dict[str, Tensor]
    network_alone: bool

    @property
    def has_averages(self) -> bool:
        """Whether averages are among them."""
        return any(name.startswith("model_ema.") for name in self.state)

    @property
    def of_network(self) -> dict[str, Tensor]:
        """Those of the network, under the names of the module `model`."""
        return {name[len(NETWORK) :]: value for name, value in self.state.items() if name.startswith(NETWORK)}


def read_weights(
    model: TakesWeights, content: Any, path: str, ignore_keys: Sequence[str], only_model: bool, use_averaged: bool
) -> Weights:
    """Return what a file holds of a model; arguments are those of `DiffusionModel.init_from_ckpt`.

    Raises:
        ValueError: if the file is no state dict, lacks a part of the model, or is of another schedule or scale.
    """
    alone = network_alone(content, use_averaged)
    if alone is not None:
        if not only_model:
            check_parts(model, path, ignore_keys)
        state = {f"{UNET}{name}": value for name, value in alone.items()}
    else:
        state = restore_averaged(plain_names(unwrap_state_dict(content, path, use_averaged)), model.model)
        if use_averaged:
            check_averages(state, model.model, path)
        state = model.rename_released(averaged(state) if use_averaged else state)
    state = {name: value for name, value in state.items() if not name.startswith(tuple(ignore_keys))}
    own = _module(model).state_dict()
    state = {name: value for name, value in state.items() if name in own or not matches(name, model.ignore_keys)}
    check_tables(_module(model), state, path)
    return Weights(take_scale(model, state, path), only_model or alone is not None)


def check_averages(state: Mapping[str, Tensor], network: nn.Module, path: str) -> None:
    """Check that averages, where a file has any, are those of all weights that are trained.

    Args:
        network: the module `model`, whose names the averages have without their dots.

    Raises:
        ValueError: naming those that have none.
    """
    trained = [name for name, one in network.named_parameters() if one.requires_grad and f"model.{name}" in state]
    absent = [name for name in trained if f"model_ema.{name.replace('.', '')}" not in state]
    if absent and any(name.startswith("model_ema.") and "diffusion" in name for name in state):
        raise ValueError(
            f"{path} holds the averages (model_ema) of some weights and not of all: it lacks those of "
            f"{name_some(absent)}; fetch it again, or take the weights themselves (--no-ema, in Python ema=False)"
        )


def drop_alignment(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what trained beside the network to align it, of which no model makes use."""
    return {name: value for name, value in state.items() if not name.startswith(ALIGNMENT)}


def _module(model: TakesWeights) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def check_parts(model: TakesWeights, path: str, ignore_keys: Sequence[str] = ()) -> None:
    """Check that a file of the network alone leaves no other part of a model without weights.

    Raises:
        ValueError: naming the parameters that would be left at their random start.
    """
    skipped = (NETWORK, *EMA_KEYS, *IMPORTANCE_KEYS, *WEIGHT_KEYS, *ignore_keys, *model.weights_elsewhere)
    parameters = _module(model).named_parameters()
    lacking = [name for name, value in parameters if value.numel() and not matches(name, skipped)]
    if lacking:
        raise ValueError(
            f"{path} holds the network alone, and the model has more parts with weights: {name_some(lacking)}; give a "
            "checkpoint of the whole model, and for a first stage its own file (first_stage_config.params.ckpt_path)"
        )


def take_scale(model: TakesWeights, state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return a state dict whose scale factor, where it has one, is that of the config; one that is measured is kept.

    Raises:
        ValueError: if they differ.
    """
    given, own = state.get(SCALE), getattr(model, SCALE, None)
    if given is None or own is None:
        return state
    measured = isinstance(own, torch.Tensor)
    if not (measured and float(own) == 1) and not math.isclose(float(given), float(own), rel_tol=1e-3):
        raise ValueError(
            f"{path} was trained with scale_factor {float(given):.6g}, and the config says {float(own):.6g}: "
            f"set model.params.scale_factor={float(given):.6g}"
        )
    return state if measured else {name: value for name, value in state.items() if name != SCALE}
