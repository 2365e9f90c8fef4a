"""`decu uncertainty pixels` (get_unc_pixels.py): mutual information per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import EnsembleSource, Placement, SpreadClasses, read_scale
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline
    from ldm.uncertainty.results import PixelInformation

Space = Literal["image", "latent"]


@dataclass(frozen=True)
class UncertaintyPixels:
    """Map epistemic uncertainty onto pixels: mutual information between a pixel of the final sample and the members.

    Examples:
      python get_unc_pixels.py --path logs/bootstrapped_digits_5
      python get_unc_pixels.py --path logs/bootstrapped_digits_5 --classes 0 3 8 --n 4 --space image latent --mean

    Writes {path}/pixel_unc/: pixel_unc_branch{u}_{k}.png for noise k (with --mean one picture, of the mean over
    noises), images of the base member above their maps, all maps on one colour scale, and the maps themselves (.npz).
    Maps of latents go to files with `latent` in their names.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 5.0

    ensemble: EnsembleSource
    classes: SpreadClasses = ()
    """The classes, by number or by name."""
    n: int = 1
    """Noises of a class."""
    mean: bool = False
    """Draw one map a class: the mean over its noises, under the image of the first."""
    space: Annotated[tuple[Space, ...], option(metavar="image|latent ...")] = ("image",)
    """Decoded images in [0, 1], final latents, or both."""
    distance_scale: Annotated[str | float, option(metavar="sum|mean|FACTOR")] = "sum"
    """Squared distances of a pixel: the sum over its channels, their mean, or a factor on the sum."""
    noise: Annotated[float | None, option(metavar="R", default="what the distance's scale implies")] = None
    """See pixels through Gaussian noise of R standard deviations of the data, in place of --distance_scale: nats that
    compare between models."""
    channels: Annotated[
        Literal["joint", "mean"] | None, option(metavar="joint|mean", default="joint; published: mean")
    ] = None
    """A pixel's channels are one event (joint), or are taken one by one and averaged (mean)."""
    limit: Annotated[float | None, option(metavar="NATS", default="the 99.5th percentile")] = None
    """The top of the colour scale, to compare runs; the colour bar says by its end where values lie above it."""
    out: Annotated[str | None, option(metavar="DIR", default="PATH/pixel_unc")] = None
    """The folder of the output."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    branching: Branching = Branching()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"--n is the number of noises of a class: expected at least 1, got {self.n}")
        if self.noise is not None and (read_scale(self.distance_scale) != "sum" or not self.noise > 0):
            raise ValueError(
                f"--noise takes a number above 0, and no --distance_scale beside it; got {self.noise:g} and "
                f"{self.distance_scale}"
            )

    @property
    def folder(self) -> Path:
        """Where the outputs go."""
        return Path(self.out or Path(self.ensemble.path) / "pixel_unc")

    @property
    def joint(self) -> bool:
        """Whether a pixel's channels are one event."""
        channels = self.channels or ("mean" if self.ensemble.published else "joint")
        return channels == "joint"

    def run(self) -> Path:
        """Measure at every branch point and draw; return the folder."""
        from ldm.records import refuse_existing, write_record

        pipeline = self.ensemble.load(self.sampling, self.branching, self.speed, self.place.device, published_branch=0)
        pipeline = self.conditions.give(pipeline)
        labels = pipeline.choose_classes(self.classes, 10)
        each = list(pipeline.at_branches())
        pictures = [path for one in each for space in self.space for path in self._pictures(one, space)]
        refuse_existing(pictures, self.overwrite)
        for one in each:
            found = self._measure(one, labels)
            for space in self.space:
                self._draw(one, found, space)
            settings = {
                **one.describe(),
                "distance": "wasserstein",
                "distance_scale": self.distance_scale,
                **({} if self.noise is None else {"noise": self.noise}),
            }
            record = self.folder / f"record_branch{one.branch}.json"
            write_record(record, self, overwrite=True, settings=settings)
        return self.folder

    def _measure(self, pipeline: EnsemblePipeline, labels: list[int]) -> PixelInformation:
        from tqdm import tqdm

        from ldm.pipelines.information import measure_pixels
        from ldm.uncertainty.results import PixelInformation

        scale = read_scale(self.distance_scale)
        measured = measure_pixels(
            pipeline, labels, self.n, spaces=self.space, scale=scale, joint=self.joint, noise=self.noise
        )
        shown = tqdm(measured, desc="pixel maps", unit="class", total=len(labels))
        return PixelInformation.stack(labels, list(shown))

    def _seen_through(self, found: PixelInformation, pipeline: EnsemblePipeline, space: str) -> str:
        """Return the noise that the nats of a map belong to, in words."""
        from ldm.uncertainty.channel import implied_deviations

        if self.noise is not None:
            return f"at most this through noise of {self.noise:g} standard deviations of the data"
        channels = found.images.shape[2] if space == "image" else pipeline.model.latent_shape[0]
        factors: dict[str, float] = {"sum": 1.0, "mean": 1 / channels if self.joint else 1.0}
        scale = read_scale(self.distance_scale)
        factor = factors[scale] if isinstance(scale, str) else scale
        return f"at most this through noise of deviation {implied_deviations(factor)[0]:.3g} in each channel"

    def _stem(self, pipeline: EnsemblePipeline, space: str) -> str:
        """Return what the names of a space's outputs begin with."""
        return f"pixel_unc{'' if space == 'image' else '_latent'}_branch{pipeline.branch}"

    def _pictures(self, pipeline: EnsemblePipeline, space: str) -> list[Path]:
        """Return the pictures of a space: one a noise, or that of their mean."""
        names = ["mean"] if self.mean else [str(noise) for noise in range(self.n)]
        return [self.folder / f"{self._stem(pipeline, space)}_{name}.png" for name in names]

    def _draw(self, pipeline: EnsemblePipeline, found: PixelInformation, space: str) -> None:
        """Draw all classes, a picture a noise, and write the numbers."""
        import numpy as np

        from ldm.files import write_arrays
        from ldm.images import heat_maps, without_outliers
        from ldm.pipelines.information import SPACES

        maps = found.maps[space]
        shown = maps.mean(1, keepdim=True) if self.mean else maps
        limits = (0.0, without_outliers(shown.numpy())[1] if self.limit is None else self.limit)
        label = f"mutual information per pixel (nats)\n{SPACES[space]}, distance {self.distance_scale}"
        label += "" if self.joint else ", channel by channel"
        label += f", mean over {self.n} noises" if self.mean else ""
        label += pipeline.classes.left_out(found.classes)
        label += f"\n{self._seen_through(found, pipeline, space)}"
        titles = [pipeline.classes.describe(one) for one in found.classes]
        for noise, path in enumerate(self._pictures(pipeline, space)):
            heat_maps(found.images[:, noise], shown[:, noise], path, label, titles, limits, 5, self.overwrite)
            print(path)
        arrays = {"images": found.images.numpy(), "mi": maps.numpy(), "classes": np.asarray(found.classes)}
        write_arrays(self.folder / f"{self._stem(pipeline, space)}.npz", arrays, overwrite=True, compressed=True)
