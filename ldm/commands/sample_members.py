"""`decu sample members` (sample_model.py): a grid of samples of an ensemble's members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import EnsembleSource, Placement, SpreadClasses
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline


@dataclass(frozen=True)
class SampleMembers:
    """Draw a grid of samples: a row for each member, a column for each class, the same noise everywhere.

    Examples:
      python sample_model.py --path logs/bootstrapped_digits_5
      python sample_model.py --path logs/bootstrapped_digits_5 --classes 0 3 7 --branch_at 0 0.5 0.98 --base_comp all

    Writes {path}/samples/members_branch{u}.png and the latents beside it, for each branch point and base member.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 5.0

    ensemble: EnsembleSource
    classes: SpreadClasses = ()
    """The classes, by number or by name."""
    out: Annotated[str | None, option(metavar="DIR", default="PATH/samples")] = None
    """The folder of the output."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    branching: Branching = Branching()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def run(self) -> Path:
        """Draw at every branch point; return the first picture."""
        import torch

        from ldm.checkpoint import save_tensors
        from ldm.images import labelled_grid
        from ldm.records import refuse_existing, write_record

        pipeline = self.ensemble.load(self.sampling, self.branching, self.speed, self.place.device)
        pipeline = self.conditions.give(pipeline)
        labels = pipeline.choose_classes(self.classes, 10)
        columns = [pipeline.classes.describe(label) for label in labels]
        names = pipeline.classes.member_names(labels[0] if len(labels) == 1 else None)
        each = list(pipeline.at_branches())
        paths = [path for one in each for path in self._pictures(one, labels[0]).values()]
        refuse_existing(paths, self.overwrite)
        for one in each:
            latents = one.member_latents(labels, images=[0] * len(labels))  # [M, classes, bases, c, h, w]
            found = self._pictures(one, labels[0])
            for place, (base, path) in enumerate(found.items()):
                own = latents[:, :, place]
                title = f"members branch at step {one.branch} of {len(one.times) - 1}, guidance {one.scale:g}"
                title += one.sampling.steering.describe() + one.classes.left_out(labels)
                title += f", base member {base}" if len(found) > 1 else ""
                labelled_grid(one.decode(own), path, names, columns, title, self.overwrite)
                tensors = {"latents": own.contiguous(), "classes": torch.tensor(labels)}
                save_tensors(tensors, path.with_suffix(".safetensors"), overwrite=True)
                write_record(path.with_suffix(".json"), self, overwrite=True, settings=one.describe())
        print("\n".join(map(str, paths)))
        return paths[0]

    def _pictures(self, pipeline: EnsemblePipeline, label: int) -> dict[int, Path]:
        """Return {base member: its picture}; with --uncertain_comp the one picture of every class's own base."""
        out = Path(self.out or Path(self.ensemble.path) / "samples")
        bases = pipeline.bases(label)
        names = {base: f"_base{base}" if len(bases) > 1 else "" for base in bases}
        return {base: out / f"members_branch{pipeline.branch}{name}.png" for base, name in names.items()}
