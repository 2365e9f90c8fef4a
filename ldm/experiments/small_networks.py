"""A network small enough to be trained a hundred times on a laptop, and its training, many networks in one pass.

The states are pictures x [B, C, H, W] or [B, D], digits of D = 64 where nothing else is said; the network regresses the
noise in them, or v, on the schedule

    x = cos(pi u / 2) x_0 + sin(pi u / 2) eps,    u in [0.02, 0.98]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.digits import Digits
from ldm.data.idx import MNIST
from ldm.laplace import Observation
from ldm.modules.augment_labels import AugmentEmbedding, split_augmented
from ldm.util import generator

# The earliest and the latest time that the network is trained at.
FIRST_TIME, LAST_TIME = 0.02, 0.98


def sampling_times(steps: int, first: float = LAST_TIME) -> Tensor:
    """Return the times of a sampler [steps + 1] in float64: evenly from `first` to the earliest trained, then clean."""
    grid = torch.linspace(first, FIRST_TIME, steps, dtype=torch.float64)
    return torch.cat([grid, grid.new_zeros(1)])


class SmallNetwork(nn.Module):
    """Predict the noise in a picture, or v, at time t [B] in (0, 1), of class label [B]; of digits 26,000 parameters.

    States are [B, pixels] or [B, C, H, W]. Of 11 `classes` the last is the null class of guidance. A network of
    `augment_dim` A > 0 takes conditions [B, 1 + A] too, see `ldm.modules.augment_labels`. `masks` [blocks, width]
    multiply the activations inside of the blocks: they are 1, and a member that overrides them is the network with
    units dropped.
    """

    masks: Tensor

    def __init__(self, width: int = 64, blocks: int = 2, pixels: int = 64, classes: int = 10, augment_dim: int = 0):
        super().__init__()
        self.augment_dim = augment_dim
        self.labels = nn.Embedding(classes, width)
        if augment_dim:
            self.augment_emb = AugmentEmbedding(augment_dim, width)
        self.times = nn.Linear(32, width)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.conditions = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, pixels))
        self.register_buffer("masks", torch.ones(blocks, width))

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> SmallNetwork:
        """Draw all parameters as the layers' constructors do, from a generator, and return the network."""
        self.labels.weight.normal_(generator=source)
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and not isinstance(layer, AugmentEmbedding):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=source)
                layer.bias.uniform_(-bound, bound, generator=source)
        return self

    def backbone(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return what the last layers take, [B, width]."""
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(100), 16, device=x.device))
        plain, changes = split_augmented(label, self.augment_dim, labelled=True)
        embedding = self.times(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(plain)
        condition = F.silu(embedding if changes is None else embedding + self.augment_emb(changes))
        h = self.first(x.flatten(1))
        for number, block in enumerate(self.blocks):
            inside = F.silu(h + self.conditions[number](condition))
            h = h + block(inside * self.masks[..., number, :])
        return h

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.out(self.backbone(x, t, label)).reshape(x.shape)


def draw_noised(images: Tensor, labels: Tensor, source: torch.Generator, target: str = "eps") -> Observation:
    """Noise images [..., 64] as training does, at times drawn evenly; see the module's first lines.

    Args:
        target: what is regressed, eps or v = alpha eps - sigma x_0. From eps a picture at much noise is found by a
            division by alpha, which multiplies the errors of a small network; from v it is not.
    """
    t = FIRST_TIME + (LAST_TIME - FIRST_TIME) * torch.rand(images.shape[:-1], generator=source)
    noise = torch.randn(images.shape, generator=source)
    angle = (math.pi / 2 * t)[..., None]
    wanted = noise if target == "eps" else angle.cos() * noise - angle.sin() * images
    return Observation(angle.cos() * images + angle.sin() * noise, t, labels, wanted)


def read_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images [N, 64] of a split, and their classes [N]."""
    data = Digits(split=split)
    return data.images.flatten(1), data.labels


def read_mnist(root: str, split: str, side: int) -> tuple[Tensor, Tensor]:
    """Return the images [N, D] of a split of MNIST, scaled to a side in pixels, and their classes [N]."""
    data = MNIST(root, split, side, fit="resize")
    return torch.stack([data.read(index).flatten() for index in range(len(data))]), data.labels


@dataclass(frozen=True)
class SmallTraining:
    """How networks are trained, many at once: one pass for all, weights and draws of noise of their own.

    Attributes:
        steps: of AdamW, whose rate falls from `rate` to 0 along half a cosine.
        batch: images of a step.
        rate: the first learning rate.
        dropout: the share of units inside of the blocks that every row of a batch drops.
        target: what is regressed, see `draw_noised`.
        width: of networks that are trained from scratch.
    """

    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    dropout: float = 0.0
    target: str = "eps"
    width: int = 64

    def visits(self, images: int) -> float:
        """How often a training sees each of so many images."""
        return self.steps * self.batch / images

    def train(self, images: Tensor, labels: Tensor, chosen: Tensor, seed: int) -> list[SmallNetwork]:
        """Train a network from scratch on each row of `chosen` [M, N], positions of its images."""
        source = generator("retraining", seed)
        networks = [SmallNetwork(self.width, pixels=images.shape[1]).initialise(source) for _ in chosen]
        fitted = self.fit(networks[0], stack_module_state(networks)[0], images, labels, chosen, source)
        return unstack_networks(fitted)

    @torch.enable_grad()
    def fit(
        self,
        network: nn.Module,
        start: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        chosen: Tensor,
        source: torch.Generator,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        pull: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Train the parameters `start` {name: [M, ...]} of M networks; all others stay as they are in `network`.

        Args:
            network: gives the forward pass and what is not trained.
            start: where each network begins.
            images, labels: [N, 64] and [N].
            chosen: [M, n], positions of the images of each network; all have equally many.
            source: of the order, the times and the noises.
            loss: (outputs, noises) [M, B, D] -> [M]; the mean squared error where None.
            pull: {name: factors, broadcasting to the parameter} of squares from the start, added to the loss: an
                anchored member's prior. None of other members.

        Returns:
            {name: [M, ...]}.
        """
        parameters = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
        measure = loss or _squared_error
        run = torch.vmap(lambda own, *rows: functional_call(network, own, rows))
        optimizer = torch.optim.AdamW(parameters.values(), self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = chosen[:, :0]
        for _ in tqdm(range(self.steps), desc=f"{len(chosen)} networks", mininterval=5):
            while order.shape[1] < self.batch:
                shuffled = torch.rand(chosen.shape, generator=source).argsort(1)
                order = torch.cat([order, chosen.gather(1, shuffled)], 1)
            now, order = order[:, : self.batch], order[:, self.batch :]
            rows = draw_noised(images[now], labels[now], source, self.target)
            optimizer.zero_grad()
            given = parameters | self._drop(network, now.shape, source)
            objective = measure(run(given, *rows[:3]), rows.target).sum()
            for name, factor in (pull or {}).items():
                objective = objective + (factor * (parameters[name] - start[name]).square()).sum()
            objective.backward()
            optimizer.step()
            schedule.step()
        return {name: value.detach() for name, value in parameters.items()}

    def _drop(self, network: nn.Module, rows: Sequence[int], source: torch.Generator) -> dict[str, Tensor]:
        """Return masks [M, B, blocks, width] of every row, or nothing where no unit is dropped."""
        if not self.dropout:
            return {}
        return {"masks": draw_masks((*rows, *network.get_buffer("masks").shape), self.dropout, source)}


def draw_masks(shape: Sequence[int], share: float, source: torch.Generator) -> Tensor:
    """Draw factors that drop a share of units and keep the mean: 0, or 1 / (1 - share)."""
    kept = torch.rand(tuple(shape), generator=source) >= share
    return kept / (1 - share)


def _squared_error(outputs: Tensor, noises: Tensor) -> Tensor:
    return (outputs - noises).square().mean((1, 2))


def unstack_networks(parameters: Mapping[str, Tensor]) -> list[SmallNetwork]:
    """Return networks [M] of parameters {name: [M, ...]}, ready to be asked."""
    networks = []
    width, pixels = parameters["first.weight"].shape[1:]
    classes = parameters["labels.weight"].shape[1] if "labels.weight" in parameters else 10
    told = parameters["augment_emb.weight"].shape[2] if "augment_emb.weight" in parameters else 0
    for number in range(len(next(iter(parameters.values())))):
        network = SmallNetwork(width, pixels=pixels, classes=classes, augment_dim=told)
        state = {name: value[number] for name, value in parameters.items()}
        network.load_state_dict({**network.state_dict(), **state})
        networks.append(network.eval().requires_grad_(False))
    return networks
