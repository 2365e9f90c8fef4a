"""Pictures as conditions, made of the images themselves: transforms of a data set that add entries to its items.

Each is named as a data set's `transform` (`target`/`params`), draws from the item's generator, and so differs between
epochs and not between runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Hole:
    """A rectangle that is cut out of an image: adds `masked_image` [H, W, C] and `mask` [H, W, 1].

    As in latent-diffusion's inpainting, the mask is 1 in the hole and -1 outside, and the image -1 in the hole.

    Args:
        smallest, largest: height and width of the hole as shares of the image's, drawn evenly and apart.

    Raises:
        ValueError: unless 0 < smallest <= largest <= 1.
    """

    def __init__(self, smallest: float = 0.25, largest: float = 0.75):
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"shares of a hole must be 0 < smallest <= largest <= 1, got {smallest} and {largest}")
        self.smallest = smallest
        self.largest = largest

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image [H, W, C] as it is, and what it was cut to."""
        draws = torch.rand(4, generator=generator).tolist()
        rows = self._span(image.shape[0], draws[0], draws[1])
        columns = self._span(image.shape[1], draws[2], draws[3])
        mask = image.new_full((*image.shape[:2], 1), -1.0)
        mask[rows, columns] = 1.0
        return image, {"masked_image": torch.where(mask > 0, -1.0, image), "mask": mask}

    def _span(self, size: int, share: float, place: float) -> slice:
        length = max(1, round(size * (self.smallest + share * (self.largest - self.smallest))))
        first = min(int(place * (size - length + 1)), size - length)
        return slice(first, first + length)


class LowResolution:
    """The image made smaller by averaging, as the condition of super-resolution: adds `LR_image` [H / f, W / f, C].

    Args:
        factor: f.
    """

    def __init__(self, factor: int = 4):
        self.factor = factor

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image [H, W, C] as it is, and its small copy.

        Raises:
            ValueError: if the image does not divide by the factor.
        """
        if any(size % self.factor for size in image.shape[:2]):
            raise ValueError(f"an image of {tuple(image.shape[:2])} does not divide by a factor of {self.factor}")
        small = F.avg_pool2d(image.movedim(-1, 0), self.factor).movedim(0, -1)
        return image, {"LR_image": small.contiguous()}
