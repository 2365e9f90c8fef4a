"""How time and peak memory of sampling an ensemble grow with members, images, steps and image size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.members import MemberNetwork
from ldm.experiments import timing
from ldm.memory import Chunker
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import with_speed
from ldm.report.tables import markdown_table
from ldm.settings import Speed


@dataclass(frozen=True)
class Case:
    """Four numbers that decide what sampling costs; `latents` is a side, in that of the network's own latents."""

    members: int
    n: int
    steps: int
    latents: int


@dataclass(frozen=True)
class Cost:
    """What sampling took: durations, operations, and bytes of tensors beyond the weights."""

    timing: timing.Timing
    operations: int
    bytes: int


@dataclass(frozen=True)
class Growth:
    """Measure how time and peak memory of sampling an ensemble grow with members, images, steps and image size.

    One number is changed at a time, the others stay at their first value (5 members, 2 images, 4 steps, the size's own
    latents). Memory is what tensors take at once beyond the weights: a pass of the network holds at most --chunk
    images.

    Examples:
      python benchmarks/growth.py --size small --threads 2
      python benchmarks/growth.py --size cin256 --device cuda --members 5 10 20 --precision bf16
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    members: tuple[int, ...] = (5, 1, 2, 10, 20)
    """Numbers of members, the usual one first."""
    n: tuple[int, ...] = (2, 1, 4, 8)
    """Numbers of images, the usual one first."""
    steps: tuple[int, ...] = (4, 2, 8)
    """Numbers of steps, the usual one first."""
    latents: tuple[int, ...] = (1, 2)
    """Sides of the latents, in that of the size."""
    scale: float = 5.0
    """The scale of classifier-free guidance; 1 turns it off."""
    seed: int = 42
    """The seed of weights, members and noise."""
    plan: timing.TimingPlan = field(default_factory=lambda: timing.TimingPlan(repeats=3))
    place: Placement = Placement()
    speed: Speed = Speed()

    def cases(self) -> Iterator[tuple[str, Case]]:
        """Yield what changes, and the four numbers."""
        usual = Case(self.members[0], self.n[0], self.steps[0], self.latents[0])
        yield "the usual", usual
        for name in asdict(usual):
            for value in getattr(self, name)[1:]:
                yield name, replace(usual, **{name: value})

    def measure(self, model: LatentDiffusion, case: Case, device: torch.device, chunker: Chunker) -> Cost:
        """Measure the sampling of all members from the start."""
        members = timing.draw_members(model, ["class_embedding"], case.members, self.seed)
        channels, height, width = model.latent_shape
        shape = (case.n, channels, case.latents * height, case.latents * width)
        x = ImageNoise(self.seed, tuple(range(case.n)), device).initial(shape)
        labels = torch.arange(case.n, device=device) % model.n_classes
        network = MemberNetwork(model.network, members, chunker)

        def sample() -> Tensor:
            denoiser = model.denoiser(labels, self.scale, network)
            return run(ddim(denoiser, model.schedule, x, model.sampling_times(case.steps)))

        timed = timing.time_in_turn({"sample": sample}, device, self.plan.repeats)["sample"]
        return Cost(timed, timing.count_operations(sample), timing.measure_memory(sample, device))

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a case, and return its numbers."""
        device = self.plan.start(self.place.device)
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        model, passes = with_speed(model, self.speed, device)
        rows, numbers, usual = [], [], None
        for changed, case in self.cases():
            cost = self.measure(model, case, device, Chunker(passes.limit))
            usual = usual or cost
            found = {"seconds": cost.timing.values, "operations": cost.operations, "bytes": cost.bytes}
            numbers.append({**asdict(case), "changed": changed, **found})
            rows.append(
                {
                    "changed": changed,
                    **asdict(case),
                    "time": str(cost.timing),
                    "of the usual": f"{cost.timing.median / usual.timing.median:.2f}",
                    "GFLOP": f"{cost.operations / 1e9:.1f}",
                    "GFLOP/s": f"{cost.operations / cost.timing.median / 1e9:.0f}",
                    "MiB": f"{cost.bytes / 2**20:.1f}",
                }
            )
        print(f"{timing.describe_device(device)}, {self.size}: at most {passes.limit} images in a pass")
        print(markdown_table(rows))
        timing.write_numbers(self.plan.json, self, rows, numbers, device)
        return numbers


if __name__ == "__main__":
    run_file(Growth)
