"""What a last-layer posterior learns from data: gathered from a stream, or taken from a saved state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.laplace.curvature import check_curvature
from ldm.laplace.statistics import Observation, Statistics

if TYPE_CHECKING:
    from ldm.laplace.posterior import LastLayerLaplace

HYPERPARAMETERS = ("prior_precision", "prior_mean", "sigma_noise", "temperature")


@torch.no_grad()
def gather(laplace: LastLayerLaplace, batches: Iterable[Observation], draws: int, gram: bool, meat: bool) -> Statistics:
    """Statistics of a stream of batches, `draws` rows to an image; arguments of `Statistics.zeros`.

    Raises:
        ValueError: if there is no batch, one holds a part of an image, targets have another shape than outputs, or
            `meat` is asked for beside several noise levels.
    """
    layer = laplace.layer
    if meat:
        check_curvature("sandwich", len(laplace.time_edges) + 1)
    sums = Statistics.zeros(
        layer.outputs, layer.width, len(laplace.time_edges) + 1, layer.layer.weight.device, gram=gram, meat=meat
    )
    for batch in batches:
        if len(batch.x) % draws:
            raise ValueError(f"a batch of {len(batch.x)} rows holds a part of an image of {draws} draws")
        features = laplace.features(batch.x, batch.t, batch.cond)
        output = laplace.output(features)
        if output.shape != batch.target.shape:
            raise ValueError(f"targets are {list(batch.target.shape)}, the outputs {list(output.shape)}")
        residual = layer.by_position(batch.target.double() - output.double())
        sums.add(layer, features, residual, laplace.level(batch.t), draws, laplace.chunk)
    if not bool(sums.images):
        raise ValueError("no batch to fit to: the iterable is empty (a generator gives its batches once)")
    return sums


def options_of(laplace: LastLayerLaplace) -> dict[str, Any]:
    """The constructor's arguments that are no tensors."""
    names = ("curvature", "rank", "published_ef", "chunk")
    own = {name: getattr(laplace, name) for name in names}
    return {"layer": laplace.name, "outputs": laplace.layer.outputs, "time_edges": list(laplace.time_edges), **own}


def state_of(laplace: LastLayerLaplace) -> dict[str, Tensor]:
    """Everything that `fit` and tuning found, as float64 tensors by name."""
    numbers = {name: getattr(laplace, name) for name in ("mean", "repeats", "data_size", *HYPERPARAMETERS)}
    state = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return state | {f"statistics.{name}": value for name, value in laplace.fitted().tensors().items()}


def restore(laplace: LastLayerLaplace, state: Mapping[str, Tensor]) -> None:
    """Give `laplace` the state of a posterior of the same network and options.

    Raises:
        ValueError: if that was fitted around other weights.
    """
    mean = state["mean"].to(laplace.mean)
    if mean.shape != laplace.mean.shape or not torch.equal(mean, laplace.mean):
        raise ValueError(f"this posterior was fitted around other weights of '{laplace.name}': load its own network")
    for name in HYPERPARAMETERS:
        setattr(laplace, name, state[name])
    tensors = {name: state.get(f"statistics.{name}") for name in Statistics.names()}
    moved = {name: None if value is None else value.to(mean.device) for name, value in tensors.items()}
    laplace.take(Statistics(**moved), int(state["repeats"]), int(state["data_size"]))
