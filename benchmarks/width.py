"""Does a posterior have the width of networks that were trained again, and does it keep it whatever the fit's draws?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from tqdm import tqdm

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.commands.line import run_file
from ldm.data.digits import Digits
from ldm.laplace import LastLayerLaplace, Observation, bootstrap_refits
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.uncertainty.agreement import agreement
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
class Recipe:
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


@dataclass(frozen=True)
class Retraining:
    """The network whose posterior is asked for, and those that were trained again beside it.

    Attributes:
        base: trained on all images.
        bootstraps: each on as many images, drawn with replacement.
        repeats: each on the images themselves, from another start, in another order, with other noises.
    """

    base: SmallNetwork
    bootstraps: list[SmallNetwork]
    repeats: list[SmallNetwork]


@dataclass(frozen=True)
class WidthStudy:
    """Hold a posterior's width against networks trained again from scratch, and against other draws of its fit.

    A small network is trained on scikit-learn's digits, and --bootstraps more on images drawn with replacement, from
    starts of their own. Table 1: mean variance of `full` and `sandwich` on held-out rows by the draws of the fit, at
    the visits of the training and (as before there were visits) at as many as there are draws. Table 2: ratio and
    ranks of variances of held-out rows, against the networks trained again and against refits of the last layer.

    Examples:
      python benchmarks/width.py --out results/width

    Writes {out}/networks.safetensors (kept for another call), draws.csv, retraining.csv, record.json.
    """

    out: str
    """The folder of the networks and tables."""
    bootstraps: int = 40
    """Networks trained from scratch on images drawn with replacement, as many as there are."""
    repeats: int = 10
    """Networks trained from scratch on the images themselves: what start, order and noises do alone."""
    draws: tuple[int, ...] = (1, 2, 8, 32)
    """Noise draws of the fits of table 1; one tells no sandwich apart. The last are those of table 2."""
    held_out: int = 64
    """Test images on which variances are compared, one draw of noise each."""
    steps: int = Recipe.steps
    """Steps of each training."""
    seed: int = 0
    """The seed of all draws."""

    @torch.no_grad()
    def run(self) -> dict[str, list[Row]]:
        """Train what is missing, print both tables and write them."""
        networks = self.load_networks()
        images, labels = read_digits("test")
        chosen = torch.arange(self.held_out) * len(images) // self.held_out
        rows = draw_rows(images[chosen], labels[chosen], generator("held out", self.seed))
        note = f"{Recipe(self.steps).visits(len(read_digits('train')[0])):.1f} visits; {describe_errors(networks.base)}"
        tables = {
            "draws": self.compare_draws(networks.base, rows),
            "retraining": self.compare_retraining(networks, rows),
        }
        for name, table in tables.items():
            print(markdown_table(table, 3))
            write_csv(Path(self.out) / f"{name}.csv", table, [note], overwrite=True)
        print(note)
        write_record(Path(self.out) / "record.json", self, overwrite=True)
        return tables

    def load_networks(self) -> Retraining:
        """Return the networks, trained where their file is not there."""
        file = Path(self.out) / "networks.safetensors"
        images, labels = read_digits("train")
        count = 1 + self.bootstraps + self.repeats
        if not file.exists():
            chosen = torch.arange(len(images)).repeat(count, 1)
            size = (self.bootstraps, len(images))
            chosen[1 : 1 + self.bootstraps] = torch.randint(
                len(images), size, generator=generator("bootstrap", self.seed)
            )
            with torch.enable_grad():
                trained = Recipe(self.steps).train(images, labels, chosen, self.seed)
            save_tensors(stack_module_state(trained)[0], file, {}, overwrite=True)
        stacked = load_state_dict(file)
        networks = [SmallNetwork().eval().requires_grad_(False) for _ in range(count)]
        for number, network in enumerate(networks):
            network.load_state_dict({name: value[number] for name, value in stacked.items()})
        return Retraining(networks[0], networks[1 : 1 + self.bootstraps], networks[1 + self.bootstraps :])

    def fit(self, network: SmallNetwork, draws: int) -> LastLayerLaplace:
        """Fit the sandwich's sums; sigma is that of the residuals, the prior precision that of the evidence."""
        visits = Recipe(self.steps).visits(len(read_digits("train")[0]))
        laplace = LastLayerLaplace(network, visits=visits, chunk=256)
        laplace.fit(self.observe(draws), draws=draws, also=["sandwich"])
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        return laplace

    def observe(self, draws: int) -> Iterator[Observation]:
        """Yield rows of the training images, `draws` to an image, other noises for other numbers of draws."""
        images, labels = read_digits("train")
        source = generator("fit", self.seed, draws)
        for part in torch.arange(len(images)).split(128):
            each = part.repeat_interleave(draws)
            yield draw_rows(images[each], labels[each], source)

    def compare_draws(self, network: SmallNetwork, rows: Observation) -> list[Row]:
        """Return table 1: mean variances over those of the last number of draws."""
        found: list[Row] = []
        for draws in self.draws:
            laplace = self.fit(network, draws)
            asked = {"": laplace.visits, ", 1 visit": 1.0, ", visits = draws": float(draws)}
            row: Row = {"draws": draws}
            for name in ("full", "sandwich"):
                for words, visits in asked.items():
                    if name == "full" or draws > 1 or visits == 1:  # one draw tells no sandwich apart
                        row[name + words] = self.mean_variance(laplace, name, visits, rows)
            found.append(row)
        last = dict(found[-1])
        over = [{name: row[name] / value if name in row else "" for name, value in last.items()} for row in found]
        return [{**row, "draws": draws} for draws, row in zip(self.draws, over, strict=True)]

    def mean_variance(self, laplace: LastLayerLaplace, curvature: str, visits: float, rows: Observation) -> float:
        """Return the mean variance of the outputs at rows."""
        own = laplace.with_curvature(curvature)
        own.visits = visits
        return float(own.predict(features_of(own, rows)).variance.mean())

    def compare_retraining(self, networks: Retraining, rows: Observation) -> list[Row]:
        """Return table 2: for each way to a variance, how it compares with networks trained again and with refits."""
        laplace = self.fit(networks.base, self.draws[-1])
        features = features_of(laplace, rows)
        images = len(read_digits("train")[0])
        source = generator("refits", self.seed)
        given = {"images": images, "draws": laplace.repeats, "count": self.bootstraps, "source": source}
        refits = bootstrap_refits(laplace, self.observe(laplace.repeats), **given).variance(features)
        again = spread(networks.bootstraps, rows)
        tempered = laplace.with_curvature("full")
        tempered.optimize_temperature()
        at_draws = laplace.with_curvature("sandwich")
        at_draws.visits = laplace.repeats
        ways = {
            "sandwich": laplace.with_curvature("sandwich").predict(features).variance,
            f"sandwich at {laplace.repeats} visits": at_draws.predict(features).variance,
            "full": laplace.predict(features).variance,
            f"full at temperature {tempered.temperature:.3g}": tempered.predict(features).variance,
            f"refits of the last layer, {self.bootstraps} bootstraps": refits,
            f"{self.repeats} trainings on the same images": spread(networks.repeats, rows),
            "half of the bootstraps trained again": spread(networks.bootstraps[::2], rows),
        }
        half = spread(networks.bootstraps[1::2], rows)
        found: list[Row] = []
        for name, variance in ways.items():
            trained = agreement(variance, half if name.startswith("half") else again)
            refitted = agreement(variance, refits)
            row: Row = {"variance": name, "over trained again": trained.total, "rank": trained.overall}
            row |= {"rank of rows": trained.image, "over refits": refitted.total, "rank, refits": refitted.overall}
            found.append(row)
        return found


def features_of(laplace: LastLayerLaplace, rows: Observation) -> Tensor:
    """Return what the last layer takes of rows."""
    return laplace.features(rows.x, rows.t, rows.cond)


def spread(networks: list[SmallNetwork], rows: Observation) -> Tensor:
    """Return the variance of the outputs of networks at the same rows [B, 64]."""
    return torch.stack([network(rows.x, rows.t, rows.cond) for network in networks]).double().var(0)


def describe_errors(network: SmallNetwork) -> str:
    """Say the mean squared error on training and test images, eight draws each."""
    said = []
    for split in ("train", "test"):
        images, labels = read_digits(split)
        rows = draw_rows(images.repeat(8, 1), labels.repeat(8), generator("errors"))
        said.append(f"{split} {float((network(rows.x, rows.t, rows.cond) - rows.target).square().mean()):.3f}")
    return f"squared error {', '.join(said)}"


if __name__ == "__main__":
    run_file(WidthStudy)
