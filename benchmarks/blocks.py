"""Time a training step of a whole network by how its blocks run: plain, compiled, recomputed, in bfloat16."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.experiments import timing
from ldm.experiments.training_timing import count_saved_bytes, make_whole_step
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.records import Row
from ldm.report.tables import markdown_table
from ldm.training.blocks import BlockOptions
from ldm.util import generator

PLAIN = "plain"
# How the blocks run, and in which type the products are; the first is what the others are compared with.
WAYS: dict[str, tuple[BlockOptions, torch.dtype | None]] = {
    PLAIN: (BlockOptions(), None),
    "compiled": (BlockOptions(compile=True), None),
    "recomputed": (BlockOptions(gradient_checkpointing=True), None),
    "bf16": (BlockOptions(), torch.bfloat16),
    "compiled, bf16": (BlockOptions(compile=True), torch.bfloat16),
    "compiled, recomputed, bf16": (BlockOptions(compile=True, gradient_checkpointing=True), torch.bfloat16),
}


@dataclass(frozen=True)
class BlockTimes:
    """Time a training step of a whole network by how its blocks run.

    A step is forward, backward and AdamW, on random weights and random latents, the same of every way; the losses of
    the first are compared. The ways alternate in one run. The first step of a compiled way holds the compilation, which
    is a cold one where TORCHINDUCTOR_CACHE_DIR names an empty folder. What is kept for the backward pass are the bytes
    of the tensors that autograd holds between the two passes, weights aside.

    Examples:
      TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python benchmarks/blocks.py --size small --threads 2
      TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python benchmarks/blocks.py --size uvit --batch_size 64 --cpu_time
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    batch_size: int = 16
    """Images of a step."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways are timed; plain is always."""
    cpu_time: bool = False
    """Count the CPU's own time, that of compilers too, to which work beside does not count, rather than the clock's."""
    seed: int = 42
    """The seed of weights and latents."""
    plan: timing.TimingPlan = timing.TimingPlan()
    place: Placement = Placement()

    def __post_init__(self) -> None:
        unknown = sorted({*self.ways} - {*WAYS})
        if unknown:
            raise ValueError(f"--ways takes {', '.join(map(repr, WAYS))}; got {unknown}")

    def run(self) -> list[Row]:
        """Print a table of a line a way, and return it."""
        device = self.plan.start(self.place.device)
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        batch = self.draw_batch(model, device)
        clock = measure_cpu_seconds if self.cpu_time else time.perf_counter
        steps: dict[str, Callable[[], Tensor]] = {}
        losses, first, kept = {}, {}, {}
        for name in dict.fromkeys((PLAIN, *self.ways)):
            options, dtype = WAYS[name]
            steps[name] = make_whole_step(model, batch, dtype, options)
            began = clock()
            losses[name] = float(steps[name]())
            timing.synchronize(device)
            first[name] = clock() - began
        timed = timing.time_in_turn(steps, device, self.plan.repeats, 1, clock)
        for name, step in steps.items():
            kept[name] = count_saved_bytes(step)
        rows: list[Row] = []
        for name, one in timed.items():
            median, low, high = timing.compare_rounds(timed[PLAIN], one)
            rows.append(
                {
                    "blocks": name,
                    "first step, s": f"{first[name]:.1f}",
                    "step": str(one),
                    "steps/s": f"{1 / one.median:.3g}",
                    "times faster": f"{median:.2f} [{low:.2f} .. {high:.2f}]",
                    "kept for the backward pass, MB": f"{kept[name] / 1e6:.1f}",
                    "loss beside plain": f"{abs(losses[name] / losses[PLAIN] - 1):.1e}",
                }
            )
        parameters = sum(value.numel() for value in model.model.parameters())
        kind = "CPU time" if self.cpu_time else "time"
        where = timing.describe_device(device)
        print(f"{where}, {self.size}: {parameters:,} parameters, {self.batch_size} images a step; {kind}")
        print(markdown_table(rows))
        timing.write_numbers(self.plan.json, self, rows, {"seconds": timed, "first": first, "kept": kept}, device)
        return rows

    def draw_batch(self, model: LatentDiffusion, device: torch.device) -> dict[str, Any]:
        """Draw latents and classes of a step."""
        channels, height, width = model.latent_shape
        shape = (self.batch_size, height, width, channels)
        assert model.n_classes is not None, "the sizes are of models by class"
        return {
            "image": torch.randn(shape, generator=generator("latents", self.seed)).to(device),
            "class_label": torch.arange(self.batch_size, device=device) % model.n_classes,
            "encoded": torch.ones(self.batch_size, dtype=torch.bool, device=device),
        }


def measure_cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    run_file(BlockTimes)
