"""What is asked when samples are attributed: outputs along their walks, and the images of a posterior's fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.own import build_dataset
from ldm.files import read_mapping
from ldm.laplace import LastLayerLaplace
from ldm.laplace.attribution import Attribution, Question, Refit, attribute_images, image_rows, remove_rows
from ldm.laplace.layer import LastLayer
from ldm.pipelines.laplace import chosen_positions, observations
from ldm.pipelines.posterior import PosteriorPipeline
from ldm.trust import accept
from ldm.uncertainty.propagation import path_weight


class Walk(NamedTuple):
    """A sample's walk: what its outputs multiply with the last layer's parameters, and where it ends.

    Attributes:
        patches: [S, P, K] float64, of S steps, each times the root of the step's weight in `path`.
        end: the sample's state at the end [c, h, w].
        features: what the last layer takes at the last of these steps, whose shape lays out maps.
    """

    patches: Tensor
    end: Tensor
    features: Tensor

    def question(self, places: Tensor | None = None) -> Question:
        """Return all outputs of the walk as one question, or those of some of its P places."""
        patches = self.patches if places is None else self.patches[:, places]
        return Question(patches.flatten(0, 1))

    def find_place(self, layer: LastLayer, pixel: tuple[int, int]) -> Tensor:
        """Return the place [1] among P whose outputs a pixel (row, column) is one of.

        Raises:
            ValueError: for a pixel that the outputs do not have.
        """
        numbers = torch.arange(self.patches.shape[1], dtype=torch.float64, device=self.features.device)
        laid_out = layer.as_output(numbers[None, :, None], self.features[None])[0, 0]
        if not all(0 <= place < size for place, size in zip(pixel, laid_out.shape, strict=True)):
            rows, columns = laid_out.shape
            raise ValueError(
                f"--pixel {pixel[0]} {pixel[1]}: the model's outputs have rows 0 to {rows - 1} and columns 0 to "
                f"{columns - 1}"
            )
        return laid_out[pixel].long()[None]


@torch.no_grad()
def walk_samples(
    posterior: PosteriorPipeline,
    labels: Sequence[int] | None,
    images: Sequence[int],
    steps: Sequence[int] = (),
) -> list[Walk]:
    """Walk the plain sampler of some images, and keep what the last layer takes at its steps.

    The weights of the steps are those of the method `path`, so that the sum of variances over a walk is that method's
    integral over the sample's trajectory.

    Args:
        labels: classes [B], None for an unconditional model.
        images: numbers [B], which name the noise.
        steps: indices of the steps to ask about, 0 the noisiest; all where empty.

    Raises:
        ValueError: for a step that the walk does not have.
    """
    count = len(posterior.pipeline.times) - 1
    wrong = [step for step in steps if not 0 <= step < count]
    if wrong:
        raise ValueError(f"the trajectory has steps 0 to {count - 1}, got {', '.join(map(str, wrong))}")
    denoiser = posterior.predictive(labels)
    layer = posterior.laplace.layer
    kept = []
    for number, step in enumerate(posterior.plain(labels, images)):
        if not steps or number in steps:
            features = denoiser.features(step.x, float(step.u))
            patches = layer.patches(features).double()
            weight = path_weight(denoiser, step.u, step.transition.s, patches)
            kept.append(weight.clamp(min=0).sqrt() * patches)
        end = step.x_next
    return [Walk(*each) for each in zip(torch.stack(kept, 1), end, features, strict=True)]


@dataclass(frozen=True)
class FittedImages:
    """The images that a posterior was fitted to, as its record says.

    Attributes:
        data: the data set.
        positions: of the images that were seen, in the order of the fit.
        seed: of their draws.
    """

    laplace: LastLayerLaplace
    data: Dataset
    positions: Sequence[int]
    seed: int

    @classmethod
    def read(cls, folder: str | Path, laplace: LastLayerLaplace, data: Any = None) -> FittedImages:
        """Read the record of a posterior's folder, and build its data set.

        Args:
            data: the config of the data set, in place of the record's.

        Raises:
            ValueError: of posteriors that were merged, and where the data set does not have the images.
        """
        file = Path(folder) / "laplace.yaml"
        record = accept(read_mapping(file, "a posterior's record", "fit it again", ("record",)), file)["record"]
        config = record.get("data") if data is None else data
        if not config or "merged" in config:
            raise ValueError(f"{file} names no data set of its own (it was merged): fit to all images in one call")
        built = build_dataset(config)
        seen = int(laplace.fitted().images)
        seed = int(record["seed"])
        if len(built) < seen:  # type: ignore[arg-type]
            raise ValueError(f"the posterior was fitted to {seen} images, and these data hold {len(built)}")  # type: ignore[arg-type]
        return cls(laplace, built, chosen_positions(len(built), seen, seed), seed)  # type: ignore[arg-type]

    def pictures(self) -> NDArray[np.float64]:
        """Return the images that were seen [G, H, W, C] in [-1, 1]."""
        return np.stack([np.asarray(self.data[position]["image"], dtype=np.float64) for position in self.positions])

    def count_shared(self, other: Dataset, positions: Sequence[int]) -> int:
        """Return how many images of another data set are, pixel by pixel, among those that were seen."""
        asked = [np.asarray(other[position]["image"]).tobytes() for position in positions]
        wanted = set(asked)
        seen = {content for place in self.positions if (content := self._read_bytes(place)) in wanted}
        return sum(each in seen for each in asked)

    def _read_bytes(self, position: int) -> bytes:
        return np.asarray(self.data[position]["image"]).tobytes()

    def labels(self) -> list[int] | None:
        """Return the class of each image that was seen; None of data without classes."""
        items = [self.data[position] for position in self.positions]
        if not items or "class_label" not in items[0]:
            return None
        return [int(item["class_label"]) for item in items]

    def attribute(
        self, posterior: PosteriorPipeline, asked: Sequence[Question], groups: dict[str, list[int]], batch_size: int
    ) -> tuple[Attribution, Attribution]:
        """Attribute the outputs of questions to every image and every group; see `attribute_images`."""
        batches = self.observe(posterior, self.positions, batch_size)
        return attribute_images(Refit.of(self.laplace), batches, asked, groups, self.positions)

    def map_image(self, posterior: PosteriorPipeline, walk: Walk, position: int) -> tuple[Tensor, Tensor]:
        """Map what one image carries of a walk: change of the mean [c, h, w], rise of the variance [c, h, w].

        The change is the root of the sum of squares over steps, with the sign of the last step's; the rise is summed.
        """
        refit = Refit.of(self.laplace)
        (rows,) = image_rows(refit, self.observe(posterior, [position], 1))
        moved, risen = remove_rows(*rows).maps(refit, walk.patches.flatten(0, 1))
        steps, places = walk.patches.shape[:2]
        layer = self.laplace.layer
        like = walk.features[None]
        moved = moved.unflatten(0, (steps, places))
        change = moved.square().sum(0).sqrt() * moved[-1].sign()
        rise = risen.unflatten(0, (steps, places)).sum(0)[:, None]
        return layer.as_output(change[None], like)[0], layer.as_output(rise[None], like)[0]

    def observe(self, posterior: PosteriorPipeline, positions: Sequence[int], batch_size: int) -> Any:
        """Return the rows of images, as the fit drew them."""
        draws = self.laplace.repeats
        model = posterior.pipeline.model
        return observations(model, self.data, positions, draws=draws, seed=self.seed, batch_size=batch_size)
