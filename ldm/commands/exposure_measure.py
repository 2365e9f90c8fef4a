"""`decu exposure measure`: the exposure bias of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.settings import Sampling, Speed


@dataclass(frozen=True)
class MeasureExposure:
    """Measure the exposure bias of a model: norms of the predicted noise, delta_t with its floor, statistics of x_t.

    Examples:
      decu exposure measure --run logs/2026-01-01T00-00-00_digits --steps 20 --n 1000 --out results/exposure
      decu exposure measure --run logs/2026-01-01T00-00-00_digits --steps 20 --n 1000 --eps_scaler 1.01 \\
          --out results/exposure_scaled
      decu exposure measure --base configs/guided-diffusion/cifar10-32.yaml \\
          --ckpt pretrained_models/adm/cifar10-32.pt --sampler DDPM --steps 20 --spacing respace --n 5000 \\
          --eps_scaler published --out results/exposure_cifar10

    Images of the config's data (--split) are noised to the first of the times and sampled from there, without scaling
    (`sampling`) and, where a scaling is given, with it (`scaled`); `training` are the same images noised to every time.
    Any sampler and schedule will do, flows included. A run that was stopped continues; processes of torchrun or of a
    SLURM array share the images, and the last to finish writes norms.csv, states.csv, norms.png, ratios.png,
    delta.png, distance.png, moments.safetensors and record.json.
    """

    default_steps: ClassVar[int] = 20
    default_scale: ClassVar[float] = 1.0

    source: ModelSource
    out: str
    """The folder of the output."""
    n: int = 1000
    """The number of images."""
    split: str = "train"
    """The data set data.params.SPLIT of the config."""
    batch_size: int = 100
    """Images in one pass, and in a file of measurements."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.n < 2 or self.batch_size < 1:
            raise ValueError(
                f"expected --n of at least 2 and --batch_size of at least 1, got {self.n} and {self.batch_size}"
            )

    def run(self) -> Path:
        """Measure this process's share; the process that finishes last writes the outputs. Return the folder."""
        from tqdm import tqdm

        from ldm.diffusion.epsilon_scaling import EpsilonScaling
        from ldm.experiments.exposure import Chains, load_split, measure_chains
        from ldm.jobs import WorkList, shard_from_environment, split_range
        from ldm.records import write_record
        from ldm.report.exposure import write_exposure
        from ldm.report.tables import markdown_table

        out = Path(self.out)
        pipeline = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        scalings = {"sampling": EpsilonScaling()}
        if not pipeline.wrappers.scaling.off:
            scalings["scaled"] = pipeline.wrappers.scaling
        chains = Chains(pipeline, load_split(pipeline.config, self.split), scalings)
        settings = {**pipeline.describe(), "split": self.split}
        work = WorkList(out / "parts", settings, shard_from_environment())
        parts = split_range(self.n, self.batch_size)
        total = sum(len(parts[key]) for key in work.pending(parts))
        with tqdm(total=total, desc="images", unit="image") as bar:
            moments = measure_chains(chains, work, parts, bar.update)
        if moments is None:
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return out
        print(markdown_table(write_exposure(out, chains, moments)))
        write_record(out / "record.json", self, overwrite=True, settings=settings)
        print(f"{out}: norms.csv, states.csv and figures of {self.n} images")
        return out
