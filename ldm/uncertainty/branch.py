"""Branching: one member samples to step u_b, then every member continues from there (DECU, section 4).

The distribution of the state after the branched step, given the shared state, differs between members only by what
they do not know: its mutual information with the weights is the epistemic uncertainty of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Step
from ldm.diffusion.samplers.registry import Sampler
from ldm.diffusion.schedule import Schedule
from ldm.ensembles.members import MemberNetwork


def branch_index(
    times: Tensor,
    *,
    step: int | None = None,
    at: float | None = None,
    time: float | None = None,
    default: float | None = None,
) -> int:
    """Return the step (0 = noisiest) at which members branch.

    Args:
        times: descending times [S + 1] of the sampler.
        step: its number, as DECU's --unc_branch; at: the step floor(at S); time: the first step with u <= time.
        default: a fraction like `at`, used when none of the three is given; without it, the last step.

    Raises:
        ValueError: if more than one is given, or there is no such step.
    """
    steps = len(times) - 1
    kinds = {"step": step, "at": at, "time": time}
    given = {name: value for name, value in kinds.items() if value is not None}
    _check_one_kind(given)
    if step is not None:
        index = step
    elif time is not None:
        reached = (times[:-1] <= time).nonzero()
        index = int(reached[0]) if len(reached) else steps
    else:
        fraction = default if at is None else at
        # 0.29 times 100 is 28.999999999999996.
        index = steps - 1 if fraction is None else math.floor(fraction * steps + 1e-9)
    if not 0 <= index < steps:
        raise ValueError(f"branch step {index} is not among the {steps} steps (0 = noisiest .. {steps - 1} = last)")
    return index


def branch_indices(
    times: Tensor,
    *,
    step: int | Sequence[int] | None = None,
    at: float | Sequence[float] | None = None,
    time: float | Sequence[float] | None = None,
    default: float | None = None,
) -> list[int]:
    """Return the steps of one or several branch points of one kind, in the order given; see `branch_index`.

    Raises:
        ValueError: as `branch_index`; and if two of them are the same step.
    """
    kinds = {"step": step, "at": at, "time": time}
    given = {name: value for name, value in kinds.items() if value is not None}
    _check_one_kind(given)
    if not given:
        return [branch_index(times, default=default)]
    by_step = [branch_index(times, step=point) for point in _listed(step)]
    by_share = [branch_index(times, at=point) for point in _listed(at)]
    by_time = [branch_index(times, time=point) for point in _listed(time)]
    found = by_step + by_share + by_time
    if len(set(found)) != len(found):
        points = [*_listed(step), *_listed(at), *_listed(time)]
        raise ValueError(f"the branch points {points} are the steps {found} of {len(times) - 1}: name each once")
    return found


def _check_one_kind(given: Mapping[str, object]) -> None:
    """Raise a ValueError if branch points of several kinds are given."""
    if len(given) > 1:
        raise ValueError(f"give one of step, at, time; got {given}")


_Point = TypeVar("_Point", int, float)


def _listed(points: _Point | Sequence[_Point] | None) -> Sequence[_Point]:
    """Return one or several branch points as a sequence, empty for None."""
    if points is None:
        return ()
    return points if isinstance(points, Sequence) else (points,)


@dataclass(frozen=True)
class InterleavedMembers:
    """K members side by side in the batch, as an ordinary network: `(x [B K, ...], t, cond) -> [B K, ...]`.

    Image b of member k lies at b K + k; t and cond [B K] are the same for the K images of one b. So several base
    members sample to the branch in one batch, whatever wraps the network (guidance doubles the conditions in front).
    """

    network: MemberNetwork

    @property
    def shares_x(self) -> bool:
        """Whether r B conditions may come with B images."""
        return self.network.shares_x

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        count = len(self.network.members)
        apart = x.unflatten(0, (-1, count)).transpose(0, 1)  # [K, B, C, H, W]
        output = self.network(apart, t[::count], None if cond is None else cond[::count])
        return output.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Branched:
    """A chain and its continuations.

    `before` are the steps of the shared chain; `state` is z_b, where the members branch [B, C, H, W]; `first` the
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
def before_branch(
    sampler: Sampler, denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, at: int, **options: object
) -> Iterator[Step]:
    """The steps 0 .. at - 1 from x [B, C, H, W] at times[0]; none for at = 0. `options` are the sampler's own."""
    for step in sampler(denoiser, schedule, x, times, **options) if at else ():
        yield step
        if step.index == at - 1:
            return


@torch.no_grad()
def after_branch(
    sampler: Sampler, denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, at: int, **options: object
) -> Iterator[Step]:
    """The steps of all members from the shared x [B, C, H, W] at times[at], in a new generator with empty history."""
    yield from sampler(denoiser, schedule, x, times, start=at, **options)


def branch(
    sampler: Sampler,
    base: Denoiser,
    members: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    at: int,
    *,
    keep_before: bool = False,
    keep_after: bool = False,
    only_first: bool = False,
    **options: object,
) -> Branched:
    """Walk `base` from x at times[0] to step `at`, then `members` from there in a new generator with empty history.

    Args:
        x: state [B, C, H, W] at times[0]; `members` give [M, B, ...] from it.
        keep_before, keep_after: keep every step of that stretch, not only its last.
        only_first: stop after the branched step: enough for one-step mutual information.
        options: the sampler's own (eta, noise, ...).
    """
    before: list[Step] = []
    for step in before_branch(sampler, base, schedule, x, times, at, **options):
        before = [*before, step] if keep_before else [step]
    state = before[-1].x_next if before else x
    after: list[Step] = []
    for step in after_branch(sampler, members, schedule, state, times, at, **options):
        after = [*after, step] if keep_after or not after else [after[0], step]
        if only_first:
            break
    return Branched(before, state, after[0], after if keep_after else after[-1:])
