"""EnsemblePipeline: the samples of an ensemble's members, and what the members' disagreement says (DECU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ldm.pipelines.branching import BranchingPipeline
from ldm.pipelines.information import InformationPlan, measure_classes, measure_pixels
from ldm.settings import Branching
from ldm.uncertainty.information import Scale
from ldm.uncertainty.results import Information, PixelInformation


@dataclass(frozen=True)
class EnsemblePipeline(BranchingPipeline):
    """An ensemble with its base model, and the values that say how it is sampled; `ldm.load_ensemble` makes one."""

    def sample(self, classes: Sequence[int | str] | None = None, n: int = 1) -> Tensor:
        """Return images [M, B, C, H, W] in [-1, 1] of every member on the CPU, `n` of each class.

        The members branch where `branching` says; the first base member samples up to there.

        Args:
            classes: numbers or names; up to ten, spread over the numbers of images per class, where None.
            n: images of a class, B = n times the number of classes. The k-th has the noise of image k.

        Raises:
            ValueError: for a class that the model does not have.
        """
        labels = self.choose_classes(classes, 10)
        each = [label for label in labels for _ in range(n)]
        return self.decode(self.member_latents(each, list(range(n)) * len(labels))[:, :, 0])

    def information(
        self,
        classes: Sequence[int | str] | None = None,
        n: int | None = None,
        branching: Branching | None = None,
        **plan: Any,
    ) -> Information:
        """Measure the mutual information between a sample after the branch and the members, in nats (DECU, section 4).

        Args:
            classes: numbers or names; all classes where None.
            n: noises of a class; the config's `uncertainty.n`, or 10, where None.
            branching: where the members branch, in place of this pipeline's.
            plan: further fields of `InformationPlan`: estimator, width, most, curve, diversity, lpips, keep, compared.

        Returns:
            `mi` [classes, n], its mean and interval for each class, and all else that was measured.

        Raises:
            ValueError: for a class that the model does not have, several branch points, or values that do not fit.
        """
        pipeline = self if branching is None else self.with_(branching=branching)
        labels = pipeline.choose_classes(classes)
        chosen = pipeline.make_plan(n=n, **plan)
        found = {result.label: result for result in measure_classes(pipeline, labels, chosen)}
        names = tuple(pipeline.classes.name(label) for label in labels)
        return Information(tuple(found[label] for label in labels), names)

    def make_plan(self, n: int | None = None, compared: str | None = None, **plan: Any) -> InformationPlan:
        """Make a plan of what is measured; `n` and `compared` come from the config's `uncertainty` where None."""
        made = InformationPlan(n=self.setting("n", 10) if n is None else n, **plan)
        if compared is None:
            compared = self.setting("distance_of", "state") if made.estimator.distance == "wasserstein" else "state"
        return replace(made, compared=compared)

    def pixel_information(
        self,
        classes: Sequence[int | str] | None = None,
        n: int = 1,
        *,
        spaces: Sequence[str] = ("image",),
        scale: Scale = "sum",
        joint: bool = True,
    ) -> PixelInformation:
        """Measure the mutual information between each pixel of the final sample and the members, in nats.

        Args:
            classes: numbers or names; up to ten, spread over the numbers of images per class, where None.
            n: noises of a class.
            spaces: `image`, `latent`, or both.
            scale: of the squared distances over a pixel's channels: sum, mean, or a factor on the sum.
            joint: a pixel's channels are one event; else channel by channel and averaged, as published.

        Raises:
            ValueError: for a class that the model does not have, or several branch points.
        """
        labels = self.choose_classes(classes, 10)
        found = list(measure_pixels(self, labels, n, spaces=spaces, scale=scale, joint=joint))
        return PixelInformation.stack(labels, found)
