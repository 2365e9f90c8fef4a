"""Sufficient statistics of the last layer's regression: sums over observations, so they stream and merge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.laplace.layer import LastLayer


class Observation(NamedTuple):
    """A batch of what the network is trained on: rows of one image follow each other, R to an image.

    `x` [B, C, H, W] is the network's input (scaled by c_in), `t` [B] its time, `cond` its condition or None, `target`
    [B, C, H, W] what it regresses.
    """

    x: Tensor
    t: Tensor
    cond: Tensor | None
    target: Tensor


@dataclass
class Statistics:
    """Sums over draws n, positions p of patches a and residuals r = target - output, each in `bins` noise levels.

    All float64; bins b, channels C, patch entries K:

        gram       [b, K, K]  sum a a^T             (None where no curvature needs it)
        diagonal   [b, K]     its diagonal
        cross      [b, C, K]  sum r a^T             gradient of the log-likelihood times sigma^2
        fisher     [b, C, K]  sum_n (sum_p r a)^2   diagonal empirical Fisher of a unit likelihood, a draw one datum
        squares    [b]        sum r^2
        elements   [b]        number of regressed values
        meat       [C, K, K]  sum_images g g^T, g = sum over its draws and positions of r a (None where not needed)
        draws, images         counts []
    """

    gram: Tensor | None
    diagonal: Tensor
    cross: Tensor
    fisher: Tensor
    squares: Tensor
    elements: Tensor
    meat: Tensor | None
    draws: Tensor
    images: Tensor

    @classmethod
    def zeros(cls, channels: int, width: int, bins: int, device: torch.device, gram: bool, meat: bool) -> Statistics:
        """Nothing seen yet; `gram` and `meat` say whether those matrices are gathered."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            gram=zero(bins, width, width) if gram else None,
            diagonal=zero(bins, width),
            cross=zero(bins, channels, width),
            fisher=zero(bins, channels, width),
            squares=zero(bins),
            elements=zero(bins),
            meat=zero(channels, width, width) if meat else None,
            draws=zero(),
            images=zero(),
        )

    def add(
        self, layer: LastLayer, features: Tensor, residual: Tensor, level: Tensor, repeats: int, chunk: int
    ) -> None:
        """Add a batch in place.

        Args:
            features: the layer's input, B rows.
            residual: target - output [B, P, C].
            level: noise bin of each row [B].
            repeats: R, rows that follow each other and belong to one image.
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
                if self.gram is not None:
                    self.gram[b].addmm_(flat.T, flat)
                self.diagonal[b] += flat.square().sum(0)
                self.squares[b] += errors[own].square().sum()
                self.elements[b] += errors[own].numel()
        gradient = torch.cat(gradients)  # [B, C, K]
        self.cross.index_add_(0, level, gradient)
        self.fisher.index_add_(0, level, gradient.square())
        if self.meat is not None:
            by_image = gradient.unflatten(0, (-1, repeats)).sum(1)  # [B / R, C, K]
            self.meat += torch.einsum("ick,icl->ckl", by_image, by_image)
        self.draws += len(features)
        self.images += len(features) // repeats

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of images together.

        Raises:
            ValueError: if they are of other layers or bins, or one lacks a matrix that the other has.
        """
        sums: dict[str, Tensor | None] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            shapes = [None if value is None else tuple(value.shape) for value in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"cannot merge statistics: '{field.name}' is {shapes[0]} here and {shapes[1]} there")
            sums[field.name] = None if mine is None else mine + theirs.to(mine.device)
        return Statistics(**sums)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def tensors(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
