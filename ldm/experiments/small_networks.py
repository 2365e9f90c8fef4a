"""Small networks for digits, many of which are trained from scratch at once: what studies of retraining stand on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.digits import Digits
from ldm.laplace import Observation
from ldm.util import generator


class SmallNetwork(nn.Module):
    """Predict the noise in a digit x [B, 64] at time t [B] in (0, 1), of class label [B]; about 26,000 parameters."""

    def __init__(self, width: int = 64, blocks: int = 2):
        super().__init__()
        self.labels = nn.Embedding(10, width)
        self.times = nn.Linear(32, width)
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.conditions = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, 64))

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> SmallNetwork:
        """Draw all parameters as the layers' constructors do, from a generator, and return the network."""
        self.labels.weight.normal_(generator=source)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=source)
                layer.bias.uniform_(-bound, bound, generator=source)
        return self

    def backbone(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return what the last layers take, [B, width]."""
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(100), 16, device=x.device))
        condition = F.silu(self.times(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(label))
        h = self.first(x)
        for own, block in zip(self.conditions, self.blocks, strict=True):
            h = h + block(F.silu(h + own(condition)))
        return h

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.out(self.backbone(x, t, label))


def draw_rows(images: Tensor, labels: Tensor, source: torch.Generator) -> Observation:
    """Noise images [..., 64] as training does: x = cos(pi t / 2) x_0 + sin(pi t / 2) eps, t uniform."""
    t = 0.02 + 0.96 * torch.rand(images.shape[:-1], generator=source)
    noise = torch.randn(images.shape, generator=source)
    angle = (math.pi / 2 * t)[..., None]
    return Observation(angle.cos() * images + angle.sin() * noise, t, labels, noise)


def read_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images [N, 64] of a split, and their classes [N]."""
    data = Digits(split=split)
    return data.images.flatten(1), data.labels


@dataclass(frozen=True)
class SmallTraining:
    """How networks are trained from scratch, many at once: one pass for all, weights and draws of noise of their own.

    Attributes:
        steps: of AdamW, whose rate falls from `rate` to 0 along half a cosine.
        batch: images of a step.
        rate: the first learning rate.
    """

    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3

    def visits(self, images: int) -> float:
        """How often a training sees each of so many images."""
        return self.steps * self.batch / images

    def train(self, images: Tensor, labels: Tensor, chosen: Tensor, seed: int) -> list[SmallNetwork]:
        """Train a network on each row of `chosen` [M, N], positions of its images."""
        source = generator("retraining", seed)
        networks = [SmallNetwork().initialise(source) for _ in chosen]
        parameters = {name: value.detach().requires_grad_() for name, value in stack_module_state(networks)[0].items()}
        run = torch.vmap(lambda own, *rows: functional_call(networks[0], own, rows))
        optimizer = torch.optim.AdamW(parameters.values(), self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = chosen[:, :0]
        for _ in tqdm(range(self.steps), desc=f"{len(chosen)} networks"):
            if order.shape[1] < self.batch:
                shuffled = torch.rand(chosen.shape, generator=source).argsort(1)
                order = torch.cat([order, chosen.gather(1, shuffled)], 1)
            now, order = order[:, : self.batch], order[:, self.batch :]
            rows = draw_rows(images[now], labels[now], source)
            optimizer.zero_grad()
            (run(parameters, *rows[:3]) - rows.target).square().mean((1, 2)).sum().backward()
            optimizer.step()
            schedule.step()
        for number, network in enumerate(networks):
            network.load_state_dict({name: value[number].detach() for name, value in parameters.items()})
            network.eval().requires_grad_(False)
        return networks
