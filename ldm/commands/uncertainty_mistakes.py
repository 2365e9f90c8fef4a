"""`decu uncertainty mistakes`: what members draw of each class, held against the training pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ldm.commands.shared import ClassNames, EnsembleSource, Placement
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed


@dataclass(frozen=True)
class UncertaintyMistakes:
    """See what a model gets wrong: what the members' samples of a class are taken for, and what they are near to.

    A support vector machine on pixels is fitted to the training pictures, every class with the same weight, and says
    of each sample which class it takes it for; what it makes of validation pictures stands beside that. Each
    sample is shown above the training picture that is nearest to it.

    Examples:
      decu uncertainty mistakes --path logs/bootstrapped_my_5
      decu uncertainty mistakes --path logs/bootstrapped_my_5 --classes ship truck --n 50 --real 5000

    Writes {path}/mistakes/: mistakes.csv, nearest_{class}.png of each class, and record.json; the page of the ensemble
    shows them beside the uncertainty of the class.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 5.0

    ensemble: EnsembleSource
    classes: ClassNames = ()
    """The classes, by number or by name."""
    n: int = 8
    """Noises of a class; every member draws a sample for each."""
    real: int = 3000
    """Training, and validation, pictures that are used at most, drawn by --seed."""
    out: Annotated[str | None, option(metavar="DIR", default="PATH/mistakes")] = None
    """The folder of the output."""
    overwrite: bool = False
    """Replace outputs that exist."""
    branching: Branching = Branching()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.n < 1 or self.real < 2:
            raise ValueError(f"--n must be 1 or more and --real 2 or more, got {self.n} and {self.real}")

    @property
    def folder(self) -> Path:
        """Where the outputs go."""
        from ldm.report.mistakes import MISTAKES_FOLDER

        return Path(self.out or Path(self.ensemble.path) / MISTAKES_FOLDER)

    def run(self) -> list[dict[str, Any]]:
        """Sample, recognise, write and print; return the rows of the table."""
        from tqdm import tqdm

        from ldm.data.own import splits_of
        from ldm.experiments.mistakes import find_mistakes, read_real_pictures
        from ldm.records import refuse_existing, write_record
        from ldm.report.mistakes import TABLE, describe_mistakes, summarise_mistakes, write_mistakes

        refuse_existing([self.folder / TABLE], self.overwrite)
        pipeline = self.ensemble.load(self.sampling, self.branching, self.speed, self.place.device, published_branch=0)
        labels = pipeline.choose_classes(self.classes)
        choices = pipeline.model.choices
        prompts = () if choices is None else choices.names
        real = read_real_pictures(splits_of(pipeline.config, "train"), self.real, self.sampling.seed, prompts)
        shown = tqdm(find_mistakes(pipeline, real, labels, self.n), desc="classes", unit="class", total=len(labels))
        found = list(shown)
        settings = pipeline.describe()
        comments = [f"{key}: {value}" for key, value in settings.items()]
        comments.append(f"training pictures: {len(real.images)} of at most {self.real}")
        rows = write_mistakes(self.folder, found, real, pipeline, comments)
        write_record(self.folder / "record.json", self, overwrite=True, settings=settings)
        width = max(len(str(row["name"])) for row in rows)
        print("\n".join(f"{row['name']:<{width}}  {describe_mistakes(row)}" for row in rows))
        print(summarise_mistakes(rows))
        return rows
