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
from ldm.evaluation.fitting import Batches, Examples, Loss, Progress, half_cosine, minimise
from ldm.evaluation.taps import Backbone
from ldm.modules.ddpmpp import TimeEmbedding

# Test images in a pass.
TEST_BATCH = 250
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
        return self.classify(self.read(x0, eps, u), u)

    @torch.no_grad()
    def read(self, x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
        """Features [B, C] of clean states and noise [B, C, H, W] at times u [B], which no training changes."""
        (features,) = self.backbone.read(self.tap, x0, eps, u, self.pool).values()
        return features

    def classify(self, features: Tensor, u: Tensor) -> Tensor:
        """Logits [B, K] of the features [B, C] of times u [B]."""
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

    def batches(self, images: int, seed: int) -> Batches:
        """Return the batches of so many training images."""
        return Batches(images, self.batch_size, self.epochs, "noisy order", seed)

    def optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if self.momentum > 0:
            options = {"momentum": self.momentum, "nesterov": True, "weight_decay": self.weight_decay}
            return torch.optim.SGD(parameters, self.learning_rate, **options)
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)


WRN_TRAINING = NoisyTraining(200, 128, 0.1, 5, 0.9, 5e-4)


def level_times(levels: Tensor) -> Times:
    """Training times drawn from a list of levels [L], each as often."""
    return lambda uniform: levels[(uniform * len(levels)).long()]


def draw_times(times: Times, rows: Tensor, source: torch.Generator) -> Tensor:
    """Draw the times u [B] of a training batch of rows [B]."""
    return times(torch.rand(len(rows), generator=source, dtype=torch.float64))


def draw_batch(data: Examples, rows: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the clean states [B, C, H, W] of a training batch, augmented as in its epoch, and their noise."""
    x0 = data.at(rows.tolist(), epoch)
    return x0, keyed_normal([("noisy", seed, epoch, row) for row in rows.tolist()], x0.shape[1:]).to(x0)


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

    def loss(rows: Tensor, epoch: int, source: torch.Generator) -> Tensor:
        u = draw_times(times, rows, source)
        x0, eps = draw_batch(data, rows, epoch, seed)
        return F.cross_entropy(model(x0, eps, u), data.labels[rows].to(x0.device))

    minimise_noisy(model, loss, training, len(data), seed, progress)


def minimise_noisy(
    model: nn.Module, loss: Loss, training: NoisyTraining, images: int, seed: int, progress: Progress | None = None
) -> None:
    """Train what of a model trains, by the loss of a batch's rows; see `train_noisy`."""
    optimiser = training.optimiser([parameter for parameter in model.parameters() if parameter.requires_grad])
    batches = training.batches(images, seed)
    schedule = half_cosine(optimiser, batches.steps, training.warm_up * batches.per_epoch)
    model.train()
    minimise(loss, batches, optimiser, schedule, progress)
    model.eval()


@torch.no_grad()
def recognition(
    model: BackboneClassifier | NetworkClassifier,
    data: Examples,
    levels: Sequence[float],
    seed: int = 0,
    batch_size: int = TEST_BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Share of the images that are recognised at each noise level, one noise an image, the same at every level."""
    model.eval()
    right = torch.zeros(len(levels))
    for rows in torch.arange(len(data)).split(batch_size):
        right += count_right(model, data, rows, levels, seed)
        if progress is not None:
            progress(len(rows))
    return (right / len(data)).tolist()


@torch.no_grad()
def count_right(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    data: Examples,
    rows: Tensor,
    levels: Sequence[float],
    seed: int,
) -> Tensor:
    """Count the images of rows [B] that are recognised at each noise level, [levels].

    Args:
        model: logits [B, K] of clean states and noise [B, C, H, W] at times u [B].
    """
    x0 = data.at(rows.tolist())
    labels = data.labels[rows]
    eps = keyed_normal([("recognised", seed, row) for row in rows.tolist()], x0.shape[1:]).to(x0)
    times = [torch.full((len(rows),), float(level), dtype=torch.float64) for level in levels]
    return torch.stack([(model(x0, eps, u).argmax(1).cpu() == labels).sum() for u in times])
