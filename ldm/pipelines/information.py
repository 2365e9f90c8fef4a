"""Measure an ensemble class by class, until the intervals are narrow; and pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.transition import Step
from ldm.evaluation.diversity import pairwise_lpips, pairwise_ssim
from ldm.modules.distributions.gaussian import Gaussian
from ldm.modules.losses import LPIPS
from ldm.pipelines.branching import BranchingPipeline
from ldm.pipelines.noise_levels import count_elements, find_pixel_factor
from ldm.uncertainty.information import Scale
from ldm.uncertainty.quantities import Estimator, Quantities, compare_groups, compute_quantities, pixel_maps, step_curve
from ldm.uncertainty.results import ClassInformation

# States after a step lie apart with the step's length; predicted x0 do not: so a flow's few long steps and a
# diffusion's many short ones compare, and the number of steps does not matter. Images of models of pixels and of
# latents compare as well.
COMPARED: dict[str, Callable[[BranchingPipeline, Step], Gaussian]] = {
    "state": lambda _, step: step.distribution,
    "x0": lambda _, step: Gaussian(step.x0),
    "image": lambda pipeline, step: Gaussian(pipeline.decode(step.x0)),
}


@dataclass(frozen=True)
class InformationPlan:
    """What is measured of a class, over how many noises.

    Attributes:
        estimator: distance between members and its scale.
        n: noises of a class; with `width`, noises of one round.
        width: add rounds until the 95 % interval of the class's mean is at most this wide (nats) ...
        most: ... or this many noises were used.
        curve: sample to the end, for the mutual information of every step.
        diversity: sample to the end, for the similarity of the members' pictures.
        lpips: with `diversity`, the network of their learned perceptual distance as well.
        keep: keep latents and distances.
        compared: what the members' distances are between, one of `COMPARED`: the states after the step, their
            predicted x0, or the images of these.

    Raises:
        ValueError: for an unknown `compared`, or values that do not fit together.
    """

    estimator: Estimator = field(default_factory=Estimator)
    n: int = 10
    width: float | None = None
    most: int = 100
    curve: bool = False
    diversity: bool = False
    lpips: LPIPS | None = None
    keep: bool = False
    compared: str = "state"

    def __post_init__(self) -> None:
        if self.compared not in COMPARED:
            raise ValueError(f"distances are between one of {sorted(COMPARED)}, got '{self.compared}'")
        noise = self.estimator.noise
        if self.compared != "state" and noise is None and self.estimator.distance != "wasserstein":
            raise ValueError(
                f"the distance {self.estimator.distance} needs variances, which predicted x0 have not: take the "
                "states (distance_of state), noise to see them through, or the distance wasserstein"
            )
        if self.compared == "state" and noise is not None:
            raise ValueError(
                "states lie apart with the length of the step, so that noise in units of the data says nothing of "
                "them: compare the predicted x0 or their images (distance_of x0 or image)"
            )
        if self.n < 1 or (self.width is not None and (self.width <= 0 or self.n < 2 or self.most < self.n)):
            raise ValueError(
                f"expected n >= 1, and with ci_width > 0 also n >= 2 and max_n >= n; got n {self.n}, ci_width "
                f"{self.width}, max_n {self.most}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what the results of a class depend on, for records."""
        stop = {} if self.width is None else {"ci_width": self.width, "max_n": self.most}
        parts = {
            "curve": self.curve,
            "diversity": self.diversity,
            "lpips": self.lpips is not None,
            "kept": self.keep,
        }
        return {
            "n": self.n,
            **stop,
            "distance": self.estimator.distance,
            "distance_scale": self.estimator.scale,
            **({"distance_of": self.compared} if self.compared != "state" else {}),
            **({} if self.estimator.noise is None else self.estimator.noise.describe()),
            **{name: value for name, value in parts.items() if value},
        }

    def meaning(self, pipeline: BranchingPipeline) -> str:
        """Return what the nats are, in a sentence."""
        return self.estimator.meaning(count_elements(pipeline, self.compared == "image"))

    def done(self, measured: ClassInformation) -> bool:
        """Return whether a class needs no more noises."""
        if self.width is None or len(measured.mi) >= self.most:
            return True
        return measured.width <= self.width

    def round_end(self, used: int) -> int:
        """Return the number of noises after one more round."""
        return used + self.n if self.width is None else min(used + self.n, self.most)


def measure_round(
    pipeline: BranchingPipeline, labels: Sequence[int], noises: Sequence[int], plan: InformationPlan
) -> list[ClassInformation]:
    """Measure classes of the same bases on the same noises, in one batch; one value a class, on the CPU."""
    bases = pipeline.bases(labels[0])
    each = [label for label in labels for _ in noises]
    steps = pipeline.branched_steps(each, list(noises) * len(labels), bases)
    split = (len(labels), len(noises), len(bases))
    compare = COMPARED[plan.compared]
    first = next(steps)
    found = compute_quantities(compare(pipeline, first), plan.estimator)
    curve = [found.mi]
    samples = first.x_next
    if plan.curve or plan.diversity or plan.keep:
        for step in steps:
            samples = step.x_next
            if plan.curve:
                curve += step_curve([compare(pipeline, step)], plan.estimator)
    results = []
    for place, label in enumerate(labels):
        # [.., L n K] -> [.., n, K] of this class
        own = {name: value.unflatten(-1, split)[..., place, :, :] for name, value in asdict(found).items()}
        lines = torch.stack(curve).unflatten(-1, split)[:, place].mean(-1) if plan.curve else None
        latents = samples.unflatten(1, split)[:, place]  # [M, n, K, c, h, w]
        results.append(_summarise(pipeline, label, Quantities(**own), latents, lines, plan))
    return results


