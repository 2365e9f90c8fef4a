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
        tokens: token ids [B, L], or class labels [B], which the model's embedder embeds.
        context: embedded tokens [B, L, D].
        picture: states [B, C, H, W] that are joined to the noisy state along channels; as rows [B, C H W] out of
            `join_condition`.
    """

    tokens: Tensor | None = None
    context: Tensor | None = None
    picture: Tensor | None = None


@dataclass(frozen=True)
class Choices:
    """A list of P conditions, followed by N null conditions of guidance.

    Args:
        names: of the conditions [P]: the prompts, or the names of pictures.
        tokens: token ids [P + N, L], or class labels [P + N]. Members whose embedders differ embed each in its own way.
        context: embedded tokens [P + N, L, D], where the text encoder is the same for all.
        picture: [P + N, C, H, W], in the space of the state: of a latent model encoded and scaled.
        null: N. One null condition is that of all choices; N that divide P are each that of P / N choices in a row,
            those of one picture for example.

    Raises:
        ValueError: if the rows are not as many as the names say, there are none, or N does not divide P.
    """

    names: tuple[str, ...]
    tokens: Tensor | None = None
    context: Tensor | None = None
    picture: Tensor | None = None
    null: int = 0

    def __post_init__(self):
        rows = {name: len(value) for name, value in self.tensors().items()}
        expected = len(self.names) + self.null
        if not self.names or not rows or set(rows.values()) != {expected}:
            null = f" and {'one' if self.null == 1 else int(self.null)} for the null condition" if self.null else ""
            raise ValueError(f"{len(self.names)} conditions need a row each{null}, got {rows or 'no rows'}")
        if self.null and len(self.names) % self.null:
            raise ValueError(f"{self.null} null conditions must divide {len(self.names)} conditions")

    def tensors(self) -> dict[str, Tensor]:
        """Return what the choices hold, by the names of their arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(Condition)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def null_class(self) -> int | None:
        """The label of the first null condition; None where there is none."""
        return len(self.names) if self.null else None

    def null_labels(self, labels: Tensor) -> Tensor | None:
        """Return the label of each label's null condition [B], its own of a null condition; None: there are none."""
        if not self.null:
            return None
        count = len(self.names)
        return torch.where(labels < count, count + labels // (count // self.null), labels)

    def pick(self, labels: Tensor) -> Condition:
        """Return the conditions of labels [B], which lie in 0..P - 1, or P..P + N - 1 for a null condition."""
        return Condition(**{name: value[labels.to(value.device)] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> Choices:
        """Return the same choices on a device."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})


def join_condition(tokens: Tensor, picture: Tensor) -> Tensor:
    """Join token ids [B, L], or labels [B], and pictures [B, C, H, W] to rows [B, L + C H W], which hold both."""
    rows = picture.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # which holds every id
    return torch.cat([tokens.reshape(len(rows), -1).to(rows), rows], dim=1)


def split_condition(rows: Tensor, length: int | None) -> Condition:
    """Return what `join_condition` joined; the picture stays a row [B, C H W].

    Args:
        rows: [B, L + C H W], or with L = 1 where `length` is None: these are labels [B].
        length: L of token ids.
    """
    if length is None:
        return Condition(tokens=rows[:, 0].long(), picture=rows[:, 1:])
    return Condition(tokens=rows[:, :length].long(), picture=rows[:, length:])
