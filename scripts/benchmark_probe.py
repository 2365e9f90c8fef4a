"""Time a grid search over probes two ways in one run: all heads together, and one trunk pass and optimiser a head.

Examples:
  python scripts/benchmark_probe.py
  python scripts/benchmark_probe.py --run logs/2026-01-01T00-00-00_mnist --t 11 41 101 --n 500

Both ways run without autograd through the trunk and on the same noise, and must agree: the same weights of every head,
to rounding. Without --run, a small DDPM UNet with fresh weights on random images has twelve taps on its way up; with
three noise levels these are 36 heads. "Whole trunk" passes to the end, as published code does; "to the tap" stops
there, as ours does. One epoch each, so that features are used once; in a further epoch the published way passes again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from ldm.arguments import add_source_arguments, open_model
from ldm.cli import HelpFormatter, add_device_arguments, run_script
from ldm.diffusion.denoiser import Target
from ldm.diffusion.schedule import VPSchedule, make_betas
from ldm.evaluation.grid_features import GridFeatures, read_features
from ldm.evaluation.probe import Heads, ProbeTraining, fit_heads
from ldm.evaluation.taps import Backbone, Place, Reading, resolve_taps
from ldm.experiments.probes import draw_probe_positions
from ldm.modules.conditioned import ConditionedNetwork, DiffusionWrapper
from ldm.pipelines.features import DataStates, make_backbone, read_times
from ldm.report.tables import markdown_table
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


class RandomStates:
    """Noise in the place of images."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.labels = torch.randint(CLASSES, (count,), generator=generator("benchmark labels", seed))

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> torch.Tensor:
        rows = range(start, min(stop, self.count))
        return torch.stack([torch.randn(SHAPE, generator=generator("benchmark", self.seed, row)) for row in rows])

    def describe(self) -> dict[str, int]:
        return {"random": self.count, "seed": self.seed}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_source_arguments(parser, required=False)
    parser.add_argument("--n", type=int, default=200, help="images")
    parser.add_argument("--t", nargs="+", type=float, default=[1, 11, 21], help="noise levels, table entries")
    parser.add_argument("--layers", nargs="+", default=None, help="taps (default: those on the way up)")
    parser.set_defaults(chunk=1, precision="float32", epoch=None)
    add_device_arguments(parser)
    return parser


def setting_of(options: argparse.Namespace) -> tuple[Backbone, RandomStates | DataStates, Reading]:
    """Backbone, images and what is read."""
    if options.run or options.base:
        pipeline = open_model(options)
        trunk, data = make_backbone(pipeline.model), instantiate_from_config(pipeline.config["data"]["params"]["train"])
        states = DataStates(pipeline.model, data, draw_probe_positions(len(data), options.n, options.seed))
        times = read_times(pipeline.model, {"t": options.t})
    else:
        network = ConditionedNetwork(DiffusionWrapper(NETWORK)).eval().requires_grad_(False)
        schedule = VPSchedule(make_betas("sqrt_linear", 1000))
        trunk, states, times = (
            Backbone(network, schedule, Target("eps")),
            RandomStates(options.n, options.seed),
            tuple(options.t),
        )
    taps = resolve_taps(trunk.network, options.layers or ["all"])
    if options.layers is None:
        taps = {tap: name for tap, name in taps.items() if tap.startswith("out")} or taps
    return trunk, states, Reading(times, taps, seed=options.seed)


def fitted(features: GridFeatures) -> Heads:
    labels = np.asarray(features.labels)
    return fit_heads([features.arrays], labels, np.arange(len(labels)), CLASSES, ProbeTraining(epochs=1), seed=0)


def together(trunk: Backbone, states: RandomStates | DataStates, reading: Reading) -> dict[Place, torch.Tensor]:
    """Weights of every head: one pass a noise level, one optimiser."""
    heads = fitted(read_features(states, trunk, reading))
    return {place: heads.only(place).groups[0].weight[0] for place in reading.places}


def one_by_one(
    trunk: Backbone, states: RandomStates | DataStates, reading: Reading, whole: bool
) -> dict[Place, torch.Tensor]:
    """The same with a pass over the images and an optimiser a head; `whole` passes do not end at the tap."""
    found = {}
    end = {"whole": ""} if whole else {}
    for u, tap in tqdm(reading.places, desc="heads", unit="head"):
        one = replace(reading, times=(u,), taps={tap: reading.taps[tap], **end})
        features = read_features(states, trunk, one)
        head = fitted(GridFeatures({(u, tap): features.arrays[u, tap]}, features.labels))
        found[u, tap] = head.groups[0].weight[0]
    return found


def timed(work: Callable[[], dict[Place, torch.Tensor]]) -> tuple[dict[Place, torch.Tensor], float, float]:
    """What the work gives, seconds, and seconds of CPU time."""
    began, used = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - began, time.process_time() - used


def main(argv: list[str] | None = None) -> None:
    options = get_parser().parse_args(argv)
    with torch.no_grad():
        trunk, states, reading = setting_of(options)
    ways = {
        "together": lambda: together(trunk, states, reading),
        "one a head, whole trunk": lambda: one_by_one(trunk, states, reading, whole=True),
        "one a head, to the tap": lambda: one_by_one(trunk, states, reading, whole=False),
    }
    trunk.features(states.read(0, 100), range(min(100, len(states))), reading)  # what a first pass sets up is not timed
    rows, first = [], None
    for name, work in ways.items():
        found, seconds, cpu = timed(work)
        first = first or (found, seconds, cpu)
        difference = max(float((found[place] - first[0][place]).abs().max()) for place in reading.places)
        largest = max(float(first[0][place].abs().max()) for place in reading.places)
        rows.append({
            "way": name, "heads": len(reading.places), "seconds": seconds, "CPU seconds": cpu,
            "ratio": seconds / first[1], "CPU ratio": cpu / first[2], "largest difference": difference / largest,
        })  # fmt: skip
    print(f"{len(states)} images, {len(reading.times)} noise levels x {len(reading.taps)} layers, {torch.__version__}")
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
