"""Measure where inpainted digits are not known: mutual information in the hole and outside, beside the actual error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.data.conditions import Hole
from ldm.data.digits import Digits
from ldm.data.picture_list import PictureList
from ldm.images import save_figure
from ldm.options import option
from ldm.pipelines import load_ensemble
from ldm.pipelines.information import measure_pixels
from ldm.pipelines.pictures import with_pictures
from ldm.settings import Branching, Sampling
from ldm.stats import spearman
from ldm.util import generator


@dataclass(frozen=True)
class Filled:
    """What was measured of P pictures.

    Attributes:
        given: the pictures and their holes.
        maps: mutual information of each pixel in nats, mean over noises [P, H, W].
        images: fillings of the first member, one a noise [P, n, C, H, W] in [-1, 1].
    """

    given: PictureList
    maps: Tensor
    images: Tensor

    @property
    def inside(self) -> Tensor:
        """Which pixels lie in a hole [P, H, W]."""
        assert self.given.masks is not None
        return self.given.masks[:, 0] > 0

    @property
    def errors(self) -> Tensor:
        """Absolute difference of the mean filling from the digit [P, H, W], of pixels in [-1, 1]."""
        return (self.images.mean(1) - self.given.pictures).abs().mean(1)

    def describe(self) -> dict[str, float]:
        """Return the figures of the study."""
        inside, maps, errors = self.inside, self.maps, self.errors
        each = [(own[hole].mean(), error[hole].mean()) for own, error, hole in zip(maps, errors, inside, strict=True)]
        holes, their_errors = (torch.stack(values).numpy() for values in zip(*each, strict=True))
        spread = self.images.var(1).mean(1)
        return {
            "MI in the hole (nats)": float(maps[inside].mean()),
            "MI outside (nats)": float(maps[~inside].mean()),
            "ratio": float(maps[inside].mean() / maps[~inside].mean()),
            "error in the hole": float(errors[inside].mean()),
            "error outside": float(errors[~inside].mean()),
            "rank correlation of MI with the error, pixels of holes": spearman(maps[inside], errors[inside]),
            "rank correlation of MI with the error, all pixels": spearman(maps.flatten(), errors.flatten()),
            "rank correlation of MI with the error, means of holes": spearman(holes, their_errors),
            "the same of the variance over noises, pixels of holes": spearman(spread[inside], errors[inside]),
        }

    def draw(self, path: Path, shown: int, overwrite: bool) -> None:
        """Draw pictures from the best known hole to the least known one."""
        means = torch.stack([own[hole].mean() for own, hole in zip(self.maps, self.inside, strict=True)])
        chosen = means.argsort()[torch.linspace(0, len(means) - 1, shown).round().long()].tolist()
        top, worst = float(self.maps[chosen].max()), float(self.errors[chosen].max())
        filled = self.given.fill_in(self.images[:, 0])[:, 0]
        rows = (
            ("digit", self.given.pictures[:, 0], "gray", -1.0, 1.0),
            ("what is given", self.given.masked[:, 0], "gray", -1.0, 1.0),
            ("filled in", filled, "gray", -1.0, 1.0),
            ("mutual information\n(nats)", self.maps, "magma", 0.0, top),
            ("error of the mean\nfilling", self.errors, "magma", 0.0, worst),
        )
        figure, grid = plt.subplots(len(rows), shown, figsize=(0.8 * shown, 0.85 * len(rows)), squeeze=False)
        for line, (name, values, colours, low, high) in zip(grid, rows, strict=True):
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            for axes, place in zip(line, chosen, strict=True):
                axes.imshow(values[place].numpy(), cmap=colours, vmin=low, vmax=high)
                axes.set(xticks=[], yticks=[])
                y, x = np.nonzero(self.inside[place].numpy())
                corner = (x.min() - 0.5, y.min() - 0.5)
                axes.add_patch(Rectangle(corner, np.ptp(x) + 1, np.ptp(y) + 1, fill=False, ec="tab:cyan", lw=1))
        figure.subplots_adjust(wspace=0.06, hspace=0.06)
        save_figure(figure, path, overwrite)
        plt.close(figure)


def cut_digits(count: int, share: float) -> PictureList:
    """Return test digits with a square hole each, `share` of their side wide."""
    data = Digits(split="test")
    order = torch.randperm(len(data), generator=generator("inpainting study"))[:count].tolist()
    images = [data[index]["image"] for index in order]
    cut = [Hole(share, share)(image, generator("hole", number))[1] for number, image in enumerate(images)]
    masks = torch.stack([one["mask"] for one in cut]).movedim(-1, 1)
    return PictureList(tuple(map(str, order)), torch.stack(images).movedim(-1, 1), masks)


@dataclass(frozen=True)
class InpaintedDigits:
    """Fill in holes of test digits by an ensemble, and compare what it does not know with the error it makes."""

    default_steps: ClassVar[int] = 10
    default_scale: ClassVar[float] = 1.0

    path: str
    """The ensemble."""
    n: int = 60
    """Digits."""
    noises: int = 3
    """Noises of a digit."""
    hole: float = 0.5
    """Side of the hole, as a share of the digit's."""
    steps: int = 10
    """Steps of DDIM; the members branch at the first."""
    out: Annotated[str | None, option(metavar="PNG", default="none is drawn")] = None
    """A picture of twelve of them."""
    overwrite: bool = False
    """Replace the picture where it exists."""
    place: Placement = Placement()

    def run(self) -> dict[str, float]:
        """Measure, print and draw; return the figures."""
        given = cut_digits(self.n, self.hole)
        pipeline = load_ensemble(self.path, Sampling(steps=self.steps), Branching(step=0), device=self.place.device)
        pipeline = with_pictures(pipeline, given)
        measured = list(measure_pixels(pipeline, list(range(self.n)), self.noises))
        maps = torch.stack([found["image"].mean(0) for _, found in measured])
        filled = Filled(given, maps, torch.stack([images for images, _ in measured]))
        for name, value in filled.describe().items():
            print(f"{name:58s} {value:.4g}")
        if self.out is not None:
            filled.draw(Path(self.out), min(12, self.n), self.overwrite)
        return filled.describe()


if __name__ == "__main__":
    run_file(InpaintedDigits)
