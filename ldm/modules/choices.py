"""Conditions by number: label k stands for the k-th of a list of prompts or pictures.

Whatever takes class labels (ensembles, mutual information, Laplace, maps, reports) then takes prompts or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch, as a network takes them; what it does not take is None.

    Args:
        tokens: token ids [B, L], which the model's text encoder embeds.
        context: embedded tokens [B, L, D].
        picture: states [B, C, H, W] that are joined to the noisy state along channels.
    """

    tokens: Tensor | None = None
    context: Tensor | None = None
    picture: Tensor | None = None


@dataclass(frozen=True)
class Choices:
    """A list of P conditions. `null` says that one more row follows, the null condition of guidance.

    Args:
        names: of the conditions [P]: the prompts, or the names of pictures.
        tokens: token ids [P (+ 1), L]. Members whose text encoders differ embed them each in its own way.
        context: embedded tokens [P (+ 1), L, D], where the text encoder is the same for all.
        picture: [P (+ 1), C, H, W], in the space of the state: of a latent model encoded and scaled.
        null: whether the last row is the null condition.

    Raises:
        ValueError: if the rows are not as many as the names say, or there are none.
    """

    names: tuple[str, ...]
    tokens: Tensor | None = None
    context: Tensor | None = None
    picture: Tensor | None = None
    null: bool = False

    def __post_init__(self):
        rows = {name: len(value) for name, value in self.tensors().items()}
        expected = len(self.names) + self.null
        if not self.names or not rows or set(rows.values()) != {expected}:
            null = " and one for the null condition" if self.null else ""
            raise ValueError(f"{len(self.names)} conditions need a row each{null}, got {rows or 'no rows'}")

    def tensors(self) -> dict[str, Tensor]:
        """Return what the choices hold, by the names of their arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(Condition)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def null_class(self) -> int | None:
        """The label of the null condition; None where there is none."""
        return len(self.names) if self.null else None

    def pick(self, labels: Tensor) -> Condition:
        """Return the conditions of labels [B], which lie in 0..P - 1, or P for the null condition."""
        return Condition(**{name: value[labels.to(value.device)] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> Choices:
        """Return the same choices on a device."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})
