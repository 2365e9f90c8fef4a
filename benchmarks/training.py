"""Time the training of an ensemble's members: a step, separate runs, all members together, and the loader alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.data.joint import JointBatches, JointDataset
from ldm.data.latents import LatentStore, describe_data, with_latents
from ldm.data.module import KeyedBatches, ResumableLoader
from ldm.experiments import timing
from ldm.experiments.training_timing import (
    RandomImages,
    TrainingSides,
    find_image_shape,
    start_timed_members,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import PRECISIONS
from ldm.report.tables import markdown_table
from ldm.settings import Precision
from ldm.util import generator


@dataclass(frozen=True)
class TrainingTimes:
    """Time the training of an ensemble's members.

    A step is timed against a forward pass, separate runs that encode their images against all members together on
    cached latents, and the loader alone. Random weights, random images, the same draws on both sides, whose losses are
    compared. The sides alternate in one run with a matrix product between them, whose rate is the ceiling. A step is
    forward, backward and AdamW.

    Examples:
      python benchmarks/training.py --size small --threads 2
      python benchmarks/training.py --size cin256 --batch_size 2 --members 1 --repeats 2
      python benchmarks/training.py --size cin256 --device cuda --precision bf16 --batch_size 16
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    members: int = 5
    """The number of members."""
    heads: tuple[str, ...] = ("class_embedding",)
    """The heads that train."""
    batch_size: int = 16
    """Images of a member's batch."""
    precision: Precision = "float32"
    """The precision of the network's products."""
    workers: int = 0
    """Processes of the loader that is timed."""
    seed: int = 42
    """The seed of weights and members."""
    plan: timing.TimingPlan = timing.TimingPlan()
    place: Placement = Placement()

    def make_loader(self, model: LatentDiffusion, folder: Path) -> tuple[ResumableLoader, int]:
        """Return a loader of all members' batches from a latent cache, and the images of an epoch."""
        count = 64 * self.batch_size
        data = RandomImages(count, find_image_shape(model), model.n_classes)
        store = LatentStore(folder, describe_data(data), count, 1)
        draws = generator("latents", self.seed)

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            return (torch.randn((len(images), *model.latent_shape), generator=draws),)

        for _ in store.fill(data, encode, 256):
            pass
        cached = with_latents(data, store)
        batches = [KeyedBatches(cached, self.batch_size, member, member) for member in range(self.members)]
        joint = JointDataset([each.data for each in batches])
        loader = ResumableLoader(joint, batch_sampler=JointBatches(batches), num_workers=self.workers)
        return loader, count * self.members

    def measure_loader(self, model: LatentDiffusion, device: torch.device) -> float:
        """Return the images a second of the loader alone."""
        with tempfile.TemporaryDirectory() as folder:
            loader, images = self.make_loader(model, Path(folder))
            calls = {"loader": lambda: [None for _ in loader]}
            return images / timing.time_in_turn(calls, device, self.plan.repeats)["loader"].median

    def run(self) -> dict[str, Any]:
        """Print a table of a line a side, and return the numbers."""
        device = self.plan.start(self.place.device)
        count, dtype = self.members, PRECISIONS[self.precision]
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        sides = TrainingSides(start_timed_members(model, self.heads, count, self.seed), self.batch_size, dtype)
        apart = torch.stack([sides.loss(member, sides.images) for member in range(count)]).detach()
        difference = timing.largest_difference(apart, sides.joint_losses().detach())
        product, made = timing.make_matrix_product(device, dtype)
        calls: dict[str, Callable[[], Any]] = {
            "product": product,
            "forward pass, 1 member": sides.forward,
            "step, 1 member, latents": sides.one,
            f"{count} runs, images encoded": lambda: sides.runs(sides.images),
            f"{count} runs, cached latents": lambda: sides.runs(sides.latents),
            f"{count} together, cached latents": sides.all,
        }
        counted = {name: timing.count_operations(call) for name, call in calls.items()}
        timed = timing.time_in_turn(calls, device, self.plan.repeats)
        numbers = {
            "rate": made / timed["product"].median,
            "operations": counted,
            "ratio": counted["step, 1 member, latents"] / counted["forward pass, 1 member"],
            "difference": difference,
            "loader": self.measure_loader(sides.members[0], device),
            "trained": count * self.batch_size / timed[f"{count} together, cached latents"].median,
            "seconds": {name: one.values for name, one in timed.items()},
        }
        rows = self.make_rows(counted, timed, numbers["rate"])
        self.print(rows, numbers, device)
        timing.write_numbers(self.plan.json, self, rows, numbers, device)
        return numbers

    def make_rows(self, counted: dict[str, int], timed: dict[str, timing.Timing], rate: float) -> list[dict[str, Any]]:
        """Return a line a side, the matrix product left out, whose `rate` is in operations a second."""
        runs = timed[f"{self.members} runs, images encoded"]
        rows = []
        for name in list(timed)[1:]:
            speed = counted[name] / timed[name].median
            median, low, high = timing.compare_rounds(runs, timed[name])
            rows.append(
                {
                    "side": name,
                    "time": str(timed[name]),
                    "steps/s": f"{1 / timed[name].median:.3g}",
                    "GFLOP": f"{counted[name] / 1e9:.1f}",
                    "GFLOP/s": f"{speed / 1e9:.0f}",
                    "of the product's rate": f"{speed / rate:.0%}",
                    "times faster": "" if "member" in name else f"{median:.2f} [{low:.2f} .. {high:.2f}]",
                }
            )
        return rows

    def print(self, rows: list[dict[str, Any]], numbers: dict[str, Any], device: torch.device) -> None:
        """Print what was found."""
        print(
            f"{timing.describe_device(device)}, {self.size}: batches of {self.batch_size}, heads {list(self.heads)}, "
            f"{self.precision}; matrix product {numbers['rate'] / 1e9:.0f} GFLOP/s\n"
            f"a step has {numbers['ratio']:.2f} times the operations of a forward pass; losses of the two ways differ "
            f"by {numbers['difference']:.1e} (relative)\nthe loader alone gives {numbers['loader']:.0f} images/s, "
            f"the training takes {numbers['trained']:.0f}"
        )
        print(markdown_table(rows))


if __name__ == "__main__":
    run_file(TrainingTimes)
