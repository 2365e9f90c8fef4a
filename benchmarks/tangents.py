"""Tangents of a sample in one batched pass: against one plain sample, as many single passes, and sampled weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from ldm.commands.line import run_file
from ldm.commands.shared import ModelSource, Placement
from ldm.diffusion.samplers import run
from ldm.ensembles.members import Members
from ldm.experiments.timing import time_in_turn
from ldm.laplace.split import split_network
from ldm.options import option
from ldm.pipelines import ModelPipeline
from ldm.report.tables import markdown_table, write_csv
from ldm.settings import Sampling, Speed
from ldm.uncertainty.propagation import sampled, tangents
from ldm.util import generator


def draw_directions(pipeline: ModelPipeline, count: int) -> Members:
    """Draw `count` small random changes of the last layer."""
    network = pipeline.model.network
    _, layer, name, _ = split_network(network)
    source = generator("directions", pipeline.sampling.seed)
    own = {f"{name}.{key}": value.detach() for key, value in layer.named_parameters()}
    changes = {key: torch.randn((count, *value.shape), generator=source).to(value) for key, value in own.items()}
    return Members({key: own[key] + 0.01 * change for key, change in changes.items()})


@torch.no_grad()
def time_ways(pipeline: ModelPipeline, k: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Time a sample by each way: seconds, over one plain sample and over the batched tangents."""
    model, members, images = pipeline.model, draw_directions(pipeline, k), list(range(batch))
    labels = pipeline.cycle_classes(images)
    cond = None if labels is None else pipeline.labels(labels)
    noise = pipeline.noise(images)
    x = pipeline.initial(noise)
    sampler = pipeline.sampler

    def build(network: Any) -> Any:
        return model.denoiser(cond, pipeline.scale, network)

    def sample() -> torch.Tensor:
        return run(sampler(build(model.network), model.schedule, x, pipeline.times, noise=noise))

    def propagate(way: Callable[..., Any], chosen: Members) -> Any:
        return way(sampler, build, model.network, chosen, model.schedule, x, pipeline.times, noise=noise)

    tasks = {
        "plain sample": sample,
        f"{k} tangents, one batched pass": lambda: propagate(tangents, members),
        f"{k} tangents, one by one": lambda: [propagate(tangents, members.select([index])) for index in range(k)],
        f"{k} sampled weights, batched": lambda: propagate(sampled, members),
    }
    timed = time_in_turn(tasks, pipeline.device, repeats)
    rows: list[dict[str, Any]] = [{"way": name, "seconds": min(each.values)} for name, each in timed.items()]
    for row in rows:
        row["over_plain"] = row["seconds"] / rows[0]["seconds"]
        row["over_batched"] = row["seconds"] / rows[1]["seconds"]
    return rows


@dataclass(frozen=True)
class TangentTimes:
    """Time tangents of a sample in one batched pass against one plain sample, single passes, and sampled weights.

    Tangents are derivatives of the sample in directions of the last layer's weights; a direction costs the same
    whatever it is, so random ones stand for a posterior's. All are timed in turn in this one process, each the shortest
    of --repeats.

    Examples:
      python benchmarks/tangents.py --run logs/2026-01-01T00-00-00_digits --steps 10
      python benchmarks/tangents.py --base configs/flow-matching/cifar10.yaml --ckpt flow.ckpt --k 32 --batch 1
    """

    default_steps: ClassVar[int] = 10

    source: ModelSource = ModelSource()
    k: int = 32
    """The number of tangents, and of sampled weights."""
    batch: int = 1
    """The number of images."""
    repeats: int = 3
    """Calls of each way, of which the shortest counts."""
    out: Annotated[str | None, option(metavar="CSV", default="the table is printed only")] = None
    """Write the table to this file, too."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def run(self) -> list[dict[str, Any]]:
        """Print and return a table of a line a way."""
        pipeline = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        rows = time_ways(pipeline, self.k, self.batch, self.repeats)
        print(markdown_table(rows))
        if self.out:
            note = f"{len(pipeline.times) - 1} steps of {self.sampling.sampler}, batch {self.batch}"
            write_csv(Path(self.out), rows, [note])
        return rows


if __name__ == "__main__":
    run_file(TangentTimes)
