"""Measure an ensemble class by class: quantities, step curve, diversity, until the interval is narrow enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.samplers import Step
from ldm.evaluation.diversity import pairwise_lpips, pairwise_ssim
from ldm.modules.distributions.gaussian import Gaussian
from ldm.modules.losses import LPIPS
from ldm.pipelines import EnsemblePipeline
from ldm.stats import mean_interval
from ldm.uncertainty.quantities import Estimator, group_quantities, quantities, step_curve

# Kept samples have their noises on this axis; everything else on the last.
LATENTS, MEMBER_DISTANCES, NOISE_AXIS = "latents", "distances", 1

# States after a step lie apart with the step's length; the predicted x0 do not: so a flow's few long steps and
# a diffusion's many short ones compare, and the number of steps does not matter.
OBJECTS: dict[str, Callable[[Step], Gaussian]] = {
    "state": lambda step: step.distribution,
    "x0": lambda step: Gaussian(step.x0),
}


@dataclass(frozen=True)
class Plan:
    """What is measured of a class, over how many noises.

    Attributes:
        estimator: distance between members and its scale.
        n: noises of a class; with `width`, noises of one round.
        width: add rounds until the 95 % interval of the class's mean is at most this wide (nats) ...
        most: ... or this many noises were used.
        curve, diversity: sample to the end, for the mutual information of every step or the similarity of the pictures.
        lpips: with `diversity`, the network of their learned perceptual distance as well.
        keep: keep latents and distances.
        of: what the members' distances are between, one of `OBJECTS`.
    """

    estimator: Estimator = field(default_factory=Estimator)
    n: int = 10
    width: float | None = None
    most: int = 100
    curve: bool = False
    diversity: bool = False
    lpips: LPIPS | None = None
    keep: bool = False
    of: str = "state"

    def __post_init__(self):
        if self.of not in OBJECTS:
            raise ValueError(f"distances are between one of {sorted(OBJECTS)}, got '{self.of}'")
        if self.of != "state" and self.estimator.distance != "wasserstein":
            raise ValueError(
                f"the distance {self.estimator.distance} needs variances, which predicted x0 have not: take the "
                "states (distance_of state), or the distance wasserstein"
            )
        if self.n < 1 or (self.width is not None and (self.width <= 0 or self.n < 2 or self.most < self.n)):
            raise ValueError(
                f"expected n >= 1, and with ci_width > 0 also n >= 2 and max_n >= n; got n {self.n}, ci_width "
                f"{self.width}, max_n {self.most}"
            )

    def describe(self) -> dict[str, Any]:
        """What the results of a class depend on."""
        stop = {} if self.width is None else {"ci_width": self.width, "max_n": self.most}
        parts = {"curve": self.curve, "diversity": self.diversity, "lpips": self.lpips is not None, "kept": self.keep}
        return {
            "n": self.n,
            **stop,
            "distance": self.estimator.distance,
            "distance_scale": self.estimator.scale,
            **({"distance_of": self.of} if self.of != "state" else {}),
            **{name: value for name, value in parts.items() if value},
        }

    def measured(self, step: Step) -> Gaussian:
        """What the distances of a step are between, mean [M, B, ...]."""
        return OBJECTS[self.of](step)

    def done(self, mi: Tensor) -> bool:
        """Whether a class with the mutual informations [n] needs no more noises."""
        if self.width is None or len(mi) >= self.most:
            return True
        return mean_interval(mi.tolist()).width <= self.width


def measure_round(
    pipeline: EnsemblePipeline, labels: Sequence[int], noises: Sequence[int], plan: Plan
) -> list[dict[str, Tensor]]:
    """Measure classes of the same bases on the same noises, in one batch.

    Quantities are averages over the base members: one value a noise, on the last axis. `mi_by_base` [K, n] holds what
    was averaged, `curve` [steps, n] the step curve, `ssim` and `lpips` [n] the similarity of the pictures; `latents`
    [M, n, c, h, w] are samples from the first base, `distances` [M, M, n] those of the branched step.

    Returns:
        One dictionary a class, on the CPU.
    """
    bases = pipeline.bases(labels[0])
    steps = pipeline.parted([label for label in labels for _ in noises], list(noises) * len(labels), bases)
    split = (len(labels), len(noises), len(bases))
    first = next(steps)
    measured = quantities(plan.measured(first), plan.estimator)
    found = {name: value.unflatten(-1, split) for name, value in measured.items()}
    samples = None
    if plan.curve or plan.diversity or plan.keep:
        curve, samples = [found["mi"]], first.x_next
        for step in steps:
            samples = step.x_next
            if plan.curve:
                curve += [mi.unflatten(-1, split) for mi in step_curve([plan.measured(step)], plan.estimator)]
        if plan.curve:
            found["curve"] = torch.stack(curve)
        samples = samples.unflatten(1, split)  # [M, L, n, K, c, h, w]
    return [
        _of_class(
            pipeline, label, place, {name: value[..., place, :, :] for name, value in found.items()}, samples, plan
        )
        for place, label in enumerate(labels)
    ]


def _of_class(
    pipeline: EnsemblePipeline,
    label: int,
    place: int,
    found: Mapping[str, Tensor],
    samples: Tensor | None,
    plan: Plan,
) -> dict[str, Tensor]:
    """A class's quantities: averaged over the bases, its groups of members, its pictures, what is kept."""
    result = {name: value.mean(-1) for name, value in found.items() if name != MEMBER_DISTANCES}
    result["mi_by_base"] = found["mi"].T
    groups = pipeline.groups(label)
    if groups is not None:
        parts = group_quantities(found[MEMBER_DISTANCES], groups.certain, groups.uncertain)
        result.update({name: value.mean(-1) for name, value in parts.items()})
    if plan.diversity:
        own = samples[:, place]  # [M, n, K, c, h, w]
        pictures = pipeline.decode(own.flatten(1, 2)).to(pipeline.device)
        result["ssim"] = pairwise_ssim(pictures).unflatten(0, own.shape[1:3]).mean(-1)
        if plan.lpips is not None:
            result["lpips"] = pairwise_lpips(pictures, plan.lpips).unflatten(0, own.shape[1:3]).mean(-1)
    if plan.keep:
        result[LATENTS], result[MEMBER_DISTANCES] = samples[:, place, :, 0], found[MEMBER_DISTANCES][..., 0]
    return {name: value.cpu() for name, value in result.items()}