def _summarise(
    pipeline: BranchingPipeline,
    label: int,
    found: Quantities,
    latents: Tensor,
    curve: Tensor | None,
    plan: InformationPlan,
) -> ClassInformation:
    """Average a class's quantities [n, K] over the bases, compare its groups of members, measure its pictures."""
    more: dict[str, Any] = {"curve": curve}
    groups = pipeline.classes.groups(label) if pipeline.classes.masked else None
    if groups is not None:
        parts = compare_groups(found.distances, groups.certain, groups.uncertain)
        more.update({name: value.mean(-1) for name, value in asdict(parts).items()})
    if plan.diversity:
        more.update(_diversity(pipeline, latents, plan.lpips))
    if plan.keep:
        more["latents"] = latents[:, :, 0]
        more["distances"] = found.distances[..., 0]
    kept: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in more.items()}
    return ClassInformation(
        label,
        mi=found.mi.mean(-1).cpu(),
        mi_by_base=found.mi.T.cpu(),
        mean_pairwise_distance=found.mean_pairwise_distance.mean(-1).cpu(),
        epistemic_variance=found.epistemic_variance.mean(-1).cpu(),
        aleatoric_variance=found.aleatoric_variance.mean(-1).cpu(),
        **kept,
    )


def _diversity(pipeline: BranchingPipeline, latents: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    """Return the similarity [n] of the members' pictures of latents [M, n, K, c, h, w], means over the bases."""
    pictures = pipeline.decode(latents.flatten(1, 2)).to(pipeline.device)
    split = latents.shape[1:3]
    found = {"ssim": pairwise_ssim(pictures).unflatten(0, split).mean(-1)}
    if lpips is not None:
        found["lpips"] = pairwise_lpips(pictures, lpips).unflatten(0, split).mean(-1)
    return found


def measure_classes(
    pipeline: BranchingPipeline, labels: Sequence[int], plan: InformationPlan, at_once: int | None = None
) -> Iterator[ClassInformation]:
    """Yield what was measured of each class as it is finished.

    Noise i of a class is noise i of the seed, the same for all classes, whatever the batch and the number of noises.

    Args:
        at_once: classes that are held together; as many as fill a pass of the network where None.
    """
    for places in pipeline.by_bases(labels):
        batch = [labels[place] for place in places]
        copies = plan.n * max(pipeline.members, len(pipeline.bases(batch[0])))
        together = at_once or pipeline.images_at_once(copies)
        for start in range(0, len(batch), together):
            yield from _measure_batch(pipeline, batch[start : start + together], plan)


def _measure_batch(
    pipeline: BranchingPipeline, labels: Sequence[int], plan: InformationPlan
) -> Iterator[ClassInformation]:
    """Measure some classes round by round, and yield each as soon as it needs no more noises."""
    pending = list(labels)
    results: dict[int, ClassInformation] = {}
    used = 0
    while pending:
        stop = plan.round_end(used)
        for found in measure_round(pipeline, pending, range(used, stop), plan):
            earlier = results.get(found.label)
            joined = found if earlier is None else earlier.join(found)
            looks = 0 if plan.width is None else joined.looks + 1
            results[found.label] = replace(joined, looks=looks)
        used = stop
        finished = [label for label in pending if plan.done(results[label])]
        pending = [label for label in pending if label not in finished]
        yield from (results.pop(label) for label in finished)


SPACES: Mapping[str, str] = {"image": "decoded images in [0, 1]", "latent": "final latents"}


def measure_pixels(
    pipeline: BranchingPipeline,
    labels: Sequence[int],
    n: int,
    *,
    spaces: Sequence[str] = ("image",),
    scale: Scale = "sum",
    joint: bool = True,
    noise: float | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield of each class images [n, C, H, W] of its first base member, and maps [n, h, w] in each space.

    Maps are mutual information between a pixel of the final sample and the member in nats, means over the bases.

    Args:
        n: noises of a class.
        spaces: of `SPACES`.
        scale: of the squared distances over a pixel's channels: sum, mean, or a factor on the sum.
        joint: a pixel's channels are one event; else channel by channel and averaged, as published.
        noise: see the pixels through noise of this many standard deviations of the data, in place of a scale.

    Raises:
        ValueError: for noise together with a scale.
    """
    if noise is not None and scale != "sum":
        raise ValueError(f"noise of {noise:g} standard deviations decides the scale of the distances; got also {scale}")
    scales = {space: scale if noise is None else find_pixel_factor(pipeline, noise, space, joint) for space in spaces}
    most = max(len(pipeline.bases(label)) for label in labels)
    together = pipeline.images_at_once(n * pipeline.members * most)
    for first in range(0, len(labels), together):
        batch = labels[first : first + together]
        each = [label for label in batch for _ in range(n)]
        latents = pipeline.member_latents(each, list(range(n)) * len(batch))
        for label, own in zip(batch, latents.split(n, 1), strict=True):  # own [M, n, K, c, h, w]
            decoded = pipeline.decode(own)
            values = {"image": (decoded + 1) / 2, "latent": own}
            maps = {space: pixel_maps(values[space], scales[space], joint).mean(1).cpu() for space in spaces}
            yield decoded[pipeline.bases(label)[0], :, 0], maps
