"""Values of commands that look at images: which images, and the network whose features stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.shared import ModelSource
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ldm.evaluation.extraction import ImageSet
    from ldm.evaluation.features import Extractor


@dataclass(frozen=True)
class ImageSource:
    """Which images, in an order of their own: files, one of the project's data sets, or a model to sample from.

    Raises:
        ValueError: if none or several sets are named, a number is below 1, or an option would not act.
    """

    acts_with: ClassVar[Mapping[str, str]] = {"image_size": "images"}

    images: Annotated[str | None, option(metavar="PATH", default="none; or give --data, or --run")] = None
    """A folder or .zip of pictures, sorted by their path; .npz with arr_0; .pt or .safetensors."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="none")] = None
    """A data set of the project: target=.. params.x=.., or CONFIG.yaml:train a.b=c."""
    n: Annotated[int | None, option(metavar="N", default="all; needed with a model")] = None
    """The first n images; with a model, how many to sample."""
    keep: Annotated[str | None, option(metavar="FILE", default="all images")] = None
    """A file with a line for each image to keep: its position, or its path below the folder."""
    image_size: Annotated[int | tuple[int, int] | None, option(metavar="SIDE|H W", default="pictures as they are")] = (
        None
    )
    """Scale picture files to cover this side, or height and width, and cut the centre; those of --ref as well."""
    batch_size: int = 100
    """Images in one pass."""
    model: ModelSource = ModelSource()
    sampling: Sampling = Sampling()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if sum((self.images is not None, self.data is not None, self.sampled)) != 1:
            raise ValueError("expected one of --images, --data, and --run (or --base with --ckpt)")
        if (self.n is not None and self.n < 1) or self.batch_size < 1:
            raise ValueError(f"--n and --batch_size must be at least 1, got {self.n} and {self.batch_size}")
        if self.sampled and self.n is None:
            raise ValueError("--n is needed: how many images to sample")
        unused = (ModelSource(), Sampling(seed=self.sampling.seed), Speed())
        if not self.sampled and (self.model, self.sampling, self.speed) != unused:
            raise ValueError(
                "options of a model, of its sampler and of its speed go with a model to sample from: give --run"
            )

    @property
    def sampled(self) -> bool:
        """Whether a model is named to sample from."""
        return (self.model.run, self.model.base, self.model.ckpt) != (None, None, None)

    def load(self, channels: int, device: str = "auto") -> ImageSet:
        """Load the images, or the model that they are sampled from as they are read.

        Args:
            channels: of picture files, 1 or 3.
            device: where a model runs.

        Raises:
            ValueError: if there are fewer images than --n.
        """
        from pathlib import Path

        from ldm.data.pictures import read_names
        from ldm.pipelines.images import Chosen, positions_of

        source = self._load_all(channels, device)
        if self.keep is not None:
            lines = read_names(Path(self.keep).read_bytes(), self.keep)
            source = Chosen(source, positions_of(source, lines), f"those of {self.keep}")
        if self.n is not None and self.n > len(source):
            raise ValueError(f"--n {self.n}: there are {len(source)} images")
        if self.n is not None and self.n < len(source):
            source = Chosen(source, range(self.n), f"the first {self.n}")
        return source

    def _load_all(self, channels: int, device: str) -> ImageSet:
        from ldm.data.own import build_dataset
        from ldm.pipelines.images import DataSetImages, SampledImages, load_images
        from ldm.training.data_words import read_data_config

        if self.images is not None:
            return load_images(self.images, channels, self.image_size)
        if self.data is not None:
            config = read_data_config(self.data)
            return DataSetImages(build_dataset(config), config)
        assert self.n is not None
        return SampledImages(self.model.load(self.sampling, self.speed, device), self.n)


@dataclass(frozen=True)
class FeatureChoice:
    """The network whose features stand for the images."""

    acts_with: ClassVar[Mapping[str, str]] = {"features_params": "features"}

    features: Annotated[str | None, option(metavar="NAME", default="the reference's")] = None
    """inception, clip, classifier, or a dotted target."""
    weights: Annotated[str | None, option(metavar="FILE", default="the reference's, or the published ones")] = None
    """Its weights."""
    features_params: Annotated[tuple[str, ...], option(metavar="A=B ...", default="none")] = ()
    """Its keywords."""
    channels: Literal[1, 3] = 3
    """Channels of the images that a dotted target takes."""

    def load(self, made: Mapping[str, Any] | None = None) -> Extractor:
        """Load the network; `made` says how the features of the reference were made."""
        from omegaconf import OmegaConf

        from ldm.experiments.image_metrics import choose_extractor

        params: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(self.features_params)))
        return choose_extractor(self.features, self.weights, params, self.channels, made)
