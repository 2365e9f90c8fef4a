"""What weights that are drawn again at every step lose, and how well BayesDiff's recursion follows them.

Three things are told apart: weights held for a trajectory (`persistent`), the process that draws them again at every
evaluation (`redrawn`, many states), and the recursion of variances that stands for it (`bayesdiff`, few states).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import ModelSource, Placement, PosteriorSource
from ldm.diffusion.noise import ImageNoise
from ldm.options import option
from ldm.pipelines import PosteriorPipeline
from ldm.pipelines.posterior import ONE_EVALUATION
from ldm.records import Row
from ldm.report.tables import markdown_table, write_csv
from ldm.settings import SamplerName, Sampling, Speed
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.propagation import bayesdiff, beginning
from ldm.util import derive_seed


@dataclass(frozen=True)
class StudyRedrawn:
    """Compare weights that are drawn again with held ones, and the recursion with the process it stands for.

    For each number of steps and each sampler: --states held weights, as many states with new weights at every
    evaluation, and the recursion with each of --numbers, twice with other seeds. Columns are ranks of the pixels
    within an image, of the images' sums, and the total of the first over that of the second.

    Examples:
      python benchmarks/redrawn.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --scale 1
    """

    default_steps: ClassVar[int] = 10

    posterior: PosteriorSource
    source: ModelSource = ModelSource()
    n: int = 20
    """The images, the classes in turn."""
    states: int = 256
    """Held weights, and states of the process."""
    numbers: tuple[int, ...] = (8, 32)
    """States of the recursion, in place of --particles."""
    grids: tuple[int, ...] = (10, 40)
    """Numbers of steps."""
    samplers: tuple[SamplerName, ...] = ("DDIM",)
    """Samplers; those of several evaluations show what the recursion leaves out."""
    batch_size: int = 20
    """Images that are sampled together."""
    out: Annotated[str | None, option(metavar="CSV", default="the table is printed only")] = None
    """Write the table to this file, too."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    @torch.no_grad()
    def run(self) -> list[Row]:
        """Measure, print the table, and write it; return its rows."""
        model = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        posterior = self.posterior.load(model)
        rows: list[Row] = []
        for sampler in self.samplers:
            for steps in self.grids:
                own = model.with_(sampling=replace(self.sampling, sampler=sampler, steps=steps, scale=model.scale))
                rows += self.compare(replace(posterior, pipeline=own, draws=self.states, _members=[]), sampler, steps)
        print(markdown_table(rows, 3))
        if self.out:
            write_csv(Path(self.out), rows, [f"{self.states} weights and states, {self.n} images"])
        return rows

    def compare(self, posterior: PosteriorPipeline, sampler: str, steps: int) -> Iterator[Row]:
        """Yield a row for each pair of variances."""

        def row(first: str, second: str, found: Tensor, true: Tensor) -> Row:
            agreed = agreement(found, true)
            named = {"sampler": sampler, "steps": steps, "variance": first, "against": second}
            return {**named, "pixel": agreed.pixel, "image": agreed.image, "total": agreed.total}

        held, held_halves = self.measure(posterior, "persistent")
        redrawn, redrawn_halves = self.measure(posterior, "redrawn")
        yield row("held, half the weights", "the other half", *held_halves)
        yield row("redrawn", "held", redrawn, held)
        yield row("redrawn, half the states", "the other half", *redrawn_halves)
        for number in self.numbers:
            found = [self.recur(posterior, number, seed) for seed in (0, 1)]
            name = f"bayesdiff, {number} states"
            yield row(name, "the same, another seed", *found)
            yield row(name, "redrawn", found[0], redrawn)
            yield row(name, "held", found[0], held)

    def recur(self, posterior: PosteriorPipeline, number: int, seed: int) -> Tensor:
        """Return the recursion's variances [N, c, h, w] from so many states, which other seeds draw otherwise."""
        pipeline = posterior.pipeline
        found = []
        for images, labels in self.batches(posterior):
            begin = None
            if pipeline.sampling.sampler not in ONE_EVALUATION:
                begin = beginning(posterior.sampler(labels), pipeline.model.schedule, pipeline.times)
            source = ImageNoise(derive_seed("recursion", seed), tuple(images), device=pipeline.device)
            walk = (posterior.plain(labels, images), posterior.predictive(labels))
            *_, last = bayesdiff(*walk, particles=number, source=source, begin=begin)
            found.append(last.var.cpu())
        return torch.cat(found)

    def batches(self, posterior: PosteriorPipeline) -> Iterator[tuple[range, list[int] | None]]:
        """Yield the images that are sampled together, and their classes."""
        for start in range(0, self.n, self.batch_size):
            images = range(start, min(start + self.batch_size, self.n))
            yield images, posterior.pipeline.cycle_classes(images)

    def measure(self, posterior: PosteriorPipeline, method: str) -> tuple[Tensor, list[Tensor]]:
        """Return the variances [N, c, h, w] of the last states, and those over each half of the members."""
        members = []
        for images, labels in self.batches(posterior):
            *_, last = posterior.steps(method, labels, images)
            assert last.members is not None  # both methods have them
            members.append(last.members.cpu())
        joined = torch.cat(members, 1)
        return joined.var(0), [half.var(0) for half in joined.tensor_split(2)]


if __name__ == "__main__":
    run_file(StudyRedrawn)
