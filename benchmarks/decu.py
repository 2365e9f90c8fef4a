"""Does the ensemble's uncertainty mean what it should? Controls on one data set, every class at every class size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.checkpoint import load_state_dict
from ldm.commands.line import run_file
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.train import Train
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.commands.words import refuse_options
from ldm.data.bins import class_size_order
from ldm.data.class_bins import draw_bins
from ldm.evaluation.recognition import PixelClassifier
from ldm.experiments.controls import class_controls, members_study
from ldm.experiments.cost import measure_ensemble_costs
from ldm.options import FIXED, SUPPRESSED, option
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.pipelines.images import real_images
from ldm.records import Row, write_record
from ldm.report.control_report import write_control_report
from ldm.report.tables import read_csv, read_or_make
from ldm.settings import Branching, Sampling, Training
from ldm.training.config import load_config
from ldm.training.gathering import gather_members
from ldm.training.runs import runs_named
from ldm.util import atomic_write

ROOT = Path(__file__).resolve().parents[1]
NAME, DEFAULT = "controls", "default"
HEADS, RATE = "model.params.heads", "model.base_learning_rate"
# What each variant puts on top of the config of a member; a .yaml is one more config. Rates as chosen on digits.
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "pretrained": (f"{HEADS}.init=pretrained",),
    "random": (f"{HEADS}.init=random",),
    "anchored": (f"{HEADS}.init=anchored",),
    "equal_rows": (f"{HEADS}.row_rates=equal",),
    "lora": (f"{HEADS}.names=[lora]", "model.params.cond_stage_config.params.lora=true", f"{RATE}=3.0e-2"),
    "output": (f"{HEADS}.names=[output]", f"{RATE}=2.0e-3"),
    "time_embedding": (f"{HEADS}.names=[time_embedding]", f"{RATE}=2.0e-3"),
    "class_and_output": (f"{HEADS}.names=[class_embedding,output]", f"{RATE}=2.0e-2"),
    "published": (str(ROOT / "configs/latent-diffusion/digits-published.yaml"),),
}


@dataclass(frozen=True)
class EnsembleControls:
    """Ask whether the ensemble's uncertainty means what it should: controls on one data set.

    For every variant (head or initialisation) and every rotation of the classes through the bins: draws the bins,
    trains the members in one training, gathers them, and reads their uncertainty as `decu uncertainty classes` does at
    every branch point. The variant `default` is also compared with scores that need no ensemble or no mutual
    information, with the quality of its samples, with itself at 2 .. --most_members members, and with the cost of a
    plain model. What exists is not repeated: a run that was stopped continues, and variants or rotations can be added.
    Words a.b=c go over all configs.

    Examples:
      python benchmarks/decu.py --base configs/latent-diffusion/digits.yaml --out results/decu
      python benchmarks/decu.py --base configs/latent-diffusion/digits.yaml --out results/decu --variants default
      python benchmarks/decu.py --base configs/latent-diffusion/digits.yaml --out results/decu --only_tables

    Writes {out}/: report.md, tables (.csv), pictures, record.json, and a folder a run.
    """

    base: str
    """The config of the model, with a section `components`; its base checkpoint must exist."""
    out: str
    """The folder of everything."""
    variants: Annotated[tuple[str, ...], option(metavar="NAME ...")] = tuple(VARIANTS)
    """Heads and initialisations."""
    rotations: tuple[int, ...] = (0, 2, 4, 6, 8)
    """Assignments of the classes to the bins."""
    classes_per_bin: Annotated[
        tuple[str, ...] | None, option(metavar="IMAGES:CLASSES ...", default="those of `decu data bins`")
    ] = None
    """The numbers of classes at each number of images."""
    members: int = 5
    """The members of every ensemble."""
    most_members: int = 10
    """The members of the default's first ensemble, to study their number."""
    branch_at: tuple[float, ...] = (0.0, 0.5, 0.98)
    """The branch points, as fractions of the steps."""
    n: int = 16
    """Noises of a class."""
    quality_n: int = 8
    """Noises of a class for baselines and quality, sampled to the end."""
    quality_steps: int = 20
    """Steps of those samples."""
    real: int = 10000
    """The real images at most for the classifier, and for the distances."""
    seed: int = 0
    """The seed of the bins, of the first member (the next have the next), and of noise."""
    only_tables: bool = False
    """Train nothing: write the report of what there is."""
    changes: Annotated[tuple[str, ...], FIXED, SUPPRESSED] = ()
    """Words a.b=c over the config of all variants."""
    place: Placement = Placement()

    def __post_init__(self) -> None:
        wrong = sorted(set(self.variants) - set(VARIANTS))
        if wrong:
            raise ValueError(f"--variants takes {', '.join(VARIANTS)}; got {', '.join(wrong)}")

    def add_words(self, words: Sequence[str]) -> EnsembleControls:
        """Return the benchmark with words a.b=c over the configs.

        Raises:
            ValueError: for any other word.
        """
        refuse_options(words, "key.path=value")
        return replace(self, changes=(*self.changes, *words))

    @property
    def paths(self) -> list[str]:
        """The changes of the config's section `paths`."""
        return [word for word in self.changes if word.startswith("paths.")]

    def run(self) -> Path:
        """Train and measure what is not there, write the report, and return the folder."""
        out = Path(self.out)
        tables: dict[str, dict[int, dict[float, list[Row]]]] = {}
        ensembles: dict[int, Path] = {}
        jobs = [(variant, rotation) for variant in self.variants for rotation in self.rotations]
        for variant, rotation in tqdm(jobs, desc="ensembles", unit="ensemble"):
            ensemble = self.find_ensemble(variant, rotation) or self.make_ensemble(variant, rotation)
            if ensemble is None:
                continue
            found = self.read_uncertainty(ensemble)
            tables.setdefault(variant, {})[rotation] = {at: read_csv(path) for at, path in found.items()}
            if variant == DEFAULT:
                ensembles[rotation] = ensemble
        if not tables:
            raise ValueError(f"{out} holds no trained ensemble yet: run this without --only_tables")
        write_control_report(out, tables, self.study(ensembles) if ensembles else {})
        write_record(out / "record.json", self, overwrite=True)
        print((out / "report.md").read_text())
        return out

    # Ensembles

    def find_ensemble(self, variant: str, rotation: int) -> Path | None:
        """Return the folder of the ensemble of a variant and rotation, where it is there."""
        found = sorted((Path(self.out) / f"{variant}_{rotation}").glob(f"{NAME}_*_{self.members}/ensemble.yaml"))
        return found[-1].parent if found else None

    def make_ensemble(self, variant: str, rotation: int) -> Path | None:
        """Train and gather an ensemble; a stopped training continues. Return its folder, None with --only_tables."""
        if self.only_tables:
            return None
        logs = Path(self.out) / f"{variant}_{rotation}"
        first = variant == DEFAULT and rotation == self.rotations[0]
        members = max(self.members, self.most_members) if first else self.members
        gpus = "0" if self.place.device == "cpu" else "0,"
        started = runs_named(logs, f"_{NAME}all") if logs.is_dir() else []
        if not (started and (started[-1].checkpoints / "last.ckpt").exists()):
            Train(self.make_training(variant, rotation, members, logs, gpus), train=True).run()
        elif not started[-1].finished.exists():
            Train(Training(resume=str(started[-1].path), gpus=gpus), train=True).run()
        for count in sorted({members, self.members}, reverse=True):
            folder = gather_members(logs, NAME, count, overwrite=True)
        return folder

    def make_training(self, variant: str, rotation: int, members: int, logs: Path, gpus: str) -> Training:
        """Return the training of all members of a variant, on the bins of a rotation."""
        changes = VARIANTS[variant]
        bins = Path(self.out) / f"bins_{rotation}"
        config = load_config([self.base], self.paths, needs=("data",))
        data = OmegaConf.to_container(config.data.params.train, resolve=True)
        most = max(self.members, self.most_members)
        draw_bins(bins, data, self.classes_per_bin, members=most, seed=self.seed, rotation=rotation)
        return Training(
            base=(self.base, *[change for change in changes if change.endswith(".yaml")]),
            gpus=gpus,
            scale_lr=False,
            start_from_pretrained=True,
            component="all",
            members=members,
            seed=self.seed,
            logdir=str(logs),
            ensemble_name=NAME,
            changes=(
                *[change for change in changes if not change.endswith(".yaml")],
                f"data.params.train.params.folder={bins}",
                *self.changes,
            ),
        )

    def measure_uncertainty(self, ensemble: Path, at: float, keep: bool = False) -> Path:
        """Measure the classes of an ensemble at a branch point; return the folder of the report."""
        command = UncertaintyClasses(
            EnsembleSource(str(ensemble)),
            n=self.n,
            keep_images=("tensors",) if keep else None,
            branching=Branching(at=at),
            sampling=Sampling(seed=self.seed),
            place=self.place,
        )
        return command.run()

    def read_uncertainty(self, ensemble: Path) -> dict[float, Path]:
        """Return the table of uncertainties at each branch point, measured where it is not there yet."""
        kept = ensemble / "controls.json"
        tables: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
        for at in self.branch_at:
            if str(at) not in tables:
                folder = self.measure_uncertainty(ensemble, at)
                tables[str(at)] = str(folder.relative_to(ensemble) / "uncertainty.csv")
                with atomic_write(kept, overwrite=True) as partial:
                    partial.write_text(json.dumps(tables) + "\n")
        return {at: ensemble / tables[str(at)] for at in self.branch_at}

    def load(self, ensemble: Path, at: float = 0.0, steps: int | None = None) -> EnsemblePipeline:
        """Load an ensemble as `decu uncertainty classes` does; `steps` go before the config's."""
        sampling = Sampling(steps=steps, seed=self.seed)
        return load_ensemble(ensemble, sampling, Branching(at=at), device=self.place.device)

    # Studies of the default variant

    def study(self, ensembles: dict[int, Path]) -> dict[str, list[Row]]:
        """Return the tables of controls, of the number of members, and of cost; `ensembles` is by rotation."""
        out, studies = Path(self.out), {"controls": self.study_controls(ensembles)}
        first = next(iter(ensembles.values()))
        if any(first.parent.glob(f"{NAME}_*_{self.most_members}")):
            studies["members"] = read_or_make(out / "members.csv", lambda: self.study_members(first))
        studies["cost"] = read_or_make(out / "cost.csv", lambda: self.study_cost(first))
        return studies

    def study_controls(self, ensembles: dict[int, Path]) -> list[Row]:
        """Return the rows of `class_controls` of every rotation."""
        classifier, references = self.fit_classifier()
        rows = []
        for rotation, ensemble in ensembles.items():

            def control(ensemble: Path = ensemble) -> list[Row]:
                pipeline = self.load(ensemble, steps=self.quality_steps)
                return class_controls(pipeline, range(pipeline.n_classes), self.quality_n, classifier, references)

            own = read_or_make(ensemble / "class_controls.csv", control)
            rows += [{"rotation": rotation, **row} for row in own]
        return rows

    def fit_classifier(self) -> tuple[PixelClassifier, dict[int, np.ndarray]]:
        """Return a classifier of training images, and the validation images of each class."""
        config = load_config([self.base], self.paths)
        images, labels = real_images(config.data.params.train, self.real, self.seed)
        held_out, classes = real_images(config.data.params.validation, self.real, self.seed)
        return PixelClassifier(images, labels), {int(c): held_out[classes == c] for c in np.unique(classes)}

    def study_members(self, ensemble: Path) -> list[Row]:
        """Return the rows of `members_study` of the ensemble with the most members, at the first branch point."""
        most = next(ensemble.parent.glob(f"{NAME}_*_{self.most_members}"))
        folder = self.measure_uncertainty(most, self.branch_at[0], keep=True)
        sizes = self.load(most).classes.sizes
        files = {int(file.stem.removeprefix("class")): file for file in (folder / "kept").glob("class*.safetensors")}
        distances = {label: load_state_dict(file)["distances"] for label, file in files.items()}
        return members_study(distances, {label: class_size_order(sizes[label]) for label in distances})

    def study_cost(self, ensemble: Path) -> list[Row]:
        """Return `measure_ensemble_costs` at every branch point, with the bytes of the members beside a plain model."""
        stored = sum(file.stat().st_size for file in ensemble.glob("member_*"))
        rows = []
        for at in self.branch_at:
            for row in measure_ensemble_costs(self.load(ensemble, at), self.n):
                members = stored if row["task"].startswith("ensemble") else 0
                rows.append({"branch_at": at, **row, "members_bytes": members})
        return rows


if __name__ == "__main__":
    run_file(EnsembleControls)
