"""Classifiers of noisy images conditioned on the noise level: heads on a backbone, and networks of their own.

How many images are recognised at each noise level says what a model can still see there. Source: Xiang et al. 2023
(arXiv 2303.09769), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.schedule import Schedule, VPSchedule
from ldm.evaluation.fitting import Batches, Examples, Progress, half_cosine, minimise
from ldm.evaluation.taps import Backbone
from ldm.modules.ddpmpp import TimeEmbedding

# A training time [B] for uniform draws [B].
Times = Callable[[Tensor], Tensor]


class NoiseHead(nn.Module):
    """Logits [B, K] of features [B, C] and the number of their noise level [B]: two linear maps around a SiLU.

    An embedding of the number, of width C, is added to the features first. With C = 256 and K = 10 it has 219,146
    parameters, as published.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        if width % 8:
            raise ValueError(f"the embedding of the noise level needs a width that is a multiple of 8, got {width}")
        self.time_emb = TimeEmbedding(width // 4)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, classes))

    def forward(self, features: Tensor, number: Tensor) -> Tensor:
        return self.layers(features + self.time_emb(number.to(features)))


class BackboneClassifier(nn.Module):
    """A head on the pooled features of one tap of a frozen backbone, at any of the levels it is trained on.

    Args:
        tap: {tap: submodule}, one of them.
        levels: times u of the schedule; the head is conditioned on the number of the nearest one, counted from 1.
        pool: see `pool_activation`.
    """

    def __init__(self, backbone: Backbone, tap: dict[str, str], levels: Tensor, head: NoiseHead, pool: int | None = 1):
        super().__init__()
        self.backbone, self.tap, self.levels, self.head, self.pool = backbone, tap, levels, head, pool

    def forward(self, x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
        """Logits [B, K] of clean states and noise [B, C, H, W] at times u [B]."""
        with torch.no_grad():
            (features,) = self.backbone.read(self.tap, x0, eps, u, self.pool).values()
        number = (u[:, None] - self.levels).abs().argmin(1) + 1
        return self.head(features, number.to(features.device))


class NetworkClassifier(nn.Module):
    """A network of noisy images that is conditioned on their noise level.

    Args:
        time_input: u [B] -> what the network takes as its time; by default t / T where the schedule is a table of
            betas, and ln(sigma / alpha) elsewhere.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, time_input: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.time_input = time_input or self._noise_level

    def _noise_level(self, u: Tensor) -> Tensor:
        return u / self.schedule.end if isinstance(self.schedule, VPSchedule) else self.schedule.ratio(u).log()

    def forward(self, x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
        """Logits [B, K] of clean states and noise [B, C, H, W] at times u [B]."""
        return self.network(self.schedule.noised(x0, eps, u), self.time_input(u).to(x0))


@dataclass(frozen=True)
class NoisyTraining:
    """Adam, or stochastic gradients with Nesterov's momentum where `momentum` is above 0; half a cosine by step.

    The published choices: heads 15 epochs at 1e-3; WRN-28-10 200 epochs at 0.1 with 5 of warm-up, momentum 0.9 and a
    weight decay of 5e-4; batches of 128.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 1e-3
    warm_up: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0

    def optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if self.momentum > 0:
            options = {"momentum": self.momentum, "nesterov": True, "weight_decay": self.weight_decay}
            return torch.optim.SGD(parameters, self.learning_rate, **options)
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)


WRN_TRAINING = NoisyTraining(200, 128, 0.1, 5, 0.9, 5e-4)


def level_times(levels: Tensor) -> Times:
    """Training times drawn from a list of levels [L], each as often."""
    return lambda uniform: levels[(uniform * len(levels)).long()]


def train_noisy(
    model: BackboneClassifier | NetworkClassifier,
    data: Examples,
    times: Times,
    training: NoisyTraining,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train what of a classifier trains; noise comes from (seed, epoch, image), times from (seed, epoch, batch).

    Raises:
        ValueError: if the loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = training.optimiser(parameters)
    batches = Batches(len(data), training.batch_size, training.epochs, "noisy order", seed)

    def loss(rows: Tensor, epoch: int, source: torch.Generator) -> Tensor:
        x0 = data.at(rows.tolist(), epoch)
        u = times(torch.rand(len(rows), generator=source, dtype=torch.float64))
        eps = keyed_normal([("noisy", seed, epoch, row) for row in rows.tolist()], x0.shape[1:]).to(x0)
        return F.cross_entropy(model(x0, eps, u), data.labels[rows].to(x0.device))

    model.train()
    minimise(
        loss, batches, optimiser, half_cosine(optimiser, batches.steps, training.warm_up * batches.per_epoch), progress
    )
    model.eval()


@torch.no_grad()
def recognition(
    model: BackboneClassifier | NetworkClassifier,
    data: Examples,
    levels: Sequence[float],
    seed: int = 0,
    batch_size: int = 250,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Share of the images that are recognised at each noise level, one noise an image, the same at every level."""
    model.eval()
    right = torch.zeros(len(levels))
    for rows in torch.arange(len(data)).split(batch_size):
        x0, labels = data.at(rows.tolist()), data.labels[rows]
        eps = keyed_normal([("recognised", seed, row) for row in rows.tolist()], x0.shape[1:]).to(x0)
        for index, level in enumerate(levels):
            u = torch.full((len(rows),), float(level), dtype=torch.float64)
            right[index] += (model(x0, eps, u).argmax(1).cpu() == labels).sum()
        if progress is not None:
            progress(len(rows))
    return (right / len(data)).tolist()
