"""Time the sampling of an ensemble: one UNet call per member and step (as published) against all members at once.

Examples:
  python scripts/benchmark_members.py --size small --threads 2 --variants float32 channels_last compile bf16+compile
  python scripts/benchmark_members.py --size cin256 --device cuda --n 10 --variants float32 bf16 bf16+compile
  python scripts/benchmark_members.py --path logs/bootstrapped_digits_5 --n 2 --variants float32

All members walk from the start, guided, with the same noise (DDIM). The sides alternate in one run, with a matrix
product between them, whose rate is the ceiling. Operations are counted, not assumed. Ratios are medians over the
rounds, with their range; differences are relative to the largest value; MI is that of the first step, in nats, with the
distance averaged over dimensions.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.ensembles.storage import read_ensemble
from ldm.experiments import timing
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines import build_model
from ldm.pipelines.speed import PRECISIONS, with_speed
from ldm.settings import Speed
from ldm.uncertainty.quantities import Estimator, compute_quantities


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    timing.add_benchmark_arguments(parser)
    add = parser.add_argument
    add("--path", help="ensemble of save_ensemble.py, in place of random weights")
    add("--members", type=int, default=5, help="members of random weights")
    add("--heads", nargs="+", default=["class_embedding"], help="heads in which they differ, of random weights")
    add("--n", type=int, default=2, help="images")
    add("--steps", type=int, default=20, help="DDIM steps")
    add("--scale", type=float, default=5.0, help="guidance, 1 is off")
    words = "ours: float32, bf16, fp16, channels_last and compile, joined by +"
    add("--variants", nargs="+", default=["float32"], help=words)
    return parser


def open_members(options: argparse.Namespace, device: torch.device) -> tuple[LatentDiffusion, Members]:
    """A model and its members, saved or random."""
    if not options.path:
        model = timing.random_model(timing.load_size_config(options.size), device, options.seed)
        return model, timing.random_members(model, options.heads, options.members, options.seed)
    ensemble = read_ensemble(options.path)
    model = build_model(ensemble.spec["config"])
    model.init_from_ckpt(str(ensemble.base_checkpoint()), use_averaged=True)
    return model.eval().requires_grad_(False).to(device), ensemble.members.to(device)


def precision_of(variant: str) -> str:
    """The precision among the words of a variant."""
    return next((word for word in variant.split("+") if word in PRECISIONS), "float32")


def in_variant(model: LatentDiffusion, name: str, device: torch.device) -> LatentDiffusion:
    """A copy of a model that runs as the words of a variant say.

    Raises:
        ValueError: for an unknown word.
    """
    words = name.split("+")
    unknown = set(words) - {*PRECISIONS, "channels_last", "compile"}
    if unknown:
        raise ValueError(
            f"--variants: unknown {sorted(unknown)}; join {[*PRECISIONS, 'channels_last', 'compile']} by +"
        )
    speed = Speed(1, precision_of(name), "channels_last" in words, "compile" in words)
    return with_speed(copy.deepcopy(model), speed, device)[0]


def walks(
    options: argparse.Namespace, model: LatentDiffusion, members: Members, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[LatentDiffusion], Callable[[], Any]]]:
    """The published loop, and ours on a model: each gives latents [M, n, c, h, w]; ours also the first step."""
    labels = torch.arange(options.n, device=device) % model.n_classes
    x = ImageNoise(options.seed, tuple(range(options.n)), device).initial((options.n, *model.latent_shape))
    x, times = x * model.schedule.prior_std, model.sampling_times(options.steps)
    alone = [SingleMember(model.network, members, member) for member in range(len(members))]

    def loop() -> Tensor:
        return torch.stack(
            [run(ddim(model.denoiser(labels, options.scale, one), model.schedule, x, times)) for one in alone]
        )

    def ours(own: LatentDiffusion) -> Callable[[], Any]:
        network = MemberNetwork(own.network, members)

        def together() -> Any:
            steps = list(ddim(own.denoiser(labels, options.scale, network), own.schedule, x, times))
            return steps[-1].x_next, steps[0]

        return together

    return loop, ours


def row_of(
    name: str, timed: Mapping[str, timing.Timing], made: int, rate: float, difference: float, mi: float
) -> dict[str, str]:
    """A line of the table."""
    speed = timing.ratios(timed["loop"], timed[name])
    return {
        "side": "loop over members" if name == "loop" else f"together, {name}",
        "time": str(timed[name]),
        "times faster": f"{speed[0]:.2f} [{speed[1]:.2f} .. {speed[2]:.2f}]",
        "GFLOP made": f"{made / 1e9:.1f}",
        "GFLOP/s": f"{made / timed[name].median / 1e9:.0f}",
        "of the product's rate": f"{made / timed[name].median / rate:.0%}",
        "difference": f"{difference:.1e}",
        "MI's difference": f"{mi:.1e}",
    }


def print_floor(
    options: argparse.Namespace, unet: nn.Module, count: int, made: tuple[int, int], rates: Mapping[str, float]
) -> None:
    """What the work needs at least, before what it took."""
    millions, size = sum(value.numel() for value in unet.parameters()) / 1e6, timing.weights_bytes(unet) / 2**20
    print(
        f"{timing.describe_device(options)}: {count} members, {options.n} images, {options.steps} DDIM steps, guidance "
        f"{options.scale:g}; UNet of {millions:.1f} M parameters ({size:.0f} MiB)\n"
        f"floor: {made[1] / 1e9:.1f} GFLOP in place of {made[0] / 1e9:.1f} of the loop, weights read {options.steps} "
        f"times in place of {options.steps * count}: "
        + ", ".join(f"{made[1] / rate:.2f} s at {rate / 1e9:.0f} GFLOP/s ({name})" for name, rate in rates.items())
    )


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = get_parser().parse_args(argv)
    device = timing.start_timing(options)
    model, members = open_members(options, device)
    loop, ours = walks(options, model, members, device)
    sides: dict[str, Callable[[], Any]] = {"loop": loop}
    sides |= {name: ours(in_variant(model, name, device)) for name in options.variants}
    plain = ours(model)()
    found = {name: call() for name, call in sides.items()}
    made = timing.operations(loop), timing.operations(ours(model))
    precisions = {name: precision_of(name) for name in sides}
    products = {name: timing.matrix_product(device, PRECISIONS[name]) for name in sorted(set(precisions.values()))}
    calls = {**{f"product {name}": call for name, (call, _) in products.items()}, **sides}
    timed = timing.in_turn(calls, device, options.repeats)
    rates = {name: count / timed[f"product {name}"].median for name, (_, count) in products.items()}
    rows, differences = [], {}
    for name in sides:
        latents, first = (found[name], plain[1]) if name == "loop" else found[name]
        mis = [compute_quantities(step.distribution, Estimator(scale="mean")).mi for step in (plain[1], first)]
        differences[name] = timing.largest_difference(found["loop"], latents)
        rate, mi = rates[precisions[name]], float((mis[0] - mis[1]).abs().max())
        rows.append(row_of(name, timed, made[name != "loop"], rate, differences[name], mi))
    print_floor(options, model.model.diffusion_model, len(members), made, rates)
    print(timing.table(rows))
    numbers = {"rates": rates, "nominal": made[0], "executed": made[1], "differences": differences}
    numbers["seconds"] = {name: one.values for name, one in timed.items()}
    timing.report(options, rows, numbers)
    return numbers


if __name__ == "__main__":
    run_script(main)
