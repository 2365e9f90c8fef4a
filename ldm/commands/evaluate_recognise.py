"""`decu evaluate recognise`: how many class-conditional samples a classifier of the real images recognises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Sampling, Speed


@dataclass(frozen=True)
class EvaluateRecognise:
    """Recognise class-conditional samples with a classifier of the real images, and see whether they are copies.

    Examples:
      decu evaluate recognise --run logs/2026-01-01T00-00-00_digits --n 50
      decu evaluate recognise --base configs/latent-diffusion/digits.yaml --ckpt model.ckpt

    The classifier and its own accuracy come from the config's training and validation data. Also prints how far
    samples, and real test images, lie from their nearest training image: copies would lie nearer than test images do.
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0
    acts_with: ClassVar[Mapping[str, str]] = {"overwrite": "grid"}

    source: ModelSource
    n: int = 50
    """Samples of each class."""
    real: int = 10000
    """Training and test images that are used at most, drawn by --seed."""
    grid: Annotated[str | None, option(metavar="FILE", default="no picture")] = None
    """Write ten samples of each class to this picture too, and FILE.json beside it, the record of the command."""
    overwrite: bool = False
    """Replace the picture of --grid."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def run(self) -> float:
        """Sample, recognise and print; return the share of samples that is recognised."""
        from pathlib import Path

        from ldm.experiments.recognition import recognise_samples
        from ldm.images import labelled_grid
        from ldm.records import refuse_existing, write_record

        if self.grid:
            refuse_existing([Path(self.grid)], self.overwrite, "--grid")
        pipeline = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        found = recognise_samples(pipeline, self.n, self.real)
        numbers = tuple(map(str, range(pipeline.n_classes)))
        names = pipeline.class_names if len(pipeline.class_names) == len(numbers) else numbers
        if self.grid:
            grid = found.first_of_each(10)
            rows = [f"{name}\n{rate:.0%} recognised" for name, rate in zip(names, found.rates, strict=True)]
            title = f"{found.mean:.0%} of {len(found.images)} samples recognised; {grid.shape[1]} of each class shown"
            labelled_grid(grid, Path(self.grid), rows, [""] * grid.shape[1], title, self.overwrite)
            write_record(Path(self.grid).with_suffix(".json"), self, overwrite=True, recognised=found.mean)
        print("  ".join(f"{name}: {rate:.1%}" for name, rate in zip(names, found.rates, strict=True)))
        count = len(found.images)
        print(f"recognised {found.mean:.2%} of {count} samples; real test images {found.real:.2%}")
        samples = found.samples_apart
        real = found.real_apart
        print(
            "distance to the nearest training image (RMS of -1 .. 1), median and smallest: "
            f"samples {samples.median:.3f}, {samples.smallest:.3f}; "
            f"real test images {real.median:.3f}, {real.smallest:.3f}"
        )
        return found.mean
