"""Tangents of a sample in one batched pass: against one plain sample, as many single passes, and sampled weights.

Examples:
  python scripts/benchmark_tangents.py --run logs/2026-01-01T00-00-00_digits --steps 10
  python scripts/benchmark_tangents.py --base configs/flow-matching/cifar10.yaml --ckpt flow.ckpt --k 32 --batch 1

Tangents are derivatives of the walk in directions of the last layer's weights; a direction costs the same whatever it
is, so random ones stand for a posterior's. All are timed in turn in this one process, each the shortest of --repeats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.arguments import add_model_arguments, open_model
from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.samplers import run
from ldm.ensembles.members import Members
from ldm.experiments import timing
from ldm.laplace.layer import split_network
from ldm.pipelines import ModelPipeline
from ldm.report.tables import markdown_table, write_csv
from ldm.uncertainty.propagation import sampled, tangents
from ldm.util import generator


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=10)
    add = parser.add_argument
    add("--k", type=int, default=32, help="tangents, and sampled weights")
    add("--batch", type=int, default=1, help="images")
    add("--repeats", type=int, default=3, help="calls of each, of which the shortest counts")
    add("--out", help="also write the table to this .csv")
    return parser


def random_members(pipeline: ModelPipeline, count: int) -> Members:
    """The last layer with `count` small random changes."""
    network = pipeline.model.network
    _, layer, name = split_network(network)
    source = generator("directions", pipeline.sampling.seed)
    own = {f"{name}.{key}": value.detach() for key, value in layer.named_parameters()}
    changes = {key: torch.randn((count, *value.shape), generator=source).to(value) for key, value in own.items()}
    return Members({key: own[key] + 0.01 * change for key, change in changes.items()})


def timings(pipeline: ModelPipeline, k: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a walk by each way, over one plain sample and over the batched tangents."""
    model, members, images = pipeline.model, random_members(pipeline, k), list(range(batch))
    labels = pipeline.cycle_classes(images)
    cond = None if labels is None else pipeline.labels(labels)
    x = pipeline.noise(images).initial((batch, *model.latent_shape)) * model.schedule.prior_std

    def build(network: Any) -> Any:
        return model.denoiser(cond, pipeline.scale, network)

    def walk(way: Callable[..., Any], chosen: Members) -> Any:
        noise = pipeline.noise(images)
        return way(pipeline.sampler, build, model.network, chosen, model.schedule, x, pipeline.times, noise=noise)

    plain = pipeline.sampler
    tasks = {
        "plain sample": lambda: run(
            plain(build(model.network), model.schedule, x, pipeline.times, noise=pipeline.noise(images))
        ),
        f"{k} tangents, one batched pass": lambda: walk(tangents, members),
        f"{k} tangents, one by one": lambda: [walk(tangents, members.select([index])) for index in range(k)],
        f"{k} sampled weights, batched": lambda: walk(sampled, members),
    }
    with torch.no_grad():
        timed = timing.in_turn(tasks, pipeline.device, repeats)
    rows: list[dict[str, Any]] = [{"way": name, "seconds": min(each.values)} for name, each in timed.items()]
    for row in rows:
        row["over_plain"] = row["seconds"] / rows[0]["seconds"]
        row["over_batched"] = row["seconds"] / rows[1]["seconds"]
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = get_parser().parse_args(argv)
    pipeline = open_model(options)
    rows = timings(pipeline, options.k, options.batch, options.repeats)
    print(markdown_table(rows))
    if options.out:
        write_csv(
            Path(options.out), rows, [f"{len(pipeline.times) - 1} steps of {options.sampler}, batch {options.batch}"]
        )
    return rows


if __name__ == "__main__":
    run_script(main)
