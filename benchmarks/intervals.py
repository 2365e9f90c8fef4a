"""Do calibrated intervals of restored pictures cover as promised, and what does a map buy beside equal lengths?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from ldm.commands.line import run_file
from ldm.commands.sample_restore import SampleRestore
from ldm.commands.shared import ModelSource, Placement
from ldm.evaluation.intervals import calibrate_factor, hold
from ldm.options import option
from ldm.pipelines.restoring import RestoredPictures
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import mean_interval
from ldm.util import generator


@dataclass(frozen=True)
class IntervalStudy:
    """Restore the held-out pictures of runs, calibrate on a random half, and look at the other half, many times.

    Each run is restored with --seeds draws of the noise. Broken is a split whose share of pixels outside is above the
    risk; that share of the other half has a chance error of its own, so that the broken share is an upper bound. Pixels
    of one picture go together, so the binomial band is of one pixel drawn from each picture of the other half: below
    is a split that covers fewer of these than the 2.5 % quantile of Binomial(pictures, 1 - risk). Lengths are over
    those of the unscaled intervals of the same split; intervals are Student's over runs and seeds.

    Examples:
      python -m benchmarks.intervals --runs logs/a logs/b logs/c \\
          --posteriors results/laplace/a results/laplace/b results/laplace/c --out results/intervals

    Writes {out}/intervals.csv, record.json.
    """

    runs: tuple[str, ...]
    """The run directories of the models."""
    out: str
    """The folder of the table."""
    posteriors: Annotated[tuple[str, ...], option(metavar="DIR ...", default="none: no map of the weights")] = ()
    """A posterior of each run."""
    noise: tuple[float, ...] = (0.5,)
    """Deviations of the noise, where pictures lie in -1 .. 1."""
    risk: float = 0.1
    """The largest share of pixels outside, averaged over pictures."""
    confidence: float = 0.9
    """The probability over calibration sets with which it is kept."""
    seeds: int = 1
    """Draws of the noise of each run."""
    splits: int = 200
    """Random halves of each run and seed."""
    place: Placement = Placement()

    def __post_init__(self) -> None:
        if self.posteriors and len(self.posteriors) != len(self.runs):
            raise ValueError(f"{len(self.runs)} runs take as many posteriors, got {len(self.posteriors)}")

    def run(self) -> list[Row]:
        """Restore, split, and write; return the rows of the table."""
        begun = time.process_time()
        table = [row for noise in self.noise for row in self.play(noise)]
        note = (
            f"{len(self.runs)} runs x {self.seeds} seeds, {self.splits} halves each; risk {self.risk:g} at confidence "
            f"{self.confidence:g}; {time.process_time() - begun:.0f} CPU s"
        )
        print(markdown_table(table, 3), note, sep="\n")
        write_csv(Path(self.out) / "intervals.csv", table, [note], overwrite=True)
        write_record(Path(self.out) / "record.json", self, overwrite=True, note=note)
        return table

    def play(self, noise: float) -> list[Row]:
        """Return a row for each map at one noise."""
        each = []
        for number, run in enumerate(self.runs):
            for seed in range(self.seeds):
                posterior = self.posteriors[number] if self.posteriors else None
                found = SampleRestore(
                    ModelSource(run=run), self.out, noise=noise, posterior=posterior, seed=seed, place=self.place
                ).restore()
                each.append(split_pictures(found, self.risk, self.confidence, self.splits, seed))
        return [{"noise": noise, **summarise(name, [own[name] for own in each])} for name in each[0]]


def split_pictures(
    found: RestoredPictures, risk: float, confidence: float, splits: int, seed: int
) -> dict[str, Mapping[str, NDArray]]:
    """Return for each map what its intervals do in every split: coverage, over (of its length), below, broken [splits].

    The map of the first half's small variances is made anew in every split, as a user has it.
    """
    count, pixels = len(found.mean), found.mean[0].size
    rows: dict[str, list[tuple[float, ...]]] = {}
    for split in range(splits):
        source = generator("halves of the pictures", seed, split)
        order = torch.randperm(count, generator=source).numpy()
        first, second = np.array_split(order, 2)
        drawn = torch.randint(pixels, (len(second),), generator=source).numpy()
        least = binom.ppf(0.025, len(second), 1 - risk)
        shuffled = RestoredPictures(
            found.clean[order],
            found.noisy[order],
            found.mean[order],
            {name: var[order] for name, var in found.variances.items()},
        )
        errors, unscaled = shuffled.errors, None
        for name, scale in shuffled.scales(len(first)).items():
            factor = calibrate_factor(errors[: len(first)], scale[: len(first)], risk, confidence)
            held = hold(errors[len(first) :], scale[len(first) :], factor)
            places = len(first) + np.arange(len(second)), drawn
            inside = int((np.abs(errors[places]) <= factor * scale[places]).sum())
            unscaled = held.length if unscaled is None else unscaled
            covered = held.coverage.estimate
            broken = float(covered < 1 - risk)
            rows.setdefault(name, []).append((covered, held.length / unscaled, float(inside < least), broken))
    columns = ("coverage", "over", "below", "broken")
    return {name: dict(zip(columns, np.array(own).T, strict=True)) for name, own in rows.items()}


def summarise(name: str, each: Sequence[Mapping[str, NDArray]]) -> Row:
    """Return a map's row: means over splits, with Student's intervals over runs and seeds."""
    row: Row = {"map": name}
    for column, word in (("coverage", "coverage"), ("over", "length over unscaled")):
        interval = mean_interval([own[column].mean() for own in each])
        row |= {word: interval.estimate, f"{word}, low": interval.low, f"{word}, high": interval.high}
    return row | {column: float(np.mean([own[column].mean() for own in each])) for column in ("below", "broken")}


if __name__ == "__main__":
    run_file(IntervalStudy)
