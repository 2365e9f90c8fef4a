"""`decu laplace sweep`: do maps of uncertainty react to sigma_noise and prior_precision?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import ACTS_UNDER_METHOD, ModelSource, Placement, PosteriorSource, VarianceMethod
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from ldm.experiments.laplace_sweep import Sweep


@dataclass(frozen=True)
class SweepLaplace:
    """Map the uncertainty of the same images under a grid of sigma_noise and prior_precision.

    With A the data's sum of a a^T, the posterior covariance is S = (A / sigma^2 + precision I)^-1, so a^T S a
      grows like sigma^2 and forgets the prior where the data decide (small precision, small sigma),
      falls like 1 / precision and forgets sigma where the prior does, and exactly
      (10 sigma, precision / 100) gives 100 times the variance of (sigma, precision), whatever the data.

    Examples:
      decu laplace sweep --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 16 \\
          --out results/sweep
      decu laplace sweep --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 16 \\
          --method persistent --draws 8 --out results/sweep_persistent

    Writes {out}/: sweep.csv (a row a setting: total, its ratio to the first setting's, how the map's ranks agree with
    it, slopes of ln total in ln sigma and ln precision), sweep.png (image --image on one logarithmic scale), sweep.npz
    and record.json.
    """

    default_steps: ClassVar[int] = 10
    default_scale: ClassVar[float] = 1.0
    acts_with: ClassVar[Mapping[str, str]] = ACTS_UNDER_METHOD
    without_effect: ClassVar[Mapping[str, str]] = {
        "posterior.sigma_noise": "--sigmas names its values",
        "posterior.prior_precision": "--precisions names its values",
    }

    source: ModelSource
    posterior: PosteriorSource
    out: str
    """The folder of the output."""
    method: VarianceMethod = "path"
    """How the variance is propagated, see `decu laplace sample --help`."""
    n: int = 16
    """The number of images, at least 2."""
    batch_size: int = 16
    """Images sampled together."""
    image: int = 0
    """The image of sweep.png."""
    sigmas: Annotated[tuple[float, ...], option(metavar="S ...")] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Values of sigma_noise."""
    precisions: Annotated[tuple[float, ...], option(metavar="P ...")] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """Values of prior_precision."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.n < 2 or not 0 <= self.image < self.n:
            raise ValueError(f"--n is at least 2 and --image below it, got {self.n} and {self.image}")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}")

    def run(self) -> list[dict[str, Any]]:
        """Map at every point of the grid, and write the table and the picture; return the rows."""
        from tqdm import tqdm

        from ldm.experiments.laplace_sweep import Sweep, grid_points, map_variances
        from ldm.records import write_record
        from ldm.report.tables import markdown_table, write_csv

        out = Path(self.out)
        if (out / "sweep.csv").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds a sweep; choose another folder, or --overwrite")
        posterior = self.posterior.load(
            self.conditions.give(self.source.load(self.sampling, self.speed, self.place.device, self.default_steps))
        )
        posterior.check(self.method)
        sigmas = sorted(self.sigmas)
        precisions = sorted(self.precisions)
        points = tqdm(grid_points(sigmas, precisions), unit="setting")
        maps = {point: map_variances(posterior, point, self.method, self.n, self.batch_size) for point in points}
        sweep = Sweep(sigmas, precisions, maps)
        rows = sweep.rows()
        note = f"{self.method}, {self.n} images"
        error = sweep.scaling_error()
        if error.pairs:
            note += f"; scaling (10 sigma, precision / 100): {error.pairs} pairs within {error.largest:.2g}"
        print(markdown_table(rows, 3), note, sep="\n")
        write_csv(out / "sweep.csv", rows, [note], overwrite=True)
        self._write_maps(out, sweep)
        write_record(out / "record.json", self, overwrite=True)
        return rows

    def _write_maps(self, out: Path, sweep: Sweep) -> None:
        """Draw the maps of one image, and write those of all."""
        from ldm.files import write_arrays
        from ldm.report.variance import sweep_figure

        maps = sweep.stacked
        rows = [f"{value:g}" for value in sweep.sigmas]
        columns = [f"{value:g}" for value in sweep.precisions]
        shown = maps[:, :, self.image]
        sweep_figure(shown, rows, columns, out / "sweep.png", "sigma_noise", "prior_precision", overwrite=True)
        arrays = {"maps": maps, "sigmas": sweep.sigmas, "precisions": sweep.precisions}
        write_arrays(out / "sweep.npz", arrays, overwrite=True, compressed=True)
