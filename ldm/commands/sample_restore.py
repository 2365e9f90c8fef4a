"""`decu sample restore`: clean pictures from noisy ones, with intervals that hold for most pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Speed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ldm.pipelines.restoring import RestoredPictures
    from ldm.records import Row

# What the columns of intervals.csv are.
_COLUMNS = (
    "factor: times the map, half an interval; coverage: share of the other pictures' pixels inside, low and high its "
    "95 % over pictures; mean length: of the intervals, in -1 .. 1; over unscaled: over that of equal intervals"
)


@dataclass(frozen=True)
class SampleRestore:
    """Restore noisy pictures by one evaluation of the network, with an interval for every pixel.

    Pictures of --data get noise of deviation --noise; the model's mean of the clean picture given the noisy one is the
    centre of the intervals, and a map their shape:
      unscaled   the same length everywhere
      data       what the noise leaves open, by the derivative of the denoiser
      weights    what the weights of the last layer leave open, with --posterior
      both       the two variances together
    The first --calibrate pictures choose the factor with which, for further pictures, a share of at most --risk of the
    pixels lies outside on average, with --confidence; the others are held against it (docs/acting.md). A model of
    inpainting is told its picture with the hole as well. Models of pixels only.

    Examples:
      decu sample restore --run logs/2026-01-01T00-00-00_digits --noise 0.5 --out results/restored
      decu sample restore --run logs/2026-01-01T00-00-00_digits --noise 0.5 --posterior results/laplace/digits \\
          --risk 0.1 --confidence 0.9 --out results/restored

    Writes intervals.csv (for each map the factor, coverage with its interval, and mean length over the unscaled one's),
    restored.npz (clean, noisy, mean, low, high of the others, by the shortest map), restored.png, record.json.
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0

    source: ModelSource
    out: str
    """The folder of the output."""
    noise: float = 0.5
    """The deviation of the noise, where pictures lie in -1 .. 1."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="the data of the run")] = None
    """The pictures, as target=.. params.x=.., or as CONFIG.yaml:validation."""
    split: str = "validation"
    """The split of the run's data; pictures that the model was trained on are restored too well, which is said."""
    n: Annotated[int | None, option(metavar="N", default="all")] = None
    """The number of pictures, drawn at random."""
    calibrate: Annotated[int | None, option(metavar="N", default="half of them")] = None
    """Pictures that choose the factor; the others are held against it."""
    risk: float = 0.1
    """The largest share of pixels outside, averaged over pictures."""
    confidence: float = 0.9
    """The probability over calibration sets with which it is kept."""
    posterior: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """A posterior of the model's last layer, for the maps weights and both."""
    batch_size: int = 50
    """Pictures in one pass."""
    seed: int = 0
    """The seed of the choice and of the noise."""
    overwrite: bool = False
    """Replace outputs that exist."""
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        self.speed.check_exact()
        if self.data is not None and self.split != "validation":
            raise ValueError(
                f"--split {self.split} is of the run's data, and --data names others: leave out one of them"
            )
        if not self.noise > 0:
            raise ValueError(f"--noise must be above 0, got {self.noise:g}: of a clean picture everything is known")

    def run(self) -> list[Row]:
        """Restore, calibrate, and hold against the other pictures; return the rows of the table."""
        from ldm.evaluation.intervals import calibrate_factor, hold
        from ldm.records import refuse_existing, write_record
        from ldm.report.tables import markdown_table, write_csv

        out = Path(self.out)
        refuse_existing([out / "intervals.csv"], self.overwrite)
        found = self.restore()
        count = len(found.mean)
        first = self._count_calibrating(count)
        errors = found.errors
        rows: list[Row] = []
        scales = found.scales(first)
        for name, scale in scales.items():
            factor = calibrate_factor(errors[:first], scale[:first], self.risk, self.confidence)
            held = hold(errors[first:], scale[first:], factor)
            rows.append(
                {
                    "map": name,
                    "factor": factor,
                    "coverage": held.coverage.estimate,
                    "low": held.coverage.low,
                    "high": held.coverage.high,
                    "mean length": held.length,
                    "over unscaled": held.length / rows[0]["mean length"] if rows else 1.0,
                }
            )
        note = (
            f"noise {self.noise:g}; {first} pictures calibrate, {count - first} are held against it; at most "
            f"{self.risk:g} of the pixels outside, confidence {self.confidence:g} for each map alone"
        )
        if found.trained_on:
            note += "; of pictures that the model was trained on, which it restores too well: no promise for others"
        print(markdown_table(rows, 4), note, sep="\n")
        write_csv(out / "intervals.csv", rows, [note, _COLUMNS], overwrite=True)
        best = min(rows, key=lambda row: row["mean length"])
        self._write_pictures(out, found, first, best["factor"] * scales[best["map"]], best["map"])
        write_record(out / "record.json", self, overwrite=True, note=note)
        return rows

    def _count_calibrating(self, count: int) -> int:
        """Return how many of the pictures choose the factor.

        Raises:
            ValueError: if these are too few for the risk, or fewer than two are left.
        """
        from ldm.evaluation.intervals import largest_mean

        first = count // 2 if self.calibrate is None else self.calibrate
        largest_mean(self.risk, self.confidence, first)
        if first > count - 2:
            raise ValueError(f"--calibrate {first} of {count} pictures leaves fewer than two to be held against it")
        return first

    def restore(self) -> RestoredPictures:
        """Load the model and the pictures, and restore them where there are enough."""
        from tqdm import tqdm

        from ldm.data.own import build_dataset, splits_of
        from ldm.pipelines import chosen_positions, load_posterior
        from ldm.pipelines.restoring import restore_pictures
        from ldm.training.data_words import choose_data_config

        pipeline = self.source.load(None, self.speed, self.place.device)
        laplace = None if self.posterior is None else load_posterior(self.posterior, pipeline).laplace
        config = choose_data_config(self.data, pipeline.config, self.split, "name the pictures with --data")
        data = build_dataset(config)
        positions = chosen_positions(len(data), self.n, self.seed, "restore")  # type: ignore[arg-type]
        self._count_calibrating(len(positions))  # before anything is computed
        with tqdm(total=len(positions), desc="restore", unit="picture") as bar:
            given = {"laplace": laplace, "seed": self.seed, "batch_size": self.batch_size, "progress": bar.update}
            found = restore_pictures(pipeline, data, positions, self.noise, **given)
        return replace(found, trained_on=dict(config) == splits_of(pipeline.config).get("train"))

    def _write_pictures(self, out: Path, found: RestoredPictures, first: int, reach: NDArray, name: str) -> None:
        """Write the pictures that were held against the factor with their intervals, and show some."""
        from ldm.files import write_arrays
        from ldm.report.restored import restored_figure

        shape = found.mean[first:].shape
        half = reach[first:].reshape(shape)
        arrays = {"clean": found.clean[first:], "noisy": found.noisy[first:], "mean": found.mean[first:]}
        ends = {"low": arrays["mean"] - half, "high": arrays["mean"] + half}
        write_arrays(out / "restored.npz", arrays | ends, overwrite=True)
        restored_figure(arrays, half, name, out / "restored.png")
