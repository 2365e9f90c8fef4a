"""Everything that is timed on a GPU, in ten minutes and one table: sampling of ensembles and training of members."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.noise import ImageNoise
from ldm.experiments import timing
from ldm.experiments.member_timing import MemberSides, find_precision, make_variant, measure_first_step
from ldm.experiments.training_timing import TrainingSides, start_timed_members
from ldm.memory import is_out_of_memory
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import PRECISIONS
from ldm.report.tables import markdown_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One line of the table: a network, a number of members, and how it runs."""

    size: timing.SizeName
    members: int
    variant: str


@dataclass(frozen=True)
class DeviceTable:
    """Time sampling and training at published shapes on one device, for as long as it is given.

    Sampling: members under guidance, all at once, from the same noise; images a second (an image of one member is one
    image), the share of the measured rate of a matrix product in the same precision (model FLOP utilisation against
    what the device reaches, not against its data sheet), the memory beyond the weights, and the mutual information of
    the first step against float32. Training: a step of each member together on cached latents. What the time does not
    reach, or what does not fit into memory, stands in the table as such.

    Examples:
      python benchmarks/gpu.py --device cuda --json results/gpu.json
      python benchmarks/gpu.py --device cpu --sizes tiny --members 1 5 --variants float32 bf16 --minutes 2
    """

    sizes: tuple[timing.SizeName, ...] = ("cin256", "dit-xl-2")
    """The networks, of random weights; ldm/experiments/timing.py lists them."""
    members: tuple[int, ...] = (1, 5, 20)
    """Numbers of members."""
    variants: tuple[str, ...] = ("float32", "bf16", "bf16+channels_last", "bf16+compile")
    """How the network runs: float32, bf16, fp16, channels_last and compile, joined by +."""
    n: int = 4
    """Images of a member."""
    steps: int = 4
    """DDIM steps; the cost of a step does not depend on their number."""
    scale: float = 1.5
    """The scale of classifier-free guidance."""
    batch_size: int = 8
    """Images of a member's batch in training."""
    minutes: float = 10.0
    """No cell begins later than this."""
    seed: int = 42
    """The seed of weights, members and noise."""
    plan: timing.TimingPlan = timing.TimingPlan(repeats=3)
    place: Placement = Placement()

    def run(self) -> dict[str, list[Row]]:
        """Print both tables and return their rows.

        Raises:
            ValueError: for an unknown word in `variants`.
        """
        device = self.plan.start(self.place.device)
        end = time.monotonic() + 60 * self.minutes
        sampling: list[Row] = []
        training: list[Row] = []
        for size in self.sizes:
            sampling += self.sample(size, device, end)
            for count in self.members:
                named = {"network": size, "members": count}
                training.append(self.bounded(end, named, self.train(size, count, device)))
        print(f"{timing.describe_device(device)}: {self.n} images, {self.steps} DDIM steps, guidance {self.scale:g}")
        print(markdown_table(sampling))
        print(f"training, batches of {self.batch_size}")
        print(markdown_table(training))
        found = {"sampling": sampling, "training": training}
        timing.write_numbers(self.plan.json, self, sampling, found, device)
        return found

    def bounded(self, end: float, named: Row, measure: Callable[[], Row]) -> Row:
        """Return what a cell measured, or why it did not."""
        if time.monotonic() > end:
            return {**named, "result": f"not run: the {self.minutes:g} minutes were over"}
        try:
            return {**named, "result": "ok", **measure()}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {**named, "result": "does not fit into memory"}
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @torch.no_grad()
    def sample(self, size: timing.SizeName, device: torch.device, end: float) -> Iterator[Row]:
        """Yield a row of each number of members and variant."""
        model = timing.draw_model(timing.load_size_config(size), device, self.seed)
        for count in self.members:
            for variant in self.variants:
                cell = Cell(size, count, variant)
                named = {"network": size, "members": count, "runs": variant}
                yield self.bounded(end, named, lambda cell=cell: self.measure(model, cell, device))

    def measure(self, model: LatentDiffusion, cell: Cell, device: torch.device) -> Row:
        """Measure one way to sample."""
        members = timing.draw_members(model, ("class_embedding",), cell.members, self.seed)
        labels = torch.arange(self.n, device=device) % model.n_classes
        x = ImageNoise(self.seed, tuple(range(self.n)), device).initial((self.n, *model.latent_shape))
        sides = MemberSides(members, labels, self.scale, x * model.schedule.prior_std, self.steps)
        exact = measure_first_step(sides.together(copy.copy(model))[1]) if cell.members > 1 else None
        own = make_variant(model, cell.variant, device)
        started = time.monotonic()
        first = sides.together(own)[1]
        warm = time.monotonic() - started
        mi = None if exact is None else float((measure_first_step(first) - exact).abs().max())
        product, made = timing.make_matrix_product(device, PRECISIONS[find_precision(cell.variant, device)])
        timed = timing.time_in_turn(
            {"product": product, "ours": lambda: sides.together(own)}, device, self.plan.repeats
        )
        operations = timing.count_operations(lambda: sides.together(model))
        seconds = timed["ours"].median
        share = operations / seconds / (made / timed["product"].median)
        return {
            "time": str(timed["ours"]),
            "images/s a step": f"{cell.members * self.n * self.steps / seconds:.3g}",
            "TFLOP/s": f"{operations / seconds / 1e12:.3g}",
            "of the product's rate": f"{share:.0%}",
            "memory": f"{timing.measure_memory(lambda: sides.together(own), device) / 2**30:.2f} GiB",
            "first call": f"{warm:.1f} s",
            "MI from float32 (nats)": "" if mi is None else f"{mi:.1e} of {float(exact.mean()):.1e}",
        }

    def train(self, size: timing.SizeName, members: int, device: torch.device) -> Callable[[], Row]:
        """Return the measurement of a step of all members together, in bf16 where any variant is."""
        variant = next((one for one in self.variants if "bf16" in one), "float32")
        precision = find_precision(variant, device)

        def measure() -> Row:
            model = timing.draw_model(timing.load_size_config(size), device, self.seed)
            started = start_timed_members(model, ("class_embedding",), members, self.seed)
            sides = TrainingSides(started, self.batch_size, PRECISIONS[precision])
            product, made = timing.make_matrix_product(device, PRECISIONS[precision])
            timed = timing.time_in_turn({"product": product, "ours": sides.all}, device, self.plan.repeats)
            seconds = timed["ours"].median
            rate = timing.count_operations(sides.all) / seconds
            return {
                "precision": precision,
                "time": str(timed["ours"]),
                "images/s": f"{members * self.batch_size / seconds:.3g}",
                "TFLOP/s": f"{rate / 1e12:.3g}",
                "of the product's rate": f"{rate / (made / timed['product'].median):.0%}",
                "memory": f"{timing.measure_memory(torch.enable_grad()(sides.all), device) / 2**30:.2f} GiB",
            }

        return measure


if __name__ == "__main__":
    run_file(DeviceTable)
