"""Rollouts: the states that all members share up to the branch, and each member's own after it, as panels."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.images import Panel
from ldm.pipelines import EnsemblePipeline


def spread_indices(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` indices, evenly spaced, first and last included."""
    if not count:
        return []
    return sorted({round(place) for place in torch.linspace(0, count - 1, max(1, min(wanted, count))).tolist()})


def shown_steps(steps: int, at: int, columns: int) -> list[int]:
    """About `columns` of the times' steps, shared out in proportion before and after the branch at step `at`."""
    share = round(columns * at / steps)
    return [*spread_indices(at, share), *[at + k for k in spread_indices(steps - at, max(2, columns - share))]]


def rollout(
    pipeline: EnsemblePipeline, label: int, base: int, columns: int, show: str = "x0"
) -> tuple[Tensor, list[str]]:
    """Pictures [M, about `columns`, C, H, W] of one class's trajectory from member `base`, and the name of each moment.

    Args:
        show: "x0", the predicted image, or "x", the noisy state itself; the last picture is the sample.
    """
    steps, at = len(pipeline.times) - 1, pipeline.branch
    chosen = shown_steps(steps, at, columns)
    branched = pipeline.sample_branched([label], [0], (base,), keep_before=True, keep_after=True)
    pictures, names = [], []
    for step in (step for step in [*branched.before, *branched.after] if step.index in chosen):
        last = step.index == steps - 1
        picture = step.x0 if show == "x0" and not last else step.x_next
        picture = picture if picture.ndim == 5 else picture.expand(pipeline.members, *picture.shape)
        pictures.append(pipeline.decode(picture[:, 0]))
        names.append("final\nown" if last else f"t={step.u:g}\n{'shared' if step.index < at else 'own'}")
    return torch.stack(pictures, 1), names


def class_pair(pipeline: EnsemblePipeline, pair: list[int]) -> list[tuple[int, tuple[int, ...], str]]:
    """The two panels of a certain and an uncertain rollout: (class, members, title) each.

    Of masked classes one class, `pair[0]` or the first that both groups have members for, with the members that saw it
    and those that did not; else the classes `pair`, or the first of the largest and of the smallest bin.

    Raises:
        ValueError: if the number of classes does not fit, or there are no bins to choose from.
    """
    everyone = tuple(range(pipeline.members))
    if pipeline.classes.masked:
        if len(pair) > 1:
            raise ValueError(f"--pair takes one class of an ensemble on masked classes, got {pair}")
        both = [label for label in pair or range(pipeline.n_classes) if all(pipeline.classes.groups(label))]
        if not both:
            raise ValueError(f"no class of {pair or 'all'} was seen by one member and hidden from another")
        groups, name = pipeline.classes.groups(both[0]), pipeline.classes.describe(both[0])
        return [
            (both[0], groups.certain, f"{name}: members that saw it"),
            (both[0], groups.uncertain, f"{name}: members that did not"),
        ]
    if len(pair) not in (0, 2):
        raise ValueError(f"--pair takes a certain and an uncertain class, or none to choose them; got {pair}")
    if not pair and len(set(pipeline.classes.sizes.values())) < 2:
        raise ValueError(
            "--pair finds no two bins in the ensemble's record: name the classes, --pair CERTAIN UNCERTAIN"
        )
    ordered = pipeline.classes.spread(pipeline.n_classes)
    certain, uncertain = pair or (
        next(c for c in ordered if pipeline.classes.sizes[c] == pipeline.classes.sizes[ordered[-1]]),
        ordered[0],
    )
    words = {certain: "certain", uncertain: "uncertain"}
    return [
        (label, everyone, f"{word}: {pipeline.classes.describe(label)}".replace("\n", ", "))
        for label, word in words.items()
    ]


def pair_panels(pipeline: EnsemblePipeline, pair: list[int], columns: int, show: str) -> list[Panel]:
    """A certain and an uncertain rollout as two panels of one figure; the noise is the same."""
    panels = []
    for label, members, title in class_pair(pipeline, pair):
        pictures, names = rollout(pipeline, label, pipeline.bases(label)[0], columns, show)
        rows = [f"member {member}" for member in members]
        panels.append(Panel(pictures[list(members)], rows, names, title))
    return panels
