"""Do promised thresholds hold on samples that nobody judged, and what do scores buy beside chance?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.commands.line import run_file
from ldm.commands.promise import CHANCE, recognise
from ldm.evaluation.promises import SHARES, RiskLevel, promise_risk
from ldm.records import Row, write_record
from ldm.report.plots import Curve, curve_plot
from ldm.report.promises import DRAWN, bad_shares
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.stats import mean_interval
from ldm.util import generator


@dataclass(frozen=True)
class PromiseStudy:
    """Promise on a random half of judged samples, and look at the other half: how often promises break.

    --samples are folders of `decu laplace sample`, of other seeds or trainings; --judge is a classifier of `decu
    evaluate classifier`. Each of --splits draws its own half for calibration. Means are over folders, the accepted
    share with Student's interval over them. Broken is a promise whose accepted share of the other half is worse
    than the risk by the judge; that share has a chance error of its own, so that the broken share is an upper bound.

    Examples:
      python -m benchmarks.promises --samples results/samples_0 results/samples_1 results/samples_2 \\
          --judge models/digits.safetensors --risk 0.05 --out results/promises

    Writes {out}/promises.csv, promises.png, record.json.
    """

    samples: tuple[str, ...]
    """The folders of the samples and their scores."""
    judge: str
    """The classifier that says which samples are bad."""
    out: str
    """The folder of the table and the figure."""
    risk: float = 0.05
    """The promised risk."""
    confidence: float = 0.9
    """The confidence of each promise."""
    scores: tuple[str, ...] = ("sum", "patch_max", "control_map_energy", "control_map_edges")
    """Columns of scores.csv; a random score stands beside them."""
    splits: int = 200
    """Random halves."""
    seed: int = 0
    """The seed of the halves."""

    def run(self) -> list[Row]:
        """Split, promise, look, and write; return the rows of the table."""
        begun = time.process_time()
        judged = [self.read(Path(folder), number) for number, folder in enumerate(self.samples)]
        names = list(judged[0][0])
        table = [summarise([self.try_score(name, values[name], bad) for values, bad in judged]) for name in names]
        curves = {}
        for name in names:
            curves[name] = Curve(DRAWN, np.mean([bad_shares(values[name], bad) for values, bad in judged], 0))
        curves["promised at most"] = Curve(DRAWN, np.full(len(DRAWN), self.risk))
        counts = " + ".join(f"{len(bad)}" for _, bad in judged)
        shares = ", ".join(f"{bad.mean():.1%}" for _, bad in judged)
        note = (
            f"{counts} samples, {shares} bad; halves for calibration, {self.splits} splits; confidence "
            f"{self.confidence:g}; {time.process_time() - begun:.0f} CPU s"
        )
        print(markdown_table(table, 3), note, sep="\n")
        write_csv(Path(self.out) / "promises.csv", table, [note], overwrite=True)
        curve_plot(curves, Path(self.out) / "promises.png", "accepted share of the samples, the surest first",
                   "bad share of the accepted", note=note, legend="by score", overwrite=True)  # fmt: skip
        write_record(Path(self.out) / "record.json", self, overwrite=True, note=note)
        return table

    def read(self, folder: Path, number: int) -> tuple[dict[str, NDArray], NDArray]:
        """Return the scores {name: [N]} of a folder's samples, a random one among them, and whether they are bad."""
        rows = read_csv(folder / "scores.csv")
        bad = recognise(self.judge, folder, [row["class"] for row in rows], "cpu").bad
        values = {name: np.array([float(row[name]) for row in rows]) for name in self.scores}  # type: ignore[arg-type]
        values[CHANCE] = torch.rand(len(bad), generator=generator("random score", self.seed, number)).numpy()
        return values, bad

    def try_score(self, name: str, values: NDArray, bad: NDArray) -> Row:
        """Return how a score's promises go over the splits."""
        level = RiskLevel(self.risk, self.confidence, len(SHARES))
        kept, broken, shares = [], [], []
        for split in range(self.splits):
            order = torch.randperm(len(bad), generator=generator("calibration", self.seed, split)).numpy()
            first, second = np.array_split(order, 2)
            found = promise_risk(values[first], bad[first], level)
            accepted = second[found.accepts(values[second])]
            kept.append(len(accepted) / len(second))
            broken.append(bool(len(accepted)) and bad[accepted].mean() > self.risk)
            if len(accepted):
                shares.append(bad[accepted].mean())
        return {
            "score": name,
            "promised": float(np.mean(np.array(kept) > 0)),
            "accepted share": float(np.mean(kept)),
            "bad of the accepted": float(np.mean(shares)) if shares else None,
            "broken": float(np.mean(broken)),
        }


def summarise(each: Sequence[Row]) -> Row:
    """Return the mean of a score's rows over folders, with Student's interval of the accepted share."""
    row: Row = {"score": each[0]["score"]}
    for column in ("promised", "accepted share", "bad of the accepted", "broken"):
        known = [float(own[column]) for own in each if own[column] is not None]  # type: ignore[arg-type]
        interval = mean_interval(known).within(0, 1) if known else None  # shares
        row[column] = None if interval is None else interval.estimate
        if column == "accepted share" and interval is not None:
            row |= {"low": interval.low, "high": interval.high}
    return row


if __name__ == "__main__":
    run_file(PromiseStudy)
