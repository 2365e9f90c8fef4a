"""`decu laplace resample`: back to an intermediate step, and to the end again from states around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import ACTS_UNDER_METHOD, ModelSource, Placement, PosteriorSource, VarianceMethod
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipelines import PosteriorPipeline

Kind = Literal["variance", "uniform", "members"]
# Images in the pictures, a row each.
ROWS_SHOWN = 8


@dataclass(frozen=True)
class ResampleLaplace:
    """Go back to an intermediate step and finish again from states around it: other good samples, and repair.

    The trajectory with its variance stops after --cut steps. From there --variants states per image (the state itself
    first) are finished by the plain sampler. A kind: variance draws N(x, var) as BayesDiff; uniform spreads the same
    total evenly, the control that shows what the map adds; members takes the sampled states themselves.

    Examples:
      decu laplace resample --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 8 \\
          --steps 20 --cut 10 --out results/variants
      decu laplace resample --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 200 \\
          --steps 5 --cut 3 --strength 4 --classifier models/digits.safetensors --out results/repair

    Writes for every kind of --kinds variants_KIND.png (a row an image), variants_KIND.npz (arr_0 uint8
    [N V, H, W, C], image by image) and a row of numbers.csv:
      diversity    mean distance between variants, root mean square over pixels in [-1, 1]
      ssim         mean structural similarity of pairs of variants (images of 6 pixels a side or more)
      recognised   share of plain samples, and of variants, that --classifier recognises as their class
      repaired     share of the plain samples not recognised for which some variant is
      broken       share of the variants of recognised samples that are not
    """

    default_steps: ClassVar[int] = 20
    default_scale: ClassVar[float] = 1.0
    acts_with: ClassVar[Mapping[str, str]] = ACTS_UNDER_METHOD

    source: ModelSource
    posterior: PosteriorSource
    out: str
    """The folder of the output."""
    cut: int
    """Steps before the trajectory is left, 1 .. steps - 1."""
    method: VarianceMethod = "persistent"
    """How the variance is propagated, see `decu laplace sample --help`."""
    kinds: tuple[Kind, ...] = ("variance", "uniform")
    """How states are drawn, see above."""
    strength: float = 1.0
    """What multiplies the standard deviation."""
    variants: int = 8
    """States of each image, the plain one included."""
    n: int = 8
    """The number of images, the classes in turn."""
    batch_size: int = 50
    """Images sampled together."""
    classifier: Annotated[str | None, option(metavar="FILE", default="nothing is recognised")] = None
    """The weights of a classifier of the same classes, for recognition and repair."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        held = self.method in ("persistent", "tangents")
        if "members" in self.kinds and (not held or self.posterior.draws < self.variants - 1):
            raise ValueError(
                f"--kinds members takes --method persistent or tangents and {self.variants - 1} --draws for "
                f"{self.variants} --variants, got {self.method} and {self.posterior.draws}"
            )

    def run(self) -> list[dict[str, Any]]:
        """Sample the variants of every kind, and write them with the table; return its rows."""
        from ldm.evaluation.classifier import load_classifier
        from ldm.experiments.variants import measure_variants
        from ldm.records import write_record
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.variance import write_variants

        out = Path(self.out)
        if (out / "numbers.csv").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds variants; choose another folder, or --overwrite")
        posterior = self.posterior.load(
            self.conditions.give(self.source.load(self.sampling, self.speed, self.place.device, self.default_steps))
        )
        pipeline = posterior.pipeline
        posterior.check(self.method)
        last = len(pipeline.times) - 2
        if not 1 <= self.cut <= last:
            raise ValueError(f"--cut {self.cut} is not inside the trajectory: expected 1 .. {last}")
        if self.classifier and not pipeline.n_classes:
            raise ValueError("--classifier recognises classes, and this model is unconditional")
        classifier = load_classifier(self.classifier).eval() if self.classifier else None
        rows = []
        for kind in self.kinds:
            pictures = self._sample(posterior, kind)
            rows.append({"kind": kind, **measure_variants(pictures, classifier, pipeline.n_classes)})
            write_variants(pictures, out, kind, ROWS_SHOWN)
        note = f"{self.n} images, {self.variants} variants from step {self.cut}, strength {self.strength:g}"
        print(markdown_table(rows, 3), note, sep="\n")
        write_csv(out / "numbers.csv", rows, [note], overwrite=True)
        write_record(out / "record.json", self, overwrite=True)
        return rows

    def _sample(self, posterior: PosteriorPipeline, kind: Kind) -> Tensor:
        """Return the variants [V, N, C, H, W] of one kind."""
        import torch
        from tqdm import tqdm

        from ldm.experiments.variants import sample_variants

        found = []
        for start in tqdm(range(0, self.n, self.batch_size), desc=kind, unit="batch"):
            images = range(start, min(start + self.batch_size, self.n))
            found.append(
                sample_variants(
                    posterior,
                    list(images),
                    method=self.method,
                    cut=self.cut,
                    kind=kind,
                    count=self.variants,
                    strength=self.strength,
                )
            )
        return torch.cat(found, 1)
