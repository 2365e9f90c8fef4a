"""`decu rollout` (sample_model_rollout.py): the states that members share, and each member's own after the branch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import EnsembleSource, Placement, SpreadClasses
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline

PAIR = "rollout_pair.png"


@dataclass(frozen=True)
class Rollout:
    """Draw rollouts, one figure a class: the states that members share up to the branch, and each one's after it.

    Examples:
      python sample_model_rollout.py --path logs/bootstrapped_digits_5 --branch_at 0.5
      python sample_model_rollout.py --path logs/bootstrapped_digits_5 --classes 3 8 --show x
      python sample_model_rollout.py --path logs/bootstrapped_digits_5 --pair     (a certain class, an uncertain one)

    Writes {path}/samps_uncs_branch{u}/rollout_sample/: rollout_bin{B}_{class}_{name}.png, or with --pair one figure of
    two classes side by side, rollout_pair.png (masked classes: of the members that saw a class and those that did not).
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 5.0
    stands_alone: ClassVar[tuple[str, ...]] = ("pair",)

    ensemble: EnsembleSource
    classes: SpreadClasses = ()
    """The classes, by number or by name."""
    pair: Annotated[
        tuple[int | str, ...] | None,
        option(metavar="[CERTAIN UNCERTAIN]", default="a figure a class; no class: largest and smallest bin"),
    ] = None
    """Draw one figure of a certain class and an uncertain one."""
    columns: int = 8
    """Moments that are shown before and after the branch together."""
    show: Literal["x0", "x"] = "x0"
    """The predicted x0, or the noisy state itself."""
    out: Annotated[str | None, option(metavar="DIR", default="PATH/samps_uncs_branch{{u}}/rollout_sample")] = None
    """The folder of the output."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    branching: Branching = Branching()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.classes and self.pair is not None:
            raise ValueError("--classes and --pair exclude each other: name the two classes of a pair behind --pair")

    def run(self) -> Path:
        """Draw at every branch point; return the last folder."""
        from tqdm import tqdm

        from ldm.experiments.rollouts import pair_panels
        from ldm.images import side_by_side
        from ldm.records import refuse_existing, write_record

        pipeline = self.ensemble.load(self.sampling, self.branching, self.speed, self.place.device)
        pipeline = self.conditions.give(pipeline)
        labels = pipeline.choose_classes(self.classes, 10)
        pair = [pipeline.choose_classes([one])[0] for one in self.pair or ()]
        several = len(pipeline.branches) > 1
        folders = [(one, self._folder(one, several)) for one in pipeline.at_branches()]
        for one, out in folders:
            singles = [path for label in labels for path in self._pictures(one, label, out).values()]
            refuse_existing(singles if self.pair is None else [out / PAIR], self.overwrite)
        for one, out in folders:
            if self.pair is not None:
                side_by_side(pair_panels(one, pair, self.columns, self.show), out / PAIR, self.overwrite)
            else:
                for label in tqdm(labels, desc="rollouts", unit="class"):
                    self._draw(one, label, out)
            write_record(out / "record.json", self, overwrite=True, settings=one.describe())
            print(f"{out}{one.classes.left_out(labels) if self.pair is None else ''}")
        return out

    def _folder(self, pipeline: EnsemblePipeline, several: bool) -> Path:
        """Return where the pictures of a branch point go; several of them lie in folders of their own."""
        name = f"samps_uncs_branch{pipeline.branch}"
        if self.out:
            return Path(self.out) / name if several else Path(self.out)
        return Path(self.ensemble.path) / name / "rollout_sample"

    def _pictures(self, pipeline: EnsemblePipeline, label: int, out: Path) -> dict[int, Path]:
        """Return {base member: its picture} of a class."""
        classes = pipeline.classes
        bases = pipeline.bases(label)
        stem = f"rollout_bin{classes.sizes.get(label, 'NA')}_{label}_{classes.name(label)}"
        names = {base: f"{stem}_base{base}.png" if len(bases) > 1 else f"{stem}.png" for base in bases}
        return {base: out / name.replace(" ", "_").replace("/", "_") for base, name in names.items()}

    def _draw(self, pipeline: EnsemblePipeline, label: int, out: Path) -> None:
        """Draw a figure for each base member of the class."""
        from ldm.experiments.rollouts import rollout
        from ldm.images import labelled_grid

        where = f"members branch at step {pipeline.branch} of {len(pipeline.times) - 1}"
        names = pipeline.classes.member_names(label)
        for base, path in self._pictures(pipeline, label, out).items():
            images, moments = rollout(pipeline, label, base, self.columns, self.show)
            name = pipeline.classes.describe(label).replace("\n", ", ")
            title = f"{'class ' * name[0].isdigit()}{name}: {where}\nbefore it member {base} samples for all"
            labelled_grid(images, path, names, moments, title, self.overwrite)
