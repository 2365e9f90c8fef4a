"""A list of pictures to condition on, with their masks, read from folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.base import Crop, to_signed
from ldm.data.pictures import Files, read_picture
from ldm.util import ImageSize, generator, read_image_size

MASK_ENDING = "_mask"


@dataclass(frozen=True)
class PictureList:
    """Pictures of one size by name, and where they have holes.

    Args:
        names: of the pictures [P], without endings.
        pictures: [P, C, H, W] in [-1, 1], whole: what is under a hole is not taken out yet.
        masks: [P, 1, H, W], 1 in a hole and -1 outside; None: there are none.

    Raises:
        ValueError: if their numbers or sizes differ.
    """

    names: tuple[str, ...]
    pictures: Tensor
    masks: Tensor | None = None

    def __post_init__(self):
        size = self.pictures.shape[-2:]
        fits = self.masks is None or (len(self.masks) == len(self.names) and self.masks.shape[-2:] == size)
        if len(self.names) != len(self.pictures) or not fits:
            raise ValueError(
                f"{len(self.names)} pictures [P, C, H, W] need as many masks [P, 1, H, W] of one size, got pictures "
                f"{list(self.pictures.shape)} and masks {None if self.masks is None else list(self.masks.shape)}"
            )

    @property
    def masked(self) -> Tensor:
        """The pictures with -1 in their holes, as a model of inpainting sees them."""
        return self.pictures if self.masks is None else torch.where(self.masks > 0, -1.0, self.pictures)

    def fill_in(self, images: Tensor) -> Tensor:
        """Return the pictures with images [P, C, H, W] in their holes; without masks the images."""
        return images if self.masks is None else torch.where(self.masks > 0, images, self.pictures)

    def one_hot(self, labels: int) -> PictureList:
        """Return label maps, read as grey pictures, with a channel of 0 and 1 for each of so many labels."""
        values = ((self.pictures[:, 0] + 1) * 127.5).round().long()  # [P, H, W]
        if int(values.max()) >= labels:
            raise ValueError(f"label maps of a model of {labels} labels hold values up to {int(values.max())}")
        return replace(self, pictures=F.one_hot(values, labels).movedim(-1, 1).float())


def read_picture_list(
    folder: str | Path, channels: int = 3, size: ImageSize | None = None, masks: str | Path | None = None
) -> PictureList:
    """Read the pictures of a folder, in the order of their names.

    A file `NAME_mask.png` is the mask of `NAME.png`, white in the hole; or it has its picture's name in the folder
    `masks`. A folder that holds one mask and gives `masks` none takes only the pictures that have one.

    Args:
        channels: 1 (grey) or 3 (RGB).
        size: side in pixels, or height and width, that they are scaled to cover and cut to; None: as they are.
        masks: folder of masks.

    Raises:
        ValueError: if there are no pictures, a mask is missing, or the sizes differ.
    """
    names, images, cut = _read_folder(folder, channels, size, masks)
    sizes = sorted({tuple(image.shape[-2:]) for image in (*images, *cut)})
    if len(sizes) > 1:
        raise ValueError(f"pictures and masks of {folder} have several sizes, {sizes[:4]}; choose one to scale them to")
    return PictureList(tuple(names), torch.stack(images), torch.stack(cut) if cut else None)


def read_pictures_apart(folder: str | Path, channels: int = 3) -> list[PictureList]:
    """Read the pictures of a folder that have a mask beside them as lists of one picture each, whatever their sizes.

    Raises:
        ValueError: if there are none, or a mask has another size than its picture.
    """
    names, images, cut = _read_folder(folder, channels, None, None)
    if not cut:
        raise ValueError(f"{folder} holds no masks NAME{MASK_ENDING}.png beside pictures NAME.png")
    return [PictureList((name,), image[None], mask[None]) for name, image, mask in zip(names, images, cut, strict=True)]


def _read_folder(
    folder: str | Path, channels: int, size: ImageSize | None, masks: str | Path | None
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Return names, pictures [C, H, W] and masks [1, H, W] of a folder; see `read_picture_list`."""
    files = Files(folder)
    found = files.images()
    beside = {_stem(name).removesuffix(MASK_ENDING): name for name in found if _stem(name).endswith(MASK_ENDING)}
    pictures = {_stem(name): name for name in found if not _stem(name).endswith(MASK_ENDING)}
    holes: dict[str, str] = {}
    other = files
    if masks is not None:
        other = Files(masks)
        named = {_stem(name).removesuffix(MASK_ENDING): name for name in other.images()}
        lacking = sorted(set(pictures) - set(named))
        if lacking:
            raise ValueError(f"{masks} has no mask of {', '.join(lacking[:5])}: each picture needs one of its name")
        holes = {stem: named[stem] for stem in pictures}
    elif beside:
        pictures = {stem: name for stem, name in pictures.items() if stem in beside}
        holes = {stem: beside[stem] for stem in pictures}
    if not pictures:
        raise ValueError(f"{folder} holds no picture beside its masks")
    images = [_read(files, name, channels, size) for name in pictures.values()]
    cut = [torch.where(_read(other, name, 1, size) > 0, 1.0, -1.0) for name in holes.values()]
    return list(pictures), images, cut


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read(files: Files, name: str, channels: int, size: ImageSize | None) -> Tensor:
    """Read a picture as [C, H, W] in [-1, 1]."""
    sides = None if size is None else read_image_size(size, "size")
    image = to_signed(read_picture(files, name, channels, sides))
    image = image if sides is None else Crop(sides)(image, generator("crop"))
    return image.movedim(-1, 0).contiguous()
