"""Fine-tuning: the backbone up to one tap and a linear head, trained together to classify noised images."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.noise import keyed_normal
from ldm.evaluation.fitting import Batches, Examples, Progress, half_cosine, minimise
from ldm.evaluation.taps import Backbone, Reading


@dataclass(frozen=True)
class Tuning:
    """AdamW under a half cosine, step by step; `head_rate` times the rate for the head, which starts at zero."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-4
    head_rate: float = 10.0
    weight_decay: float = 0.0


class TunedEncoder(nn.Module):
    """A copy of a backbone up to its one tap and a linear head on the standardised features.

    Args:
        backbone: is not changed.
        reading: one time and one tap.
        width: D of its features; classes: K.
    """

    def __init__(self, backbone: Backbone, reading: Reading, width: int, classes: int):
        super().__init__()
        (self.u,), (self.tap,) = reading.times, reading.taps
        self.network = copy.deepcopy(backbone.network).requires_grad_(True)
        self.backbone, self.reading = replace(backbone, network=self.network), reading
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Logits [B, K] of clean states and noise [B, C, H, W]."""
        found = self.backbone.read(self.reading.taps, x0, eps, self.u, self.reading.pool)
        return self.head(self.norm(found[self.tap]))

    @torch.no_grad()
    def accuracy(self, states: Examples, seed: int, batch_size: int = 100) -> float:
        """Share of the states that are recognised; logits are averaged over the reading's noise draws."""
        self.eval()
        right = 0
        for start in range(0, len(states), batch_size):
            images = range(start, min(start + batch_size, len(states)))
            x0 = states.at(images)
            logits = sum(
                self(x0, keyed_normal([("tuned", seed, image, draw) for image in images], x0.shape[1:]).to(x0))
                for draw in self.reading.draws
            )
            right += int((logits.argmax(1).cpu() == states.labels[images.start : images.stop]).sum())
        return right / len(states)


def tune(
    backbone: Backbone,
    reading: Reading,
    states: Examples,
    rows: NDArray[np.int64],
    tests: Examples,
    classes: int,
    training: Tuning,
    seed: int,
    progress: Progress | None = None,
) -> float:
    """Train the encoder and its head on some rows of the states, and return the test accuracy.

    Every step reads its images again, augmented as their epoch is, and draws noise from (seed, epoch, image).

    Raises:
        ValueError: if the loss is not finite.
    """
    first = states.at([int(rows[0])])
    width = next(iter(backbone.features(first, [0], replace(reading, draws=(0,))).values())).shape[1]
    encoder = TunedEncoder(backbone, reading, width, classes).to(first.device).train()
    groups = [
        {"params": encoder.network.parameters()},
        {"params": encoder.head.parameters(), "lr": training.learning_rate * training.head_rate},
    ]
    adam = torch.optim.AdamW(groups, training.learning_rate, weight_decay=training.weight_decay)
    batches = Batches(len(rows), training.batch_size, training.epochs, "tuning order", seed)

    def loss(part: Tensor, epoch: int, _source: torch.Generator) -> Tensor:
        images = rows[part.numpy()].tolist()
        x0 = states.at(images, epoch)
        eps = keyed_normal([("tuning", seed, epoch, image) for image in images], x0.shape[1:]).to(x0)
        return F.cross_entropy(encoder(x0, eps), states.labels[images].to(x0.device))

    minimise(loss, batches, adam, half_cosine(adam, batches.steps), progress)
    return encoder.accuracy(tests, seed)
