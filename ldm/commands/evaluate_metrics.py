"""`decu evaluate metrics`: metrics of images against a reference, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.shared import Placement
from ldm.options import option

if TYPE_CHECKING:
    from ldm.evaluation.extraction import FeatureSet, ImageSet
    from ldm.evaluation.metrics import MetricRow, Options, Reference
    from ldm.experiments.image_metrics import Extraction

MetricName = Literal["fid", "sfid", "is", "kid", "cmmd", "cmmd_biased", "precision_recall", "density_coverage"]
DistortionName = Literal["blur", "noise", "swaps"]


@dataclass(frozen=True)
class MetricSettings:
    """What the metrics depend on besides the features; the defaults are the published values."""

    resamples: int = 200
    """Bootstrap resamples, 0 for none."""
    fid_resamples: int = 20
    """Bootstrap resamples of FID and sFID."""
    sigma: float = 10.0
    """The width of CMMD's kernel, in units of the features."""
    kid_subsets: int = 100
    """Draws of the published KID."""
    kid_subset_size: int = 1000
    """Images in each draw of the published KID."""
    splits: int = 10
    """Splits of the published Inception Score."""


# Under which metrics of a command the fields of its `settings` act, for its `acts_with`.
ACTS_UNDER_METRICS = {
    "settings.sigma": "metrics=cmmd|cmmd_biased",
    "settings.kid_subsets": "metrics=kid",
    "settings.kid_subset_size": "metrics=kid",
    "settings.splits": "metrics=is",
    "settings.fid_resamples": "metrics=fid|sfid",
    "settings.resamples": "metrics=is|kid|cmmd|cmmd_biased|precision_recall|density_coverage",
}


