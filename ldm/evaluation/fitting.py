"""Minimising a loss over shuffled batches: the loop that probes, fine-tuning and classifiers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ldm.util import generator

# Loss [] of some rows [B] of the training set in an epoch; what a batch draws comes from the generator.
Loss = Callable[[Tensor, int, torch.Generator], Tensor]
# Called after each step with (steps done, steps in all, loss).
Progress = Callable[[int, int, float], None]


class Examples(Protocol):
    """Clean states by position, augmented as an epoch is, and their classes."""

    labels: Tensor

    def __len__(self) -> int: ...

    def at(self, rows: Sequence[int], epoch: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Batches:
    """`rows` rows in batches of `size`, the last of an epoch smaller, for a number of epochs.

    A last row alone joins the batch before it, since one row has no deviation to be normalised by. The order of an
    epoch comes from (name, seed, epoch).
    """

    rows: int
    size: int
    epochs: int
    name: str
    seed: int

    @property
    def per_epoch(self) -> int:
        return max(1, -(-(self.rows - 1) // self.size))

    @property
    def steps(self) -> int:
        return self.per_epoch * self.epochs

    def of_epoch(self, epoch: int) -> tuple[list[Tensor], torch.Generator]:
        """Return the rows [B] of an epoch's batches in their order, and what the batches draw from, one by one."""
        source = generator(self.name, self.seed, epoch)
        order = torch.randperm(self.rows, generator=source)
        ends = range(1, self.per_epoch)
        return list(order.tensor_split([self.size * end for end in ends])), source


def half_cosine(optimiser: torch.optim.Optimizer, steps: int, warm_up: int = 0) -> LambdaLR:
    """Rates that rise linearly for `warm_up` steps, then fall as half a cosine to zero after `steps` in all."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return LambdaLR(optimiser, factor)


def minimise(
    loss: Loss,
    batches: Batches,
    optimiser: torch.optim.Optimizer,
    schedule: LRScheduler,
    progress: Progress | None = None,
) -> None:
    """Step down the gradient of a loss, batch by batch, under a schedule of rates that moves with every step.

    Raises:
        ValueError: if the loss is not finite.
    """
    done = 0
    for epoch in range(batches.epochs):
        parts, source = batches.of_epoch(epoch)
        for rows in parts:
            value = loss(rows, epoch, source)
            if not value.isfinite():
                raise ValueError(f"loss {float(value.detach())} at step {done}: lower the learning rate")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, batches.steps, float(value.detach()))