def _join(before: Mapping[str, Tensor] | None, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """More noises to a class's results."""
    if before is None:
        return dict(after)
    axes = {name: NOISE_AXIS if name == LATENTS else -1 for name in after}
    return {name: torch.cat([before[name], value], axes[name]) for name, value in after.items()}


def measure_classes(
    pipeline: EnsemblePipeline, labels: Sequence[int], plan: Plan, at_once: int | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (class, results) as each is finished; at most `at_once` classes are held (None: what fills a pass).

    Noise i of a class is noise i of `--seed`, the same for all classes, whatever the batch and the number of noises.
    """
    for places in pipeline.by_bases(labels):
        batch = [labels[place] for place in places]
        copies = plan.n * max(pipeline.members, len(pipeline.bases(batch[0])))
        at_once = at_once or pipeline.images_at_once(copies)
        for start in range(0, len(batch), at_once):
            results: dict[int, dict[str, Tensor]] = {}
            open_labels, used = batch[start : start + at_once], 0
            while open_labels:
                stop = used + plan.n if plan.width is None else min(used + plan.n, plan.most)
                for label, part in zip(
                    open_labels, measure_round(pipeline, open_labels, range(used, stop), plan), strict=True
                ):
                    results[label] = _join(results.get(label), part)
                used = stop
                finished = [label for label in open_labels if plan.done(results[label]["mi"])]
                open_labels = [label for label in open_labels if label not in finished]
                yield from ((label, results.pop(label)) for label in finished)
