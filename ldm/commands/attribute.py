"""`decu attribute`: which training pictures carry a sample, and which carry its certainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.commands.shared import DRAWS_NOTHING, ModelSource, Placement, PosteriorSource
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ldm.pipelines import PosteriorPipeline
    from ldm.pipelines.attribution import FittedImages, Walk
    from ldm.records import Row

# What the tables' columns are.
_COLUMNS = (
    "certainty: rise of the variance without the image, or the group, over the variance; mean: root mean square change "
    "of the outputs, in units of noise or velocity; distance: of the pixels, root mean square of -1 .. 1"
)


@dataclass(frozen=True)
class Attribute:
    """Say which training pictures carry samples, and which carry their certainty, by removing them from the fit.

    The last layer is refitted in closed form without each training picture, and without each class of them. What that
    does to the outputs along a sample's trajectory is what the picture carries:
      certainty   the rise of the sample's variance (method path) over that variance; never below 0
      mean        the change of the outputs, root of the mean square, in units of the noise or velocity

    --samples is a folder of `decu laplace sample`; give the sampler's options that it was made with. The pictures are
    those that the posterior was fitted to. It speaks of the last layer: what the layers below it would have learned
    without a picture only a training can tell (docs/acting.md).

    Examples:
      decu attribute --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits \\
          --samples results/samples --n 8 --out results/attribution
      decu attribute --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits \\
          --samples results/samples --step 40 49 --groups photographers.csv --out results/by_photographer
      decu attribute --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits \\
          --samples results/samples --pixel 3 4 --out results/of_a_pixel

    Writes images.csv (for each sample the --top pictures of either kind, with their distance from the sample),
    groups.csv, attribution.npz (all pictures: positions [G], mean and certainty [G, N]; mean_maps and certainty_maps
    [N, h, w] of the picture that carries most of each sample's certainty), attribution.png, record.json.
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0
    without_effect: ClassVar[Mapping[str, str]] = DRAWS_NOTHING

    source: ModelSource
    posterior: PosteriorSource
    samples: str
    """The folder of the samples."""
    out: str
    """The folder of the output."""
    n: int = 8
    """The first n samples are attributed."""
    step: Annotated[tuple[int, ...], option(metavar="K ...", default="all steps of the trajectory")] = ()
    """Steps of the trajectory whose outputs are asked about; step 0 is the noisiest."""
    pixel: Annotated[tuple[int, int] | None, option(metavar="ROW COLUMN", default="all pixels")] = None
    """The pixel that is asked about (of latents in latent models, of a transformer with its patch); 0 0 is top left."""
    groups: Annotated[str, option(metavar="class|FILE")] = "class"
    """Groups of pictures that are removed together: the classes, or a .csv with columns image and group."""
    top: int = 5
    """Pictures that are listed and shown of each sample."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="as the posterior's record says")] = None
    """The pictures that the posterior was fitted to, as target=.. params.x=.., or CONFIG.yaml:train."""
    batch_size: int = 16
    """Pictures in one pass."""
    overwrite: bool = False
    """Replace outputs that exist."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def run(self) -> list[Row]:
        """Attribute, and write tables and the figure; return the rows of images.csv."""
        from ldm.pipelines.attribution import FittedImages, walk_samples
        from ldm.records import refuse_existing, write_record
        from ldm.report.attribution import nearness
        from ldm.report.tables import markdown_table
        from ldm.training.data_words import read_data_config

        out = Path(self.out)
        refuse_existing([out / "images.csv"], self.overwrite)
        model = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        posterior = self.posterior.load(model)
        pictures, labels = self._read_samples(posterior)
        walks = walk_samples(posterior, labels, range(len(pictures)), self.step)
        self._check_pictures(posterior, walks, pictures)
        data = None if self.data is None else read_data_config(self.data)
        fitted = FittedImages.read(self.posterior.posterior, posterior.laplace, data)
        places = None if self.pixel is None else walks[0].find_place(posterior.laplace.layer, self.pixel)
        asked = [walk.question(places) for walk in walks]
        images, groups = fitted.attribute(posterior, asked, self._groups(fitted), self.batch_size)
        outputs = len(asked[0].patches) * len(posterior.laplace.mean)
        found = Carried(
            labels,
            fitted.positions,
            fitted.labels(),
            certainty=images.share.cpu().numpy(),
            mean=(images.mean / outputs).sqrt().cpu().numpy(),
            distances=nearness(fitted.pictures(), pictures),
            names=model.class_names,
        )
        maps = self._maps(posterior, fitted, walks, found.certainty)
        by_group = found.group_rows(groups.names, groups.share, (groups.mean / outputs).sqrt())
        note = self._write(out, found, by_group, fitted.pictures(), pictures, maps)
        write_record(out / "record.json", self, overwrite=True, order=note)
        table = found.rows(self.top)
        print(markdown_table([row for row in table if row["rank"] == 1], 3), note, sep="\n")
        return table

    def _write(
        self, out: Path, found: Carried, by_group: list[Row], trained: NDArray, pictures: NDArray, maps: Any
    ) -> str:
        """Write tables, arrays and the figure; return what the orders say of one another."""
        import numpy as np

        from ldm.files import write_arrays
        from ldm.report.attribution import attribution_figure
        from ldm.report.tables import write_csv

        note = found.describe_order()
        asked = "all pixels" if self.pixel is None else f"the pixel in row {self.pixel[0]}, column {self.pixel[1]}"
        columns = f"of {asked}: {_COLUMNS}"
        write_csv(out / "images.csv", found.rows(self.top), [note, columns], overwrite=True)
        if by_group:
            write_csv(out / "groups.csv", by_group, [columns], overwrite=True)
        arrays = {"positions": np.array(found.positions), "mean": found.mean, "certainty": found.certainty}
        arrays["mean_maps"] = np.stack([moved for moved, _ in maps])
        arrays["certainty_maps"] = np.stack([risen for _, risen in maps])
        write_arrays(out / "attribution.npz", arrays, overwrite=True)
        shown = (pictures, trained, found.certainty, found.mean, maps, self.top)
        attribution_figure(*shown, out / "attribution.png", found.named(found.labels), found.named(found.classes))
        return note

    def _read_samples(self, posterior: PosteriorPipeline) -> tuple[NDArray, list[int] | None]:
        """Return the first n pictures uint8 [n, H, W, C] and their classes, None of an unconditional model."""
        import numpy as np

        from ldm.files import read_arrays

        file = Path(self.samples) / "samples.npz"
        if not file.is_file():
            raise ValueError(f"{self.samples} holds no samples.npz: name a folder of `decu laplace sample`")
        content = read_arrays(file, None, "a file of samples", "sample again")
        pictures, labels = content.get("arr_0", np.zeros(0))[: self.n], None
        if "arr_1" in content:
            labels = content["arr_1"][: self.n].tolist()
        if len(pictures) < self.n:
            raise ValueError(f"--n {self.n}: {file} holds {len(pictures)} samples")
        return pictures, labels if posterior.pipeline.n_classes else None

    def _check_pictures(self, posterior: PosteriorPipeline, walks: Sequence[Walk], pictures: NDArray) -> None:
        """Make sure that the walks end in the samples.

        Raises:
            ValueError: if they do not: the sampler's options are others.
        """
        import numpy as np
        import torch

        from ldm.images import to_uint8

        ends = to_uint8(posterior.pipeline.decode(torch.stack([walk.end for walk in walks])))
        away = np.abs(ends.astype(int) - pictures.reshape(ends.shape).astype(int)).max()
        if away > 2:
            raise ValueError(
                f"these options do not draw the samples of {self.samples} (pixels differ by up to {away} of 255): give "
                "the sampler, steps, scale and seed of the command in its record.json"
            )

    def _groups(self, fitted: FittedImages) -> dict[str, list[int]]:
        """Return the groups {name: positions} that are removed together; none of data without classes."""
        from ldm.report.tables import read_csv

        groups: dict[str, list[int]] = {}
        if self.groups == "class":
            for position, label in zip(fitted.positions, fitted.labels() or (), strict=False):
                groups.setdefault(str(label), []).append(position)
            return dict(sorted(groups.items(), key=lambda item: int(item[0])))
        rows = read_csv(self.groups, ("image", "group"), "give a row for each image: its position, and its group")
        seen = set(fitted.positions)
        for number, row in enumerate(rows, 1):
            if row["image"] not in seen:
                raise ValueError(f"{self.groups}, row {number}: the fit saw no image {row['image']}")
            if row["group"] is None:
                raise ValueError(f"{self.groups}, row {number}: it names no group")
            groups.setdefault(str(row["group"]), []).append(int(row["image"]))  # type: ignore[arg-type]
        return groups

    def _maps(
        self, posterior: PosteriorPipeline, fitted: FittedImages, walks: Sequence[Walk], certainty: NDArray
    ) -> Any:
        """Return for each sample the maps of the picture that carries most of its certainty."""
        maps = []
        for sample, walk in enumerate(walks):
            best = fitted.positions[int(certainty[:, sample].argmax())]
            maps.append([each.mean(0).cpu().numpy() for each in fitted.map_image(posterior, walk, best)])
        return maps


@dataclass(frozen=True)
class Carried:
    """What G training pictures carry of N samples.

    Attributes:
        labels: classes of the samples [N], None of an unconditional model.
        positions: of the pictures in the data set [G], and their `classes` [G], None of data without.
        certainty: rise of the sample's variance over it [G, N].
        mean: root mean square of the change of the outputs [G, N].
        distances: root mean square distance of pixels [G, N], the trivial baseline.
        names: of the model's classes; numbers stand for them where there are none.
    """

    labels: Sequence[int] | None
    positions: Sequence[int]
    classes: Sequence[int] | None
    certainty: NDArray
    mean: NDArray
    distances: NDArray
    names: Sequence[str] = ()

    def named(self, labels: Sequence[int] | None) -> list[str]:
        """Return the names of classes for a picture; none of data without classes."""
        return [self.names[label] if label < len(self.names) else f"class {label}" for label in labels or ()]

    def rows(self, top: int) -> list[Row]:
        """Return the pictures that carry most of each sample, of either kind, the first ones first."""
        found: list[Row] = []
        for sample in range(self.certainty.shape[1]):
            for kind in ("certainty", "mean"):
                order = (-getattr(self, kind)[:, sample]).argsort(kind="stable")[:top].tolist()
                found += [self._row(sample, row, kind, rank) for rank, row in enumerate(order, 1)]
        return found

    def _row(self, sample: int, row: int, kind: str, rank: int) -> Row:
        return {
            "sample": sample,
            "class": None if self.labels is None else self.labels[sample],
            "by": kind,
            "rank": rank,
            "image": int(self.positions[row]),
            "image class": None if self.classes is None else self.classes[row],
            "certainty": float(self.certainty[row, sample]),
            "mean": float(self.mean[row, sample]),
            "distance": float(self.distances[row, sample]),
        }

    def group_rows(self, names: Sequence[Any], certainty: Any, mean: Any) -> list[Row]:
        """Return a row for each sample and group, of what groups carry [groups, N]."""
        return [
            {
                "sample": sample,
                "class": None if self.labels is None else self.labels[sample],
                "group": str(name),
                "certainty": float(certainty[row, sample]),
                "mean": float(mean[row, sample]),
            }
            for row, name in enumerate(names)
            for sample in range(self.certainty.shape[1])
        ]

    def describe_order(self) -> str:
        """Say how the orders of the pictures agree with one another and with nearness, on average over samples."""
        import numpy as np

        from ldm.stats import spearman

        pairs = {"certainty with mean": self.mean, "certainty with nearness": -self.distances}
        if not np.isfinite(self.distances).all() or len(self.positions) < 2:
            return "no order to compare with: the samples have another shape than the pictures, or there is one picture"
        said = []
        for name, other in pairs.items():
            each = [spearman(self.certainty[:, sample], other[:, sample]) for sample in range(other.shape[1])]
            said.append(f"{name} {np.mean(each):.2f}")
        return f"rank correlation over pictures, mean over samples: {', '.join(said)}"
