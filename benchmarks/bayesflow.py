"""BayesFlow's benchmarks in one table: the published method's figures beside ours, each against another truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from omegaconf import OmegaConf
from torch.utils.data import Dataset

from ldm.commands.line import run_file
from ldm.commands.shared import ModelSource, Placement
from ldm.commands.train import Train
from ldm.data.class_bins import draw_bins
from ldm.experiments import low_data
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.experiments.cost import measure_method_costs
from ldm.jobs import WorkList
from ldm.options import option
from ldm.pipelines import Defaults, PosteriorPipeline, load_model
from ldm.records import Row, write_record
from ldm.report.benchmark_table import benchmark_overview
from ldm.report.tables import markdown_table, read_or_make, write_csv
from ldm.settings import Sampling, Speed, Training
from ldm.training.config import load_config
from ldm.training.runs import runs_named
from ldm.util import atomic_write

ROOT = Path(__file__).resolve().parents[1]
ROTATIONS = (0, 2, 4, 6, 8)
KEPT = 8  # images of a low-data class
PartName = Literal["fidelity", "consistency", "calibration", "low_data", "alignment", "scaling", "cost"]
PARTS: tuple[PartName, ...] = ("fidelity", "consistency", "calibration", "low_data", "alignment", "scaling", "cost")
NAME = "low_data"
CONFIGS = ("configs/flow-matching/digits.yaml", "configs/flow-matching/digits-small.yaml")
LOW_DATA_SCORES = ("gamma^2 along the path", "tangents, K = 8", "BayesFlow as published, S = 100")
SHARES = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class FlowVariances:
    """Make BayesFlow's benchmarks in one table: the published method's figures beside ours, each against a truth.

      Y1 fidelity      variance maps against many sampled weights held for the sample, 10 steps
      Y2 consistency   total variance at the second of --grids steps over that at the first, over the truth's ratio
      Y3 calibration   predictive variances against bootstraps of the last layer over images
      Y4 low_data      samples of low-data classes found, minus the same score of a model that saw all data: trains
                       5 small models a seed (two classes with 8 images each) and a control, with --low_data_base
      Y6 alignment     the closed-form aleatoric map against squared errors on held-out images
      Y8 scaling       epistemic variance against the number of images, slope in logarithms
      Y9 cost          evaluations and seconds an image of every method

    The model is a run of configs/flow-matching (any flow; a diffusion gives what its schedule knows). Parts that exist
    in --out are kept, of low_data each model's scores ({out}/low_data/scores_*.json): a stopped call continues, and
    more --seeds add to what there is. Writes {out}/: report.md, a table (.csv) a part, record.json.

    Examples:
      python benchmarks/bayesflow.py --run logs/2026-01-01T00-00-00_digits --out results/bayesflow
      python benchmarks/bayesflow.py --run RUN --out results/bayesflow --only fidelity cost
      python benchmarks/bayesflow.py --run RUN --out results/bayesflow --only low_data --seeds 0 1
    """

    default_steps: ClassVar[int] = 10

    out: str
    """The folder of everything."""
    source: ModelSource = ModelSource()
    only: tuple[PartName, ...] = PARTS
    """The parts to measure."""
    n: int = 20
    """The images of fidelity, consistency and cost, the classes in turn."""
    grids: tuple[int, int] = (10, 40)
    """The numbers of steps of consistency."""
    truth: int = 128
    """The sampled weights that the truth is made of."""
    images: Annotated[int | None, option(metavar="N", default="all")] = None
    """The training images of the posteriors of all parts but low_data."""
    draws: int = 4
    """The noise draws for each image of a fit."""
    bootstraps: int = 240
    """The refits of calibration (and as many more for its ceiling)."""
    tests: int = 200
    """The held-out images of calibration and alignment."""
    probes: Annotated[int | None, option(metavar="N", default="its exact diagonal")] = None
    """The probes of the aleatoric map, for large images."""
    low_data_base: Annotated[
        tuple[str, ...] | None, option(metavar="YAML ...", default="digits.yaml with digits-small.yaml")
    ] = None
    """The configs of the low-data models."""
    seeds: tuple[int, ...] = (0, 1)
    """The trainings of each low-data model."""
    per_class: int = 24
    """The samples a class of the low-data models."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def run(self) -> Path:
        """Measure what is not there, write the report, and return the folder."""
        out = Path(self.out)
        tables = self.measure()
        if "low_data" in tables:
            tables["low_data_summary"] = low_data.summary(tables["low_data"])
        lines = ["# Benchmarks", "", markdown_table(benchmark_overview(tables)), ""]
        for name, rows in tables.items():
            lines += [f"## {name}", "", markdown_table(rows), ""]
        with atomic_write(out / "report.md", overwrite=True) as partial:
            partial.write_text("\n".join(lines))
        write_record(out / "record.json", self, overwrite=True)
        print((out / "report.md").read_text())
        return out

    @cached_property
    def posterior(self) -> PosteriorPipeline:
        """The model with the evidence-tuned posterior of its last layer."""
        model = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        return low_data.fit_posterior(model, low_data.load_own_data(model, "train", self.images), self.draws)

    def load_data(self, split: str) -> Dataset:
        """Return a split of the model's data, of the training images those of --images."""
        return low_data.load_own_data(self.posterior.pipeline, split, self.images if split == "train" else None)

    def measure(self) -> dict[str, list[Row]]:
        """Return the tables of the chosen parts; those that are there are read."""
        out = Path(self.out)
        parts: dict[PartName, Callable[[], Iterable[Row]]] = {
            "fidelity": self.measure_fidelity,
            "consistency": self.measure_consistency,
            "calibration": self.measure_calibration,
            "low_data": self.measure_low_data,
            "alignment": self.measure_alignment,
            "scaling": self.measure_scaling,
            "cost": self.measure_cost,
        }
        tables: dict[str, list[Row]] = {}
        for name in PARTS:
            if name not in self.only:
                continue
            if name == "low_data":  # its models' scores are what is kept
                write_csv(out / f"{name}.csv", parts[name](), overwrite=True)
            tables[name] = read_or_make(out / f"{name}.csv", parts[name])
        return tables

    # Parts that measure the model

    def choose_samples(self) -> tuple[list[int], list[int]]:
        """Return labels and image numbers of --n samples, the classes in turn."""
        classes = self.posterior.pipeline.n_classes
        return [image % classes for image in range(self.n)], list(range(self.n))

    def measure_fidelity(self) -> list[Row]:
        """Return the table of `fidelity`."""
        return benchmarks.fidelity(self.posterior, *self.choose_samples(), self.truth)

    def measure_consistency(self) -> list[Row]:
        """Return the table of `consistency`."""
        draws = max(2, self.truth // 2)
        return benchmarks.consistency(self.posterior, *self.choose_samples(), self.grids, draws=draws)

    def measure_calibration(self) -> list[Row]:
        """Return the table of `calibration`."""
        numbers = {"draws": self.draws, "count": self.bootstraps, "tests": self.tests}
        train, held_out = self.load_data("train"), self.load_data("validation")
        return benchmarks.calibration(self.posterior.pipeline, train, held_out, **numbers)

    def measure_alignment(self) -> list[Row]:
        """Return the table of `error_alignment`."""
        held_out = self.load_data("validation")
        pipeline = self.posterior.pipeline
        return benchmarks.error_alignment(pipeline, held_out, SHARES, count=self.tests, probes=self.probes)

    def measure_scaling(self) -> list[Row]:
        """Return the table of `data_scaling`."""
        train, held_out = self.load_data("train"), self.load_data("validation")
        return benchmarks.data_scaling(self.posterior.pipeline, train, held_out, draws=self.draws, tests=self.tests)

    def measure_cost(self) -> list[Row]:
        """Return the table of `measure_method_costs`."""
        return measure_method_costs(self.posterior, *self.choose_samples())

    # Low-data models

    @property
    def low_data_configs(self) -> tuple[str, ...]:
        """The configs of the low-data models."""
        return self.low_data_base or tuple(str(ROOT / name) for name in CONFIGS)

    def measure_low_data(self) -> list[Row]:
        """Return the rows of `detection_rows`, for every rotation and seed; a model that was scored is not again."""
        work = self.open_scores()

        def score(rotation: int | None, seed: int) -> list[Row]:
            key = f"scores_{'control' if rotation is None else rotation}_{seed}"
            if work.pending([key]):
                work.save(key, {"rows": self.score_low_data(rotation, seed)})
            return work.load(key)["rows"]

        rows: list[Row] = []
        for seed in self.seeds:
            control = score(None, seed)
            for rotation in ROTATIONS:
                own = score(rotation, seed)
                few = sorted({row["class"] for row in own if row["low_data"]})
                named = {"seed": seed, "classes": " ".join(map(str, few))}
                rows += [{**named, **row} for row in low_data.detection_rows(own, control)]
        return rows

    def open_scores(self) -> WorkList:
        """Return the scores of every low-data model and control, beside their runs, under what they depend on."""
        config = OmegaConf.to_container(load_config(self.low_data_configs), resolve=True)
        settings: dict[str, Any] = {"config": config, "draws": self.draws, "per_class": self.per_class}
        sampling = self.sampling
        settings |= {"sampler": sampling.sampler, "ddim_steps": sampling.steps, "spacing": sampling.spacing}
        settings |= {"scale": sampling.scale, "seed": sampling.seed, "scores": LOW_DATA_SCORES}
        return WorkList(Path(self.out) / NAME, settings)

    def score_low_data(self, rotation: int | None, seed: int) -> list[Row]:
        """Score the samples of a low-data model, or of the control where `rotation` is None; see `score_rows`."""
        run = self.train_low_data(rotation, seed)
        place = {"speed": self.speed, "device": self.place.device, "defaults": Defaults(self.default_steps)}
        pipeline = load_model(run, self.sampling, ema=self.source.ema, **place)
        train = low_data.load_own_data(pipeline, "train")
        labels = [label for label in range(pipeline.n_classes) for _ in range(self.per_class)]
        posterior = low_data.fit_posterior(pipeline, train, self.draws)
        bins = {} if rotation is None else getattr(train, "bins")  # noqa: B009
        few = [label for label, images in bins.items() if images == KEPT]
        return low_data.score_rows(low_data.sample_scores(posterior, train, labels, LOW_DATA_SCORES), labels, few)

    def train_low_data(self, rotation: int | None, seed: int) -> Path:
        """Return the run of a low-data model (or the control), trained if it is not there; a stopped one continues."""
        folder = Path(self.out).resolve() / NAME
        logs = folder / f"{'control' if rotation is None else rotation}_{seed}"
        known = runs_named(logs, NAME) if logs.is_dir() else []
        gpus = "0" if self.place.device == "cpu" else "0,"
        if known and known[-1].finished.exists():
            return known[-1].path
        if known and (known[-1].checkpoints / "last.ckpt").exists():
            return Train(Training(resume=str(known[-1].path), gpus=gpus), train=True).run()
        training = Training(
            base=self.low_data_configs,
            gpus=gpus,
            name=NAME,
            logdir=str(logs),
            seed=seed,
            scale_lr=False,
            changes=() if rotation is None else self.make_changes(folder / f"bins_{rotation}", rotation),
        )
        return Train(training, train=True).run()

    def make_changes(self, bins: Path, rotation: int) -> tuple[str, ...]:
        """Return the words that let a model train on the bins of a rotation, which are drawn if they are not there."""
        key = "data.params.train"
        first = load_config(self.low_data_configs[:1], needs=("data",)).data.params.train
        whole = OmegaConf.to_container(first, resolve=True)
        draw_bins(bins, whole, (f"{KEPT}:2", "all:8"), members=1, rotation=rotation)
        data = load_config(self.low_data_configs).data.params.train
        words = [f"{key}.target=ldm.data.subsets.ComponentSubset", f"{key}.params.folder={bins}"]
        words.append(f"{key}.params.dataset.target={data.target}")
        words += [f"{key}.params.dataset.params.{name}={value}" for name, value in data.get("params", {}).items()]
        return tuple(words)


if __name__ == "__main__":
    run_file(FlowVariances)
