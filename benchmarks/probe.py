"""Time a grid search over probes two ways in one run: all heads together, and a pass and an optimiser a head."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.commands.line import run_file
from ldm.commands.shared import ModelSource, Placement
from ldm.diffusion.denoiser import Target
from ldm.diffusion.schedule import VPSchedule, make_betas
from ldm.evaluation.grid_features import GridFeatures, read_features
from ldm.evaluation.probe import Heads, ProbeTraining, fit_heads
from ldm.evaluation.taps import Backbone, Place, Reading, resolve_taps
from ldm.experiments.probes import draw_probe_positions
from ldm.modules.conditioned import ConditionedNetwork, DiffusionWrapper
from ldm.options import option
from ldm.pipelines.features import DataStates, make_backbone, read_times
from ldm.report.tables import markdown_table
from ldm.settings import Sampling, Speed
from ldm.util import generator, instantiate_from_config

SHAPE = (3, 16, 16)
NETWORK = {
    "target": "ldm.modules.ddpmpp.UNet",
    "params": {
        "image_shape": SHAPE,
        "n_channels": 32,
        "ch_mults": [1, 2, 2],
        "n_blocks": 3,
        "is_attn": [False, True, False],
    },
}
CLASSES = 10
Weights = dict[Place, Tensor]


class RandomStates:
    """Noise in the place of images."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.labels = torch.randint(CLASSES, (count,), generator=generator("benchmark labels", seed))

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        """Return the states of some rows, [stop - start, C, H, W]."""
        rows = range(start, min(stop, self.count))
        return torch.stack([torch.randn(SHAPE, generator=generator("benchmark", self.seed, row)) for row in rows])

    def describe(self) -> dict[str, int]:
        """Return what the states depend on."""
        return {"random": self.count, "seed": self.seed}


@dataclass(frozen=True)
class GridSearch:
    """What is searched: a backbone, images, and where features are read."""

    backbone: Backbone
    states: RandomStates | DataStates
    reading: Reading

    def warm_up(self) -> None:
        """Pass once, so that what a first pass sets up is not timed."""
        self.backbone.features(self.states.read(0, 100), range(min(100, len(self.states))), self.reading)

    def fit_together(self) -> Weights:
        """Fit every head: one pass a noise level, one optimiser."""
        heads = fit_all_heads(read_features(self.states, self.backbone, self.reading))
        return {place: heads.only(place).groups[0].weight[0] for place in self.reading.places}

    def fit_one_by_one(self, whole: bool) -> Weights:
        """Fit every head with a pass over the images and an optimiser of its own; `whole` passes go to the end."""
        found = {}
        end = {"whole": ""} if whole else {}
        for u, tap in tqdm(self.reading.places, desc="heads", unit="head"):
            one = replace(self.reading, times=(u,), taps={tap: self.reading.taps[tap], **end})
            features = read_features(self.states, self.backbone, one)
            head = fit_all_heads(GridFeatures({(u, tap): features.arrays[u, tap]}, features.labels))
            found[u, tap] = head.groups[0].weight[0]
        return found


def fit_all_heads(features: GridFeatures) -> Heads:
    """Fit a head to each of the features, for one epoch."""
    labels = np.asarray(features.labels)
    return fit_heads([features.arrays], labels, np.arange(len(labels)), CLASSES, ProbeTraining(epochs=1), seed=0)


@dataclass(frozen=True)
class Outcome:
    """The weights that a way gives, its seconds, and its seconds of CPU time."""

    weights: Weights
    seconds: float
    cpu: float

    @classmethod
    def measure(cls, fit: Callable[[], Weights]) -> Outcome:
        """Fit once, and time it."""
        began = time.perf_counter()
        used = time.process_time()
        weights = fit()
        return cls(weights, time.perf_counter() - began, time.process_time() - used)

    def difference(self, other: Outcome) -> float:
        """Return the largest difference of two ways' weights, over the largest weight of this way."""
        gaps = [float((other.weights[place] - own).abs().max()) for place, own in self.weights.items()]
        return max(gaps) / max(float(own.abs().max()) for own in self.weights.values())


@dataclass(frozen=True)
class ProbeTimes:
    """Time a grid search over probes two ways in one run: all heads together, and a pass and an optimiser a head.

    Both ways run without autograd through the backbone and on the same noise, and must agree: the same weights of every
    head, to rounding. Without --run, a small DDPM UNet with fresh weights on random images has twelve taps on its way
    up; with three noise levels these are 36 heads. "Whole backbone" passes to the end, as published code does; "to the
    tap" stops there, as ours does. One epoch each, so that features are used once; in a further epoch the published way
    passes again.

    Examples:
      python benchmarks/probe.py
      python benchmarks/probe.py --run logs/2026-01-01T00-00-00_mnist --t 11 41 101 --n 500
    """

    source: ModelSource = ModelSource()
    n: int = 200
    """The number of images."""
    t: tuple[float, ...] = (1, 11, 21)
    """The noise levels, entries of the schedule's table."""
    layers: Annotated[tuple[str, ...] | None, option(metavar="NAME ...", default="those on the way up")] = None
    """The taps where features are read."""
    seed: int = 42
    """The seed of images and noise."""
    place: Placement = Placement()

    def load(self) -> GridSearch:
        """Return a trained model's search on its own data, or that of a fresh network on random images."""
        states: RandomStates | DataStates
        if self.source.run or self.source.base:
            pipeline = self.source.load(Sampling(seed=self.seed), Speed(chunk=1), self.place.device)
            data = instantiate_from_config(pipeline.config["data"]["params"]["train"])
            backbone = make_backbone(pipeline.model)
            states = DataStates(pipeline.model, data, draw_probe_positions(len(data), self.n, self.seed))
            times = read_times(pipeline.model, {"t": self.t})
        else:
            network = ConditionedNetwork(DiffusionWrapper(NETWORK)).eval().requires_grad_(False)
            backbone = Backbone(network, VPSchedule(make_betas("sqrt_linear", 1000)), Target("eps"))
            states = RandomStates(self.n, self.seed)
            times = self.t
        taps = resolve_taps(backbone.network, self.layers or ["all"])
        if self.layers is None:
            taps = {tap: name for tap, name in taps.items() if tap.startswith("out")} or taps
        return GridSearch(backbone, states, Reading(times, taps, seed=self.seed))

    def run(self) -> list[dict[str, Any]]:
        """Print and return a table of a line a way."""
        with torch.no_grad():
            search = self.load()
        search.warm_up()
        ways = {
            "together": search.fit_together,
            "one a head, whole backbone": lambda: search.fit_one_by_one(whole=True),
            "one a head, to the tap": lambda: search.fit_one_by_one(whole=False),
        }
        rows, first = [], None
        for name, fit in ways.items():
            found = Outcome.measure(fit)
            first = first or found
            rows.append(
                {
                    "way": name,
                    "heads": len(search.reading.places),
                    "seconds": found.seconds,
                    "CPU seconds": found.cpu,
                    "ratio": found.seconds / first.seconds,
                    "CPU ratio": found.cpu / first.cpu,
                    "largest difference": first.difference(found),
                }
            )
        levels = f"{len(search.reading.times)} noise levels x {len(search.reading.taps)} layers"
        print(f"{len(search.states)} images, {levels}, {torch.__version__}")
        print(markdown_table(rows))
        return rows


if __name__ == "__main__":
    run_file(ProbeTimes)
