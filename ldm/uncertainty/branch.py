"""Branching: one member walks to step u_b, then every member continues from there (DECU, section 4).

The distribution of the state after the branched step, given the shared state, differs between members only by what
they do not know: its mutual information with the weights is the epistemic uncertainty of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler import Step

Sampler = Callable[..., Iterator[Step]]


def branch_index(
    grid: Tensor,
    *,
    unc_branch: int | None = None,
    branch_at: float | None = None,
    branch_t: float | None = None,
    default: float | None = None,
) -> int:
    """The grid step (0 = noisiest) at which members part.

    `unc_branch` k as published; `branch_at` f is floor(f S); `branch_t` b is the first step with u <= b; `default` is a
    fraction like `branch_at`, used when none is given; without it, the last step.

    Raises:
        ValueError: if more than one is given, or the step is not on the grid.
    """
    steps = len(grid) - 1
    given = {"unc_branch": unc_branch, "branch_at": branch_at, "branch_t": branch_t}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of unc_branch, branch_at, branch_t; got {given}")
    if unc_branch is not None:
        index = unc_branch
    elif branch_t is not None:
        reached = (grid[:-1] <= branch_t).nonzero()
        index = int(reached[0]) if len(reached) else steps
    else:
        fraction = default if branch_at is None else branch_at
        index = steps - 1 if fraction is None else int(fraction * steps)
    if not 0 <= index < steps:
        raise ValueError(f"branch step {index} is not on a grid of {steps} steps (0 = noisiest .. {steps - 1} = last)")
    return index


@dataclass(frozen=True)
class Branched:
    """A chain and its continuations.

    `before` are the steps of the shared chain; `state` is z_b, where the members part [B, C, H, W]; `first` the
    branched step; `after` the branched steps, or the last of them. `samples` are final states [M, B, C, H, W].
    """

    before: list[Step]
    state: Tensor
    first: Step
    after: list[Step]

    @property
    def samples(self) -> Tensor:
        return self.after[-1].x_next


@torch.no_grad()
def branch(
    sampler: Sampler,
    base: Denoiser,
    members: Denoiser,
    path: Path,
    x: Tensor,
    grid: Tensor,
    at: int,
    *,
    keep_before: bool = False,
    keep_after: bool = False,
    only_first: bool = False,
    **options: object,
) -> Branched:
    """Walk `base` from x at grid[0] to step `at`, then `members` from there in a new generator with empty history.

    Args:
        x: state [B, C, H, W] at grid[0]; `members` give [M, B, ...] from it.
        keep_before, keep_after: keep every step of that part, not only its last.
        only_first: stop after the branched step: enough for one-step mutual information.
        options: the sampler's own (eta, noise, ...).
    """
    before: list[Step] = []
    state = x
    if at > 0:
        for step in sampler(base, path, x, grid, **options):
            before = [*before, step] if keep_before else [step]
            if step.index == at - 1:
                state = step.x_next
                break
    first, after = None, []
    for step in sampler(members, path, state, grid, start=at, **options):
        first = step if first is None else first
        after = [*after, step] if keep_after else [step]
        if only_first:
            break
    assert first is not None
    return Branched(before, state, first, after)
