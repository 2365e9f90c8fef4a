"""Fine-tuning: the trunk up to one tap and a linear head, trained together to classify noised images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.grid_features import States
from ldm.evaluation.taps import Reading, Trunk
from ldm.models.diffusion.noise import keyed_normal
from ldm.util import generator


@dataclass(frozen=True)
class Tuning:
    """AdamW under a half cosine, step by step; `head_rate` times the rate for the head, which starts at zero."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-4
    head_rate: float = 10.0
    weight_decay: float = 0.0


class TunedEncoder(nn.Module):
    """A copy of a trunk up to its one tap and a linear head on the standardised features.

    Args:
        trunk: is not changed.
        reading: one time and one tap.
        width: D of its features; classes: K.
    """

    def __init__(self, trunk: Trunk, reading: Reading, width: int, classes: int):
        super().__init__()
        (self.u,), (self.tap,) = reading.times, reading.taps
        self.network = copy.deepcopy(trunk.network).requires_grad_(True)
        self.trunk, self.reading = replace(trunk, network=self.network), reading
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Logits [B, K] of clean states and noise [B, C, H, W]."""
        found = self.trunk.read(self.reading.taps, x0, eps, self.u, self.reading.pool)
        return self.head(self.norm(found[self.tap]))

    @torch.no_grad()
    def accuracy(self, states: States, seed: int, batch_size: int = 100) -> float:
        """Share of the states that are recognised; logits are averaged over the reading's noise draws."""
        self.eval()
        right = 0
        for start in range(0, len(states), batch_size):
            images = range(start, min(start + batch_size, len(states)))
            x0 = states.read(images.start, images.stop)
            logits = sum(
                self(x0, keyed_normal([("tuned", seed, image, draw) for image in images], x0.shape[1:]).to(x0))
                for draw in self.reading.draws
            )
            right += int((logits.argmax(1).cpu() == states.labels[images.start : images.stop]).sum())
        return right / len(states)


def tune(
    trunk: Trunk,
    reading: Reading,
    states: States,
    rows: NDArray[np.int64],
    tests: States,
    classes: int,
    training: Tuning,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train the encoder and its head on some rows of the states, and return the test accuracy.

    Every step draws new noise from (seed, epoch, image). The states are read once and held in memory.

    Raises:
        ValueError: if the loss is not finite.
    """
    images = torch.cat([states.read(start, min(start + 500, len(states))) for start in range(0, len(states), 500)])
    labels = states.labels.to(images.device)
    width = next(iter(trunk.features(images[:1], [0], replace(reading, draws=(0,))).values())).shape[1]
    encoder = TunedEncoder(trunk, reading, width, classes).to(images.device).train()
    groups = [
        {"params": encoder.network.parameters()},
        {"params": encoder.head.parameters(), "lr": training.learning_rate * training.head_rate},
    ]
    adam = torch.optim.AdamW(groups, training.learning_rate, weight_decay=training.weight_decay)
    per_epoch = -(-len(rows) // training.batch_size)
    total, done = per_epoch * training.epochs, 0
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    for epoch in range(training.epochs):
        order = torch.randperm(len(rows), generator=generator("tuning order", seed, epoch)).numpy()
        for chosen in np.array_split(rows[order], per_epoch):
            keys = [("tuning", seed, epoch, int(image)) for image in chosen]
            eps = keyed_normal(keys, images.shape[1:]).to(images)
            loss = F.cross_entropy(encoder(images[chosen], eps), labels[chosen])
            if not loss.isfinite():
                raise ValueError(f"loss {float(loss.detach())} at step {done}: lower the rate of fine-tuning")
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, total, float(loss.detach()))
    return encoder.accuracy(tests, seed)
