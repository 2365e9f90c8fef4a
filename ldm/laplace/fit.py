"""Fit a last-layer posterior: sums over observations, which stream through the network once and merge.

    output_p = W a_p,   target_p ~ N(output_p, sigma_noise^2 I),   W ~ N(prior_mean, I / prior_precision)

with a_p the patch of features at position p. This is Bayesian linear regression, so what the
data say is a few sums over them: the curvature of the likelihood is I_C (x) A with
A = sum a a^T, one matrix for all output channels.
Sources: Kou et al. 2024 (BayesDiff); Daxberger et al. 2021 (last-layer Laplace).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.laplace.layer import LastLayer
from ldm.laplace.split import LayerFeatures
from ldm.laplace.state import CURVATURE_SUMS, LaplaceState, LaplaceSums, check_curvature


class Observation(NamedTuple):
    """A batch of what the network is trained on. Rows of one image follow each other, R to an image.

    Attributes:
        x: the network's input [B, C, H, W], already scaled by c_in.
        t: the network's times [B].
        cond: its condition [B], or None.
        target: what it regresses [B, C, H, W].
    """

    x: Tensor
    t: Tensor
    cond: Tensor | None
    target: Tensor


@torch.no_grad()
def fit_state(
    state: LaplaceState,
    features: LayerFeatures,
    layer: LastLayer,
    batches: Iterable[Observation],
    *,
    draws: int = 1,
    data_size: int | None = None,
    also: Sequence[str] = (),
    chunk: int = 4,
) -> LaplaceState:
    """Return the state with the sums of a stream of batches, around the layer's present weights.

    Args:
        state: names the curvature and the noise levels; its own sums are left out.
        features: gives the layer's input; it runs once on each batch.
        layer: the last layer.
        batches: rows of one image follow each other, `draws` to an image, none split between
            batches.
        draws: noise draws of each image; they decide how well the sums are known, and not what
            they say: that is `state.visits`.
        data_size: images of the data set that those seen stand for; where None, the number seen.
        also: further curvatures that the sums shall serve.
        chunk: images whose patches are held at once.

    Raises:
        ValueError: if there is no batch, one holds a part of an image, targets have another
            shape than outputs, or the sandwich is asked for beside several noise levels.
    """
    levels = len(state.time_edges) + 1
    for curvature in also:
        check_curvature(curvature, levels)
    needed = frozenset().union(*[CURVATURE_SUMS[name] for name in (state.curvature, *also)])
    sums = _make_zeros(layer, levels, needed, draws)
    for batch in batches:
        if len(batch.x) % draws:
            raise ValueError(f"a batch of {len(batch.x)} rows holds a part of an image of {draws} draws")
        if layer.places is not None and tuple(batch.target.shape[1:]) != tuple(layer.places.shape):
            raise ValueError(
                f"images are {list(batch.target.shape[1:])} as the network takes them, and where its last layer's "
                f"tokens lie was found for the model's own {list(layer.places.shape)}: give images of that size"
            )
        inputs = features(batch.x, batch.t, batch.cond)
        output = layer.output(inputs)
        if output.shape != batch.target.shape:
            raise ValueError(
                f"targets are {list(batch.target.shape)}, and outputs {list(output.shape)}: the shapes must be equal"
            )
        residual = layer.by_position(batch.target.double() - output.double())
        _add_batch(sums, layer, inputs, residual, state.level(batch.t), draws, chunk)
    if not bool(sums.images):
        raise ValueError("no batch to fit to: the iterable is empty (a generator gives its batches once)")
    size = int(sums.images) if data_size is None else data_size
    return replace(state, mean=layer.matrix(), sums=sums, repeats=draws, data_size=size)


def merge_states(first: LaplaceState, second: LaplaceState) -> LaplaceState:
    """Return the first state with the sums of both, which are fits of one network to different images.

    The larger of the two data sizes and of the number of images seen counts.

    Raises:
        ValueError: if either is not fitted, or they are fits of other networks, layers or
            numbers of draws.
    """
    if not torch.equal(first.mean.cpu(), second.mean.cpu()) or first.repeats != second.repeats:
        raise ValueError("these are fits of other weights or of another number of draws an image")
    both = first.fitted() + second.fitted()
    size = max(first.data_size, second.data_size, int(both.images))
    return replace(first, sums=both, data_size=size)


def _make_zeros(layer: LastLayer, levels: int, needed: frozenset[str], repeats: int) -> LaplaceSums:
    """Return sums over nothing; `needed` names the large matrices that are gathered."""
    channels = layer.outputs
    width = layer.width
    device = layer.layer.weight.device

    def zero(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return LaplaceSums(
        gram=zero(levels, width, width) if "gram" in needed else None,
        diagonal=zero(levels, width),
        cross=zero(levels, channels, width),
        fisher=zero(levels, channels, width),
        squares=zero(levels),
        elements=zero(levels),
        meat=zero(channels, width, width) if "meat" in needed else None,
        draws=zero(),
        images=zero(),
        draw_meat=zero(channels, width, width) if "meat" in needed and repeats > 1 else None,
        residuals=zero(channels, channels) if "meat" in needed else None,
    )


def _add_batch(
    sums: LaplaceSums,
    layer: LastLayer,
    features: Tensor,
    residual: Tensor,
    level: Tensor,
    repeats: int,
    chunk: int,
) -> None:
    """Add a batch to the tensors of `sums` in place, before the fit hands them out.

    Args:
        features: the layer's input, B rows.
        residual: target - output [B, P, C].
        level: noise level of each row [B].
        repeats: rows that follow each other and belong to one image.
        chunk: rows whose patches are held at once.
    """
    gradients = []
    for rows in torch.arange(len(features), device=features.device).split(chunk):
        patches = layer.patches(features[rows]).double()  # [n, P, K]
        errors = residual[rows].double()  # [n, P, C]
        gradients.append(torch.einsum("npc,npk->nck", errors, patches))
        for b in level[rows].unique().tolist():
            own = level[rows] == b
            flat = patches[own].flatten(0, 1)  # [n' P, K]
            if sums.gram is not None:
                sums.gram[b].addmm_(flat.T, flat)
            sums.diagonal[b] += flat.square().sum(0)
            sums.squares[b] += errors[own].square().sum()
            sums.elements[b] += errors[own].numel()
    gradient = torch.cat(gradients)  # [B, C, K]
    sums.cross.index_add_(0, level, gradient)
    sums.fisher.index_add_(0, level, gradient.square())
    if sums.meat is not None:
        by_image = gradient.unflatten(0, (-1, repeats)).sum(1)  # [B / R, C, K]
        sums.meat.add_(torch.einsum("ick,icl->ckl", by_image, by_image))
    if sums.draw_meat is not None:
        sums.draw_meat.add_(torch.einsum("ick,icl->ckl", gradient, gradient))
    if sums.residuals is not None:
        flat = residual.flatten(0, 1)  # [B P, C]
        sums.residuals.addmm_(flat.T, flat)
    sums.draws.add_(len(features))
    sums.images.add_(len(features) // repeats)
