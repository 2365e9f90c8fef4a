"""`decu evaluate trainings`: metrics of several trainings, with bands over trainings beside those over samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ldm.commands.evaluate_metrics import ACTS_UNDER_METRICS, MetricName, MetricSettings
from ldm.commands.images import FeatureChoice
from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.evaluation.extraction import FeatureSet
    from ldm.evaluation.trainings import TrainingBand
    from ldm.experiments.image_metrics import Extraction


@dataclass(frozen=True)
class EvaluateTrainings:
    """Measure several trainings of one recipe against a reference: bands over trainings, beside those over samples.

    The interval of `decu evaluate metrics` says what other samples of the same weights would give. A training of the
    same recipe gives other weights. --runs takes trainings; --ensemble the members of one, which share what their heads
    do not train, so that their band is at most that of whole trainings. Image i of each has the same noise and class.

    Examples:
      decu evaluate trainings --runs logs/a logs/b logs/c --n 2000 --ref results/digits-train --out results/trainings
      decu evaluate trainings --ensemble logs/bootstrapped_digits_5 --n 1000 --steps 20 --ref results/digits-train \\
          --metrics fid precision_recall --out results/members

    Writes trainings.csv (each metric: mean over trainings with Student's interval, the band of one more training, the
    deviations over trainings and over samples), each.csv (a row a training and metric), trainings.png, record.json. A
    stopped call continues: features of each training stay in folders below --out.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 1.0
    acts_with: ClassVar[Mapping[str, str]] = ACTS_UNDER_METRICS

    ref: str
    """The reference: a folder of `decu evaluate reference`; .npz with mu and sigma, or arr_0; or images."""
    out: str
    """The folder of the output."""
    n: int
    """Samples of each training."""
    runs: Annotated[tuple[str, ...], option(metavar="DIR ...", default="none; or give --ensemble")] = ()
    """The run directories of the trainings, or checkpoints in them."""
    ensemble: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """In place of runs, the folder of an ensemble, whose members count as trainings."""
    metrics: tuple[MetricName, ...] = ("fid", "kid", "precision_recall")
    """What to compute: fid, sfid, is, kid, cmmd, cmmd_biased, precision_recall, density_coverage."""
    batch_size: int = 100
    """Images in one pass."""
    settings: MetricSettings = MetricSettings()
    features: FeatureChoice = FeatureChoice()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if bool(self.runs) == (self.ensemble is not None):
            raise ValueError("expected trainings as --runs DIR DIR ..., or the members of one --ensemble DIR")
        apart = {Path(run).resolve() for run in self.runs}
        if self.runs and len(apart) < max(2, len(self.runs)):
            raise ValueError(f"a band over trainings needs two or more --runs, each once, got {' '.join(self.runs)}")

    def run(self) -> list[TrainingBand] | None:
        """Measure every training, write and print; None where other processes still extract."""
        from ldm.evaluation.metrics import Options, Reference, obstacle
        from ldm.evaluation.trainings import bands_over_trainings
        from ldm.experiments.image_metrics import Extraction, load_reference, measure_metrics, read_reference_features
        from ldm.jobs import pick_device
        from ldm.records import write_record
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.trainings import band_rows, draw_trainings

        out = Path(self.out)
        extractor = self.features.load(read_reference_features(self.ref))
        device = pick_device(self.place.device)
        extraction = Extraction(extractor, device, self.batch_size, self.sampling.seed)
        found = load_reference(self.ref, extraction, out / "reference", self.metrics)
        samples = dict(self._extract(extraction, out))
        if found is None or not samples or None in samples.values():
            print(f"{out}: this process is done; the one that finishes last goes on (or running once more)")
            return None
        options = Options(**asdict(self.settings), seed=self.sampling.seed, device=device)
        reference = Reference(found)
        each = {}
        for name, features in samples.items():
            assert features is not None  # checked above
            reasons = [reason for metric in self.metrics if (reason := obstacle(metric, found, features, options))]
            if reasons:
                raise ValueError(f"{name}: {reasons[0]}")
            each[name] = measure_metrics(self.metrics, reference, features, options)
        bands = bands_over_trainings(list(each.values()))
        rows = band_rows(bands)
        kind = "trainings" if self.runs else "members of one ensemble, which share their base"
        note = f"{len(each)} {kind}, {self.n} samples each; Student's 95 % over these; features {extractor.name}"
        write_csv(out / "trainings.csv", rows, [note], overwrite=True)
        write_csv(out / "each.csv", [{"training": name, **asdict(row)} for name, own in each.items() for row in own],
                  overwrite=True)  # fmt: skip
        draw_trainings(bands, each, note, out / "trainings.png")
        write_record(out / "record.json", self, overwrite=True, features=extractor.describe())
        print(markdown_table(rows, 4), note, sep="\n")
        return bands

    def _extract(self, extraction: Extraction, out: Path) -> Iterator[tuple[str, FeatureSet | None]]:
        """Yield the name and the features of each training; None where other processes still extract."""
        import numpy as np

        from ldm.pipelines import load_ensemble
        from ldm.pipelines.images import SampledImages
        from ldm.pipelines.member_images import MemberImages

        if self.ensemble is None:
            names = name_trainings(self.runs)
            for number, run in enumerate(self.runs):
                model = ModelSource(run=run).load(self.sampling, self.speed, self.place.device, self.default_steps)
                yield names[number], extraction.read(SampledImages(model, self.n), out / f"run_{number}")
            return
        pipeline = load_ensemble(
            self.ensemble, self.sampling, Branching(step=0), speed=self.speed, device=self.place.device
        )
        both = extraction.read(MemberImages(pipeline, self.n), out / "members")
        for member in range(pipeline.members):
            rows = np.arange(self.n) * pipeline.members + member
            yield f"member {member}", None if both is None else both.rows(rows)


def name_trainings(runs: Sequence[str]) -> list[str]:
    """Return the names of trainings: those of their folders or checkpoints, or the whole paths where two have one."""
    names = [Path(run).name for run in runs]
    return names if all(names) and len(set(names)) == len(names) else list(runs)
