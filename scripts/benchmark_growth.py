"""How time and peak memory of sampling an ensemble grow with members, images, steps and image size.

Examples:
  python scripts/benchmark_growth.py --size small --threads 2
  python scripts/benchmark_growth.py --size cin256 --device cuda --members 5 10 20 --precision bf16

One number is changed at a time, the others stay at their first value (5 members, 2 images, 4 steps, the size's own
latents). Memory is what tensors take at once beyond the weights: a pass of the network holds at most --chunk images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from ldm.arguments import add_speed_arguments, make_speed
from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.members import MemberNetwork
from ldm.experiments import timing
from ldm.memory import Chunker, rows_that_fit
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import with_speed


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    timing.add_benchmark_arguments(parser, repeats=3)
    add = parser.add_argument
    add("--members", type=int, nargs="+", default=[5, 1, 2, 10, 20], help="numbers of members, the usual one first")
    add("--n", type=int, nargs="+", default=[2, 1, 4, 8], help="numbers of images")
    add("--steps", type=int, nargs="+", default=[4, 2, 8], help="numbers of steps")
    add("--latents", type=int, nargs="+", default=[1, 2], help="side of the latents, in that of the size")
    add("--scale", type=float, default=5.0, help="guidance, 1 is off")
    add_speed_arguments(parser)
    return parser


def cases(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, int]]]:
    """(what changes, all four numbers)."""
    usual = {name: getattr(options, name)[0] for name in ("members", "n", "steps", "latents")}
    yield "the usual", usual
    for name in usual:
        yield from ((name, {**usual, name: value}) for value in getattr(options, name)[1:])


def measure(
    model: LatentDiffusion, options: argparse.Namespace, case: dict[str, int], device: torch.device, chunker: Chunker
) -> tuple[timing.Timing, int, int]:
    """(time, operations, bytes) of one walk from the start."""
    members = timing.random_members(model, ["class_embedding"], case["members"], options.seed)
    channels, height, width = model.latent_shape
    shape = (case["n"], channels, case["latents"] * height, case["latents"] * width)
    x = ImageNoise(options.seed, tuple(range(case["n"])), device).initial(shape)
    labels = torch.arange(case["n"], device=device) % model.n_classes
    network = MemberNetwork(model.network, members, chunker)

    def walk() -> torch.Tensor:
        denoiser = model.denoiser(labels, options.scale, network)
        return run(ddim(denoiser, model.schedule, x, model.sampling_times(case["steps"])))

    timed = timing.in_turn({"walk": walk}, device, options.repeats)["walk"]
    return timed, timing.operations(walk), timing.memory(walk, device)


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = get_parser().parse_args(argv)
    device = timing.start_timing(options)
    model = timing.random_model(timing.load_size_config(options.size), device, options.seed)
    x = torch.zeros((1, *model.latent_shape), device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    chunk = options.chunk or rows_that_fit(lambda: model.network(x, x.new_zeros(1), label), device)
    model, _ = with_speed(model, make_speed(options), device)
    rows, numbers = [], []
    for changed, case in cases(options):
        timed, made, held = measure(model, options, case, device, Chunker(chunk))
        numbers.append({**case, "changed": changed, "seconds": timed.values, "operations": made, "bytes": held})
        base = numbers[0]
        rows.append(
            {
                "changed": changed,
                **case,
                "time": str(timed),
                "of the usual": f"{timed.median / timing.Timing(base['seconds']).median:.2f}",
                "GFLOP": f"{made / 1e9:.1f}",
                "GFLOP/s": f"{made / timed.median / 1e9:.0f}",
                "MiB": f"{held / 2**20:.1f}",
            }
        )
    print(f"{timing.describe_device(options)}, {options.size}: at most {chunk} images in a pass")
    print(timing.table(rows))
    timing.report(options, rows, numbers)
    return numbers


if __name__ == "__main__":
    run_script(main)
