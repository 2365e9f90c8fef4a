"""`decu laplace filter`: does leaving out the uncertain images make a set better?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm.commands.evaluate_metrics import MetricName
from ldm.commands.promise import RiskOptions
from ldm.commands.shared import Placement
from ldm.options import option

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ldm.evaluation.extraction import FeatureSet
    from ldm.evaluation.filtering import Positions

# What says how a share is kept and measured, and nothing of a promise.
OF_SHARES = ("keep", "rule", "metrics", "random", "batch_size", "ref")


@dataclass(frozen=True)
class FilterLaplace:
    """Leave out the uncertain images of a set: a share of them, or as many as a promise of quality asks for.

    Without --risk, what is kept is measured beside random removals of equal size.

    --samples is a folder of `decu laplace sample` (samples.npz and scores.csv), --ref one of `decu evaluate
    reference`, whose features are used. Of every score the most certain share --keep stays (or with --rule sigma, as
    published, what does not exceed mean + standard deviation). `random` removes as many at random, of each class as
    many under --per_class, --random times; scores that leave other numbers have random removals of their own.

    With --risk, a --judge says which samples are bad, and of every score the largest threshold is sought below which
    at most that share is bad, with --confidence, in further samples that are made alike too (docs/acting.md). All
    scores, and under --per_class all classes, share the confidence: name one score with --scores for the strongest
    promise. A calibration set that is too small is refused with the number needed. --promised accepts other samples
    of the same model and settings by these thresholds.

    Examples:
      decu laplace filter --samples results/samples --ref results/digits-train --keep 0.8 --out results/filtered
      decu laplace filter --samples results/samples --ref results/digits-train --rule sigma \\
          --scores sum patch_max segmentation_threshold --out results/as_published
      decu laplace filter --samples results/samples --risk 0.05 --confidence 0.95 --scores sum \\
          --judge models/digits.safetensors --out results/promise
      decu laplace filter --samples results/more --promised results/promise --out results/accepted

    Writes table.csv: for each score and metric the value; z, its distance from its random removals in their standard
    deviations; and p, the share of random removals that are as good, adjusted for all scores and metrics (Holm). Both
    are empty where the random removals do not differ. With R random removals and K values of p none is below
    K / (R + 1): 20 reach 0.05 for one score and metric alone, 20 K for all.
    With --risk promise.csv in its place: for each score and class the threshold, what is accepted of the judged
    samples, the upper end of its bad share, and the number of judged samples that a promise needs; and promise.png.
    And kept/SCORE.txt, the positions for `decu evaluate metrics --keep`.
    """

    samples: str
    """The folder of the samples and their scores."""
    out: str
    """The folder of the output."""
    ref: Annotated[str | None, option(metavar="DIR", default="none; needed without --risk")] = None
    """The folder of the reference's features."""
    risk: RiskOptions = RiskOptions()
    keep: float = 0.8
    """The share of the images to keep."""
    rule: Literal["share", "sigma"] = "share"
    """Keep a share, or what is at most mean + standard deviation (published)."""
    per_class: bool = False
    """Choose within each class, so that no class goes for being uncertain."""
    scores: Annotated[tuple[str, ...] | None, option(metavar="NAME ...", default="all")] = None
    """Columns of scores.csv."""
    random: int = 20
    """Random removals."""
    metrics: tuple[MetricName, ...] = ("fid", "kid", "precision_recall")
    """What is measured of each set."""
    batch_size: int = 100
    """Images in one pass of the extractor."""
    seed: int = 0
    """The seed of the random removals."""
    overwrite: bool = False
    """Replace outputs that exist."""
    place: Placement = Placement()

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1 or self.random < 2:
            raise ValueError(f"--keep lies between 0 and 1 and --random is at least 2, got {self.keep}, {self.random}")
        if self.risk.asked:
            fresh = FilterLaplace.__dataclass_fields__
            unused = [name for name in OF_SHARES if getattr(self, name) != fresh[name].default]
            if unused:
                raise ValueError(f"a promise takes thresholds, not shares: leave out --{' --'.join(unused)}")
        elif self.ref is None:
            raise ValueError("name a reference with --ref to measure what is kept, or a --risk to be promised")
        if self.risk.promised is not None and self.per_class:
            raise ValueError("--promised knows whether its promise is of classes: leave out --per_class")

    def run(self) -> list[dict[str, Any]]:
        """Remove, then measure or promise, and write the table; return its rows."""
        if self.risk.promised is not None:
            return self._accept()
        return self._promise() if self.risk.asked else self._measure()

    def _measure(self) -> list[dict[str, Any]]:
        """Keep a share by every score, and measure it beside random removals; return the rows of the table."""
        from tqdm import tqdm

        from ldm.evaluation.extraction import open_features
        from ldm.evaluation.metrics import Options, Reference, measure, obstacle
        from ldm.experiments.removal import make_removals
        from ldm.records import write_record
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.variance import read_scores

        out = Path(self.out)
        if (out / "table.csv").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds a table; choose another folder, or --overwrite")
        rows = read_scores(Path(self.samples))
        scores = self._scores(rows)
        groups = self._groups(rows)
        assert self.ref is not None  # checked above
        found = open_features(self.ref)
        features = self._features(found)
        for name in self.metrics:
            if (reason := obstacle(name, found, features)) is not None:
                raise ValueError(f"{name} cannot be computed: {reason}")
        reference = Reference(found)
        removals = make_removals(
            scores,
            groups,
            rule=self.rule,
            share=self.keep,
            repeats=self.random,
            seed=self.seed,
        )
        plain = Options(resamples=0, fid_resamples=0, kid_subsets=0, splits=0)
        values = {}
        for name, positions in tqdm(removals.sets.items(), unit="set"):
            measured = measure(self.metrics, reference, features.rows(positions), plain)
            values[name] = {row.metric: float(row.value) for row in measured}
            write_positions(out / "kept" / f"{name}.txt", positions)
        table = removals.table(values)
        kept = f"{self.keep:g}" if self.rule == "share" else "what is at most mean + s.d."
        kept += " of each class" * self.per_class
        tested = sum(value is not None for row in table for name, value in row.items() if name.startswith("p_"))
        least = min(1.0, tested / (self.random + 1))
        note = f"kept {kept} of {len(rows)}; z > 0: better than random; p: of random removals, by Holm"
        note += f", none below {least:.2g} with --random {self.random}"
        print(markdown_table(table, 4), note, sep="\n")
        write_csv(out / "table.csv", table, [note], overwrite=True)
        write_record(out / "record.json", self, overwrite=True)
        return table

    def _promise(self) -> list[dict[str, Any]]:
        """Find the thresholds of a promise, and accept samples by them; return the rows of the table."""
        from ldm.commands.promise import ask_judge, make_promises, sampling_settings
        from ldm.evaluation.promises import SHARES
        from ldm.records import write_record
        from ldm.report.promises import PROMISE_COLUMNS, draw_promises
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.variance import read_scores

        out = Path(self.out)
        if (out / "promise.csv").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds a promise; choose another folder, or --overwrite")
        samples = Path(self.samples)
        rows = read_scores(samples)
        scores = self._scores(rows)
        classes = [row["class"] for row in rows] if "class" in rows[0] else None
        own = self._groups(rows)
        names = [str(rows[int(group[0])]["class"]) for group in own] if self.per_class else ["all"]
        groups = dict(zip(names, own, strict=True))
        assert self.risk.judge is not None  # checked with --risk
        verdicts = ask_judge(self.risk.judge, samples, classes, self.place.device)
        found = make_promises(self.risk, scores, verdicts, groups, self.seed)
        table = found.rows()
        for name, values in scores.items():
            write_positions(out / "kept" / f"{name}.txt", found.accepted(name, values))
        note = (
            f"at most {self.risk.risk:g} of the accepted are bad, with confidence {self.risk.confidence:g} for all "
            f"scores and classes together; {len(SHARES)} thresholds each; judge: {self.risk.judge}; random: a control"
        )
        said = found.describe()
        print(markdown_table(table, 4), note, said, sep="\n")
        write_csv(out / "promise.csv", table, [said, note, PROMISE_COLUMNS], overwrite=True)
        draw_promises(scores, verdicts.positions, verdicts.bad, table, self.risk, out / "promise.png")
        write_record(out / "record.json", self, overwrite=True, samples=sampling_settings(samples))
        return table

    def _accept(self) -> list[dict[str, Any]]:
        """Accept samples by the thresholds of an earlier promise; return a row for each score and class."""
        from ldm.commands.promise import accept_rows, check_made_alike, read_promised
        from ldm.records import write_record
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.variance import read_scores

        out = Path(self.out)
        if (out / "accepted.csv").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds accepted samples; choose another folder, or --overwrite")
        assert self.risk.promised is not None  # `run` says so
        promised = read_promised(Path(self.risk.promised), self.scores)
        check_made_alike(Path(self.risk.promised), Path(self.samples))
        table, kept = accept_rows(promised, read_scores(Path(self.samples)))
        for name, positions in kept.items():
            write_positions(out / "kept" / f"{name}.txt", positions)
        note = f"by the promise of {self.risk.promised}"
        print(markdown_table(table, 4), note, sep="\n")
        write_csv(out / "accepted.csv", table, [note], overwrite=True)
        write_record(out / "record.json", self, overwrite=True)
        return table

    def _scores(self, rows: list[dict[str, Any]]) -> dict[str, NDArray]:
        """Return the values [N] of the scores asked for.

        Raises:
            ValueError: for a score that the samples do not have.
        """
        import numpy as np

        from ldm.report.variance import name_scores

        known = name_scores(rows[0])
        wanted = self.scores or known
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(f"scores.csv has no {', '.join(unknown)}; it has {', '.join(known)}")
        return {name: np.array([float(row[name]) for row in rows]) for name in wanted}

    def _groups(self, rows: list[dict[str, Any]]) -> list[Positions]:
        """Return the positions among which the uncertain images are sought: all, or those of each class.

        Raises:
            ValueError: for --per_class of samples without classes.
        """
        import numpy as np

        from ldm.experiments.removal import class_groups

        if not self.per_class:
            return [np.arange(len(rows))]
        if "class" not in rows[0]:
            raise ValueError("--per_class needs classes, and these samples have none (an unconditional model)")
        return class_groups([row["class"] for row in rows])

    def _features(self, reference: FeatureSet) -> FeatureSet:
        """Return the features of the samples, by the reference's own extractor."""
        from ldm.evaluation.extraction import extract
        from ldm.evaluation.extractors import make_extractor
        from ldm.jobs import pick_device
        from ldm.pipelines.images import load_images

        made = reference.settings["features"]
        extractor = make_extractor(made["extractor"], made.get("weights"), made.get("params"), made.get("channels", 3))
        device = pick_device(self.place.device)
        source = load_images(Path(self.samples) / "samples.npz")
        folder = Path(self.out) / "features"
        features = extract(source, extractor.to(device), folder, batch_size=self.batch_size, device=device)
        assert features is not None  # one process extracts all
        return features


def write_positions(path: Path, positions: Positions) -> None:
    """Write the positions of images, a line each."""
    from ldm.util import atomic_write

    with atomic_write(path, overwrite=True) as partial:
        partial.write_text("".join(f"{position}\n" for position in positions.tolist()))
