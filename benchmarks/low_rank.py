"""Time members of a low rank inside the backbone: separate passes, vmap over whole weights, one product of groups."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.noise import ImageNoise
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.experiments import timing
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.low_rank import add_factors, find_layers
from ldm.report.tables import markdown_table
from ldm.util import generator

SEPARATE = "separate passes"


def draw_low_rank_members(model: LatentDiffusion, layers: tuple[str, ...], rank: int, count: int, seed: int) -> Members:
    """Give a model's network factors, and draw members that differ in them, each correction a tenth of its weight."""
    unet = model.model.diffusion_model
    add_factors(unet, find_layers(unet, layers), rank)
    state = model.network.state_dict()
    overrides = {}
    for name in (name for name in state if "lora_" in name):
        weight = state[f"{name.rpartition('.')[0]}.weight"]
        fan = weight[0].numel() if name.endswith("A") else 100 * rank
        draws = torch.randn(count, *state[name].shape, generator=generator("low rank", name, seed))
        overrides[name] = draws.to(weight.device) * fan**-0.5
    return Members(overrides)


@dataclass(frozen=True)
class LowRankTimes:
    """Time one pass of members that differ by factors of a low rank in layers of the backbone.

    Three sides compute the same: a pass a member, as published for heads; `vmap` over all of the network, which makes
    every member's weights W + B A; and one batch, in which a layer computes W x once for all members and B (A x) in
    groups. The sides alternate; ratios are medians of the rounds with their range. Memory is what tensors take at once
    beyond the weights and the factors.

    Examples:
      python benchmarks/low_rank.py --size tiny --members 5 20 100
      python benchmarks/low_rank.py --size small --layers attention --members 5 20 --cpu_time
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    members: tuple[int, ...] = (5, 20, 100)
    """Numbers of members, a row each."""
    layers: tuple[str, ...] = ("attention",)
    """The layers that have factors: patterns, or attention."""
    rank: int = 4
    """The rank of the factors."""
    n: int = 2
    """Images of each member."""
    cpu_time: bool = False
    """Count the CPU's own time, to which work beside does not count, rather than the clock's."""
    seed: int = 42
    """The seed of weights, factors and states."""
    plan: timing.TimingPlan = timing.TimingPlan()
    place: Placement = Placement()

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a number of members and side, and return its numbers."""
        device = self.plan.start(self.place.device)
        rows: list[dict[str, Any]] = []
        numbers: list[dict[str, Any]] = []
        for count in self.members:
            found = self.measure(count, device)
            numbers.append(found)
            rows += found.pop("rows")
        layers = " ".join(self.layers)
        print(f"{timing.describe_device(device)}: {self.size}, {self.n} images a member, rank {self.rank} of {layers}")
        print(markdown_table(rows))
        timing.write_numbers(self.plan.json, self, rows, numbers, device)
        return numbers

    def measure(self, count: int, device: torch.device) -> dict[str, Any]:
        """Time the sides with `count` members."""
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        members = draw_low_rank_members(model, self.layers, self.rank, count, self.seed)
        network = model.network
        noise = ImageNoise(self.seed, tuple(range(count * self.n)), device)
        x = noise.initial((count * self.n, *model.latent_shape)).unflatten(0, (count, self.n))
        t = torch.full((self.n,), 500.0, device=device)
        labels = torch.arange(self.n, device=device) % model.n_classes if model.n_classes else None
        alone = [SingleMember(network, members, one) for one in range(count)]
        vmapped = MemberNetwork(network, members, staged=False)
        folded = MemberNetwork(network, members)
        sides: dict[str, timing.Call] = {
            SEPARATE: lambda: torch.stack([one(x[m], t, labels) for m, one in enumerate(alone)]),
            "vmap": lambda: vmapped(x, t, labels),
            "one product": lambda: folded(x, t, labels),
        }
        outputs: dict[str, Tensor] = {name: call() for name, call in sides.items()}
        memory = {name: timing.measure_memory(call, device) for name, call in sides.items()}
        clock = time.process_time if self.cpu_time else time.perf_counter
        timed = timing.time_in_turn(sides, device, self.plan.repeats, 0, clock)
        differences = {name: timing.largest_difference(outputs[SEPARATE], one) for name, one in outputs.items()}
        rows = []
        for name, one in timed.items():
            median, low, high = timing.compare_rounds(timed[SEPARATE], one)
            rows.append(
                {
                    "members": count,
                    "side": name,
                    "time": str(one),
                    "times faster": f"{median:.2f} [{low:.2f} .. {high:.2f}]",
                    "memory": f"{memory[name] / 2**20:.0f} MiB",
                    "difference": f"{differences[name]:.1e}",
                }
            )
        seconds = {name: one.values for name, one in timed.items()}
        return {"members": count, "rows": rows, "seconds": seconds, "memory": memory, "differences": differences}


if __name__ == "__main__":
    run_file(LowRankTimes)
