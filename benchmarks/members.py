"""Time the sampling of an ensemble: one UNet call per member and step (as published) against all members at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.noise import ImageNoise
from ldm.ensembles.members import Members
from ldm.experiments import timing
from ldm.experiments.member_timing import MemberSides, find_precision, make_variant, measure_first_step
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.options import option
from ldm.pipelines import load_ensemble
from ldm.pipelines.speed import PRECISIONS
from ldm.report.tables import markdown_table
from ldm.settings import Speed


@dataclass(frozen=True)
class MemberTimes:
    """Time the sampling of an ensemble: one UNet call per member and step (as published) against all members at once.

    All members sample from the start, guided, with the same noise (DDIM). The sides alternate in one run, with a matrix
    product between them, whose rate is the ceiling. Operations are counted, not assumed. Ratios are medians over the
    rounds, with their range; differences are relative to the largest value; MI is that of the first step, in nats, with
    the distance averaged over dimensions.

    Examples:
      python benchmarks/members.py --size small --threads 2 --variants float32 channels_last compile bf16+compile
      python benchmarks/members.py --size cin256 --device cuda --n 10 --variants float32 bf16 bf16+compile
      python benchmarks/members.py --path logs/bootstrapped_digits_5 --n 2 --variants float32
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    path: Annotated[str | None, option(metavar="DIR", default="random weights")] = None
    """An ensemble that save_ensemble.py (decu gather) wrote, in place of random weights."""
    members: int = 5
    """The number of members, of random weights."""
    heads: tuple[str, ...] = ("class_embedding",)
    """The heads in which members differ, of random weights."""
    n: int = 2
    """The number of images."""
    steps: int = 20
    """The number of DDIM steps."""
    scale: float = 5.0
    """The scale of classifier-free guidance; 1 turns it off."""
    variants: tuple[str, ...] = ("float32",)
    """Our sides: float32, bf16, fp16, channels_last and compile, joined by +."""
    seed: int = 42
    """The seed of weights, members and noise."""
    plan: timing.TimingPlan = timing.TimingPlan()
    place: Placement = Placement()

    def load(self, device: torch.device) -> tuple[LatentDiffusion, Members]:
        """Return a model and its members, saved or random."""
        if self.path:
            pipeline = load_ensemble(self.path, device=str(device), speed=Speed(chunk=1))
            return pipeline.model, pipeline.network.members
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        return model, timing.draw_members(model, self.heads, self.members, self.seed)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Print a table of a line a side, and return the numbers."""
        device = self.plan.start(self.place.device)
        model, members = self.load(device)
        labels = torch.arange(self.n, device=device) % model.n_classes
        x = ImageNoise(self.seed, tuple(range(self.n)), device).initial((self.n, *model.latent_shape))
        sides = MemberSides(members, labels, self.scale, x * model.schedule.prior_std, self.steps)
        models = {name: make_variant(model, name, device) for name in self.variants}
        calls: dict[str, Callable[[], Any]] = {"loop": lambda: sides.loop(model)}
        calls |= {name: lambda own=own: sides.together(own) for name, own in models.items()}
        plain = sides.together(model)[1]
        found = {"loop": (sides.loop(model), plain), **{name: calls[name]() for name in self.variants}}
        made = timing.count_operations(calls["loop"]), timing.count_operations(lambda: sides.together(model))

        precisions = {name: find_precision(name, device) for name in calls}
        products = {
            name: timing.make_matrix_product(device, PRECISIONS[name]) for name in sorted(set(precisions.values()))
        }
        ceilings = {f"product {name}": call for name, (call, _) in products.items()}
        timed = timing.time_in_turn({**ceilings, **calls}, device, self.plan.repeats)
        rates = {name: count / timed[f"product {name}"].median for name, (_, count) in products.items()}

        rows, differences = [], {}
        for name, (latents, first) in found.items():
            differences[name] = timing.largest_difference(found["loop"][0], latents)
            mi = float((measure_first_step(plain) - measure_first_step(first)).abs().max())
            speed = make_speed_columns(name, timed, made[name != "loop"], rates[precisions[name]])
            rows.append({**speed, "difference": f"{differences[name]:.1e}", "MI's difference": f"{mi:.1e}"})
        self.print_floor(model.model.diffusion_model, len(members), made, rates, device)
        print(markdown_table(rows))
        numbers = {"rates": rates, "nominal": made[0], "executed": made[1], "differences": differences}
        numbers["seconds"] = {name: one.values for name, one in timed.items()}
        timing.write_numbers(self.plan.json, self, rows, numbers, device)
        return numbers

    def print_floor(
        self, unet: nn.Module, count: int, made: tuple[int, int], rates: Mapping[str, float], device: torch.device
    ) -> None:
        """Print what the work needs at least, before what it took; `made` are the loop's operations and ours."""
        millions = sum(value.numel() for value in unet.parameters()) / 1e6
        size = timing.count_weight_bytes(unet) / 2**20
        seconds = [f"{made[1] / rate:.2f} s at {rate / 1e9:.0f} GFLOP/s ({name})" for name, rate in rates.items()]
        print(
            f"{timing.describe_device(device)}: {count} members, {self.n} images, {self.steps} DDIM steps, guidance "
            f"{self.scale:g}; UNet of {millions:.1f} M parameters ({size:.0f} MiB)\n"
            f"floor: {made[1] / 1e9:.1f} GFLOP in place of {made[0] / 1e9:.1f} of the loop, weights read {self.steps} "
            f"times in place of {self.steps * count}: " + ", ".join(seconds)
        )


def make_speed_columns(name: str, timed: Mapping[str, timing.Timing], made: int, rate: float) -> dict[str, str]:
    """Return the columns of a side that say how fast it is; `rate` is the matrix product's, in operations a second."""
    median, low, high = timing.compare_rounds(timed["loop"], timed[name])
    speed = made / timed[name].median
    return {
        "side": "loop over members" if name == "loop" else f"together, {name}",
        "time": str(timed[name]),
        "times faster": f"{median:.2f} [{low:.2f} .. {high:.2f}]",
        "GFLOP made": f"{made / 1e9:.1f}",
        "GFLOP/s": f"{speed / 1e9:.0f}",
        "of the product's rate": f"{speed / rate:.0%}",
    }


if __name__ == "__main__":
    run_file(MemberTimes)