@dataclass(frozen=True)
class EvaluateMetrics:
    """Measure images: FID, sFID, Inception Score, KID, CMMD, precision, recall, density and coverage, with intervals.

    Examples:
      decu evaluate metrics --images samples/digits/samples.npz --ref results/mnist-train --out results/samples
      decu evaluate metrics --run logs/2026-01-01T00-00-00_mnist --n 10000 --steps 50 --ref results/mnist-train \\
          --out results/run
      decu evaluate metrics --images samples.npz --features inception --ref VIRTUAL_imagenet256_labeled.npz \\
          --metrics fid sfid is --out results/imagenet
      decu evaluate metrics --images samples/ --ref results/mnist-train --sample_sizes 500 1000 2000 5000 \\
          --out results/study
      decu evaluate metrics --data configs/latent-diffusion/mnist.yaml:validation --ref results/mnist-train \\
          --distortions blur noise swaps --out results/distortions

    Writes metrics.csv, metrics.json and record.json, with --sample_sizes also sample_sizes.csv and .png, with
    --distortions also distortions.csv and .png. An extraction that was stopped continues; processes of torchrun or of
    a SLURM array share it, and the last to finish measures. --seed is that of everything that is drawn.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 1.0

    acts_with: ClassVar[Mapping[str, str]] = {
        "repeats": "sample_sizes",
        "levels": "distortions",
        **ACTS_UNDER_METRICS,
    }

    images: ImageSource
    ref: str
    """The reference: a folder of `decu evaluate reference`; .npz with mu and sigma, or arr_0; or images."""
    out: str
    """The folder of the output."""
    metrics: Annotated[tuple[MetricName, ...] | None, option(metavar="NAME ...", default="what can be")] = None
    """What to compute: fid, sfid, is, kid, cmmd, cmmd_biased, precision_recall, density_coverage."""
    distort: Annotated[str | None, option(metavar="NAME:STRENGTH", default="images as they are")] = None
    """Distort the images first: blur, noise or swaps, by a strength of 0 to 1."""
    sample_sizes: Annotated[tuple[int, ...] | None, option(metavar="N ...", default="no such study")] = None
    """Measure random draws of these numbers of images too."""
    repeats: int = 5
    """Draws of each size."""
    distortions: Annotated[tuple[DistortionName, ...] | None, option(metavar="NAME ...", default="no such study")] = (
        None
    )
    """Measure the images under these distortions too: blur, noise, swaps."""
    levels: Annotated[tuple[float, ...], option(metavar="S ...")] = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
    """The strengths of the distortions."""
    settings: MetricSettings = MetricSettings()
    features: FeatureChoice = FeatureChoice()
    place: Placement = Placement()

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return self.images.sampling.seed

    def run(self) -> list[MetricRow] | None:
        """Measure, write and print; None where other processes still extract."""
        from ldm.evaluation.distortions import read_distortion
        from ldm.evaluation.metrics import Options, Reference, warn_of_few_images
        from ldm.experiments.image_metrics import (
            Extraction,
            load_reference,
            measure_metrics,
            read_reference_features,
        )
        from ldm.jobs import pick_device
        from ldm.records import write_record
        from ldm.report.evaluation import metric_lines, write_metrics

        out = Path(self.out)
        extractor = self.features.load(read_reference_features(self.ref))
        images = self.images.load(extractor.channels, self.place.device)
        device = pick_device(self.place.device)
        extraction = Extraction(extractor, device, self.images.batch_size, self.seed)
        samples = extraction.read(images, out, read_distortion(self.distort) if self.distort else None)
        found = load_reference(self.ref, extraction, out / "reference", self.metrics or (), self.images.image_size)
        if samples is None or found is None:
            print(f"{out}: this process is done; the one that finishes last goes on (or running once more)")
            return None
        options = Options(**asdict(self.settings), seed=self.seed, device=device)
        names = self._choose(found, samples, options)
        reference = Reference(found)
        rows = measure_metrics(names, reference, samples, options)
        warnings = [f"note: {line}" for line in warn_of_few_images(names, found, samples)]
        print("\n".join([*metric_lines(rows), *warnings]))
        write_metrics(out, rows, extractor.name, self.seed)
        if self.sample_sizes:
            self._study_sizes(names, reference, samples, options)
        if self.distortions and not self._study_distortions(names, reference, images, extraction, options):
            return rows
        facts = {"features": extractor.describe(), "images": images.describe()}
        write_record(out / "record.json", self, overwrite=True, **facts)
        return rows

    def _choose(self, reference: FeatureSet, samples: FeatureSet, options: Options) -> list[str]:
        """Return the metrics asked for, or all, that can be computed; say which cannot, and why.

        Raises:
            ValueError: if none can.
        """
        from ldm.evaluation.metrics import METRICS
        from ldm.experiments.image_metrics import find_obstacles

        asked: tuple[str, ...] = tuple(METRICS) if self.metrics is None else self.metrics
        obstacles = find_obstacles(reference, samples, options, asked)
        for name, reason in obstacles.items():
            print(f"no {name}: {reason}")
        if len(obstacles) == len(asked):
            raise ValueError(
                f"none of the metrics {', '.join(asked)} can be computed; {next(iter(obstacles.values()))}"
            )
        return [name for name in asked if name not in obstacles]

    def _study_sizes(self, names: list[str], reference: Reference, samples: FeatureSet, options: Options) -> None:
        from ldm.evaluation.sample_sizes import sample_sizes
        from ldm.report.evaluation import write_sample_sizes

        assert self.sample_sizes is not None
        rows = sample_sizes(names, reference, samples, self.sample_sizes, self.repeats, options)
        unbiased = write_sample_sizes(Path(self.out), rows)
        if unbiased is not None:
            print(f"FID extrapolated to infinitely many images: {unbiased:.6g}")

    def _study_distortions(
        self, names: list[str], reference: Reference, images: ImageSet, extraction: Extraction, options: Options
    ) -> bool:
        """Measure and write; False where other processes still extract."""
        from ldm.evaluation.distortions import Distortion
        from ldm.experiments.image_metrics import measure_distortions
        from ldm.report.evaluation import write_distortions

        out = Path(self.out)
        distortions = [Distortion(name, level) for name in self.distortions or () for level in self.levels]
        rows = measure_distortions(images, extraction, distortions, out / "distortions", names, reference, options)
        if rows is None:
            return False
        write_distortions(out, rows)
        return True
