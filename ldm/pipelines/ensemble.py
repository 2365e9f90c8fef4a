"""EnsemblePipeline: the samples of an ensemble's members, and what the members' disagreement says (DECU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ldm.pipelines.branching import BranchingPipeline
from ldm.pipelines.information import InformationPlan, measure_classes, measure_pixels
from ldm.pipelines.noise_levels import make_noise_level
from ldm.settings import Branching
from ldm.uncertainty.channel import NoiseLevel
from ldm.uncertainty.information import Scale
from ldm.uncertainty.quantities import Estimator
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
            plan: further fields of `InformationPlan`: estimator, width, most, curve, diversity, lpips, keep, compared;
                and `noise`, with which numbers of different models compare: see `make_plan`.

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

    def make_plan(
        self,
        n: int | None = None,
        compared: str | None = None,
        noise: float | None = None,
        data_sd: float | None = None,
        **plan: Any,
    ) -> InformationPlan:
        """Make a plan of what is measured; `n` and `compared` come from the config's `uncertainty` where None.

        Args:
            noise: see what is compared through white noise of this many standard deviations of the data, root mean
                square over its elements: PaiDE is then an upper bound (with the distance bhattacharyya a lower one)
                in a unit that models of pixels and of latents have in common. Images are compared where `compared` is
                None.
            data_sd: the standard deviation of the data; measured on samples of the base model where None.
            plan: further fields of `InformationPlan`.

        Raises:
            ValueError: for values that do not fit together.
        """
        made = InformationPlan(n=self.setting("n", 10) if n is None else n, **plan)
        if noise is not None:
            return self._see_through(made, noise, compared or "image", data_sd)
        if data_sd is not None:
            raise ValueError("data_sd is the unit of noise: give noise, too")
        if compared is None:
            compared = self.setting("distance_of", "state") if made.estimator.distance == "wasserstein" else "state"
        return replace(made, compared=compared)

    def _see_through(
        self, plan: InformationPlan, noise: float, compared: str, data_sd: float | None
    ) -> InformationPlan:
        """Return a plan with noise; what is not given of the estimator is that of an upper bound."""
        given = Estimator("kl") if plan.estimator == Estimator() else plan.estimator
        # Before samples are drawn for the unit: values that do not fit are refused.
        replace(plan, compared=compared, estimator=replace(given, noise=NoiseLevel(noise, data_sd or 1.0, 1)))
        level = make_noise_level(self, noise, compared, data_sd)
        return replace(plan, compared=compared, estimator=replace(given, noise=level))

    def pixel_information(
        self,
        classes: Sequence[int | str] | None = None,
        n: int = 1,
        *,
        spaces: Sequence[str] = ("image",),
        scale: Scale = "sum",
        joint: bool = True,
        noise: float | None = None,
    ) -> PixelInformation:
        """Measure the mutual information between each pixel of the final sample and the members, in nats.

        Args:
            classes: numbers or names; up to ten, spread over the numbers of images per class, where None.
            n: noises of a class.
            spaces: `image`, `latent`, or both.
            scale: of the squared distances over a pixel's channels: sum, mean, or a factor on the sum.
            joint: a pixel's channels are one event; else channel by channel and averaged, as published.
            noise: see the pixels through noise of this many standard deviations of the data, in place of a scale.

        Raises:
            ValueError: for a class that the model does not have, several branch points, or noise with a scale.
        """
        labels = self.choose_classes(classes, 10)
        found = list(measure_pixels(self, labels, n, spaces=spaces, scale=scale, joint=joint, noise=noise))
        return PixelInformation.stack(labels, found)
