"""Values that commands share: the pictures that a model is conditioned on, in place of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from ldm.options import option

if TYPE_CHECKING:
    from ldm.pipelines import ModelPipeline

_P = TypeVar("_P", bound="ModelPipeline")


@dataclass(frozen=True)
class PictureConditions:
    """Pictures in place of classes, of a model that is conditioned on them (inpainting, super-resolution)."""

    pictures: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """A folder of pictures: the k-th in the order of their names is class k. NAME_mask.png is the mask of NAME.png."""
    picture_masks: Annotated[str | None, option(metavar="DIR", default="those beside the pictures")] = None
    """A folder of masks under the pictures' names, white in the hole."""
    picture_size: Annotated[int | tuple[int, int] | None, option(metavar="SIDE|H W", default="as they are")] = None
    """Scale pictures and masks to cover this side, or height and width, and cut to the middle."""
    picture_classes: Annotated[tuple[int | str, ...], option(metavar="CLASS ...", default="all classes")] = ()
    """Of a model that takes a class beside a picture: these with each picture; a pair is then a class of its own."""

    def __post_init__(self) -> None:
        others = (self.picture_masks, self.picture_size, self.picture_classes or None)
        if self.pictures is None and any(one is not None for one in others):
            raise ValueError("--picture_masks, --picture_size and --picture_classes go with --pictures")

    def give(self, pipeline: _P) -> _P:
        """Return a pipeline whose classes are the pictures; the same where there are none."""
        if self.pictures is None:
            return pipeline
        from ldm.pipelines.pictures import read_pictures_for, with_pictures

        pictures = read_pictures_for(pipeline, self.pictures, self.picture_masks, self.picture_size)
        return with_pictures(pipeline, pictures, self.picture_classes or None)
