"""Values that commands share: the pictures that a model is conditioned on, in place of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from ldm.options import option

if TYPE_CHECKING:
    from ldm.pipelines.base import Pipeline

_P = TypeVar("_P", bound="Pipeline")


@dataclass(frozen=True)
class PictureConditions:
    """Pictures in place of classes, of a model that is conditioned on them (inpainting, super-resolution)."""

    pictures: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """A folder of pictures: the k-th in the order of their names is class k. NAME_mask.png is the mask of NAME.png."""
    picture_masks: Annotated[str | None, option(metavar="DIR", default="those beside the pictures")] = None
    """A folder of masks under the pictures' names, white in the hole."""
    picture_size: Annotated[int | None, option(metavar="PIXELS", default="as they are")] = None
    """Scale the shortest side of pictures and masks to this, and cut to the middle."""

    def __post_init__(self) -> None:
        if self.pictures is None and (self.picture_masks is not None or self.picture_size is not None):
            raise ValueError("--picture_masks and --picture_size go with --pictures")

    def give(self, pipeline: _P) -> _P:
        """Return a pipeline whose classes are the pictures; the same where there are none."""
        if self.pictures is None:
            return pipeline
        from ldm.pipelines.pictures import read_pictures_for, with_pictures

        return with_pictures(
            pipeline, read_pictures_for(pipeline, self.pictures, self.picture_masks, self.picture_size)
        )
