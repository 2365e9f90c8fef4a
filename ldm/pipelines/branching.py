"""A loaded ensemble that branches: which member samples up to the branch, and all members from there on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Network
from ldm.diffusion.transition import Step
from ldm.ensembles.classes import Classes
from ldm.ensembles.members import MemberNetwork, SingleMember
from ldm.ensembles.storage import Ensemble
from ldm.modules.conditioned import EMBEDDER
from ldm.pipelines.model import ModelPipeline
from ldm.pipelines.steering import adapt_times, steer
from ldm.settings import Branching, Sampling, Speed, Steering
from ldm.uncertainty.branch import Branched, InterleavedMembers, branch, branch_indices

if TYPE_CHECKING:
    from typing_extensions import Self


# The name of the one class of an unconditional model.
UNCONDITIONAL_CLASS = "all images"


@dataclass(frozen=True, kw_only=True)
class BranchingPipeline(ModelPipeline):
    """An ensemble on its base model; `checkpoint` is the base checkpoint.

    Attributes:
        ensemble: the members and their record.
        branching: where the members branch, and which of them sample up to there.
    """

    ensemble: Ensemble
    branching: Branching = Branching()

    def with_(
        self,
        *,
        sampling: Sampling | None = None,
        speed: Speed | None = None,
        branching: Branching | None = None,
        **changes: Any,
    ) -> Self:
        """Return this ensemble with other values; see `Pipeline.with_`."""
        values: dict[str, Any] = {
            "sampling": sampling or self.sampling,
            "speed": speed or self.speed,
            "branching": branching or self.branching,
        }
        return self._changed(values, changes)

    def check(self) -> Self:
        """See `Pipeline.check`; the branch points and the base members are checked, too."""
        _ = (self.network, self.branches, self.base_members)
        if self.sampling.steering.strength is not None and 0 in self.branches:
            raise ValueError(
                "--steer leads the base member up to the branch, and these members branch at step 0: branch later"
            )
        if not self.base_network.needs_choices:
            _ = self.classes
        return super().check()

    # The members and what they know

    @cached_property
    def network(self) -> MemberNetwork:
        """All members at once, in passes that fit into memory."""
        return MemberNetwork(self.base_network, self.ensemble.members.to(self.device), self.passes)

    @property
    def _embeds_differently(self) -> bool:
        return any(name.startswith(EMBEDDER) for name in self.ensemble.members.overrides)

    @property
    def members(self) -> int:
        """Number of members."""
        return len(self.ensemble.members)

    @cached_property
    def classes(self) -> Classes:
        """The real classes as the ensemble's record describes them, or the prompts or pictures that were given.

        An unconditional model has one, which stands for all images.
        """
        if self.model.choices is not None:
            return Classes.of_choices(self.model.choices.names, self.ensemble.spec, self.members)
        if not self.n_classes:
            return Classes(1, (UNCONDITIONAL_CLASS,), members=self.members)
        return Classes.from_record(self.ensemble.spec, self.n_classes, self.members)

    @cached_property
    def times(self) -> Tensor:
        """Times of the steps, see `Pipeline.times`; closer where the members disagree, if that is asked for.

        Raises:
            ValueError: if a single step is to be laid closer.
        """
        plain, power = super().times, self.sampling.steering.spread
        if not power:
            return plain
        if len(plain) < 3:
            raise ValueError("--steer_steps lays steps closer to one another, and there is one: ask for more --steps")
        unsteered = self.with_(sampling=replace(self.sampling, steering=Steering()))
        return adapt_times(unsteered, self._base_network(self.base_members[:1]), self.network, power)

    # Where the members branch

    @cached_property
    def branches(self) -> list[int]:
        """Steps at which the members branch: those asked for, else the config's, else the last step."""
        given = self.branching
        default = None if given.given else self.setting("branch_at", None)
        return branch_indices(self.times, step=given.step, at=given.at, time=given.time, default=default)

    @cached_property
    def branch(self) -> int:
        """The step at which the members branch.

        Raises:
            ValueError: if there are several; see `at_branches`.
        """
        if len(self.branches) > 1:
            raise ValueError(f"one branch point is needed here, got the steps {self.branches}")
        return self.branches[0]

    def at_branches(self) -> Iterator[Self]:
        """Yield this ensemble at each of its branch points."""
        for step in self.branches:
            yield self.with_(branching=replace(self.branching, step=step, at=None, time=None))

    @cached_property
    def base_members(self) -> tuple[int, ...]:
        """The members that sample up to the branch.

        Raises:
            ValueError: if one does not exist, or comes twice.
        """
        every = tuple(range(self.members))
        given = self.branching.base
        if given is None:
            return (0,)
        given = given if isinstance(given, tuple) else (given,)
        chosen = every if "all" in given else tuple(0 if one == -1 else int(one) for one in given)
        both = "all" in given and len(given) > 1
        if both or len(set(chosen)) != len(chosen) or not set(chosen) <= set(every):
            raise ValueError(f"--base_comp takes different members of 0..{self.members - 1}, or 'all'; got {given}")
        return chosen

    def bases(self, label: int) -> tuple[int, ...]:
        """Return the members that sample class `label` up to the branch.

        With `branching.uncertain` that is the first member which the class was hidden from. At step 0 nothing has
        been sampled yet: every base gives the same, and the first stands for all.

        Raises:
            ValueError: if `uncertain` comes with base members, or no member is uncertain of the class.
        """
        if not self.branching.uncertain:
            return self.base_members if self.branch else self.base_members[:1]
        groups = self.classes.groups(label)
        if self.branching.base is not None or groups is None or not groups.uncertain:
            raise ValueError(
                f"--uncertain_comp chooses the base member of class {label} among those that did not see it: it needs "
                "an ensemble on masked_classes, and no --base_comp"
            )
        return groups.uncertain[:1]

    def by_bases(self, labels: Sequence[int]) -> list[list[int]]:
        """Return positions in `labels`, sorted into batches of the same bases."""
        batches: dict[tuple[int, ...], list[int]] = {}
        for place, label in enumerate(labels):
            batches.setdefault(self.bases(label), []).append(place)
        return list(batches.values())

    # Sampling

    def _chains(self, labels: Sequence[int], images: Sequence[int], bases: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of `branch`: image b of the k-th base lies at b K + k, and has the noise of image b."""
        count = len(bases)
        cond = self.labels([label for label in labels for _ in range(count)]) if self.n_classes else None
        noise = self.noise([image for image in images for _ in range(count)])
        given, of_bases, of_members = self.sampling.guidance.member_scales, None, None
        if given is not None:
            scales = torch.tensor(given, dtype=torch.float64, device=self.device)
            of_bases = scales[list(bases)].repeat(len(images)).reshape(-1, 1, 1, 1)
            of_members = scales.reshape(-1, 1, 1, 1, 1)
        base = self.denoiser(cond, self._base_network(tuple(bases)), of_bases)
        if self.sampling.steering.strength is not None:
            base = steer(self, base, lambda: self.denoiser(cond, self.network, of_members), noise.images)
        return {
            "sampler": self.sampler_for(cond),
            "base": base,
            "members": self.denoiser(cond, self.network, of_members),
            "schedule": self.model.schedule,
            "x": self.initial(noise),
            "times": self.times,
            "at": self.branch,
            "noise": noise,
        }

    def _base_network(self, bases: tuple[int, ...]) -> Network:
        """Return the base members as one network of a batch in which the k-th of K has images k, k + K, ..."""
        if len(bases) == 1:
            return SingleMember(self.base_network, self.network.members, bases[0], self.passes)
        chosen = MemberNetwork(self.base_network, self.network.members.select(bases), self.passes)
        return InterleavedMembers(chosen)

    def sample_branched(
        self,
        labels: Sequence[int],
        images: Sequence[int],
        bases: Sequence[int],
        *,
        keep_before: bool = False,
        keep_after: bool = False,
        only_first: bool = False,
    ) -> Branched:
        """Sample with each base member up to the branch and with all members from there.

        With K bases there are B K chains, image b of the k-th base at b K + k; their noises are those of image b.

        Args:
            labels: [B]; images: [B], numbers that name the noise; bases: [K].
            keep_before, keep_after, only_first: see `ldm.uncertainty.branch.branch`.
        """
        return branch(
            **self._chains(labels, images, bases),
            keep_before=keep_before,
            keep_after=keep_after,
            only_first=only_first,
        )

    @torch.no_grad()
    def branched_steps(self, labels: Sequence[int], images: Sequence[int], bases: Sequence[int]) -> Iterator[Step]:
        """Yield the steps of all members after the branch, one at a time; whoever stops early saves the rest."""
        chains = self._chains(labels, images, bases)
        sampler, times, noise = chains["sampler"], chains["times"], chains["noise"]
        state, at = chains["x"], chains["at"]
        if at:
            for step in sampler(chains["base"], chains["schedule"], state, times, noise=noise):
                state = step.x_next
                if step.index == at - 1:
                    break
        yield from sampler(chains["members"], chains["schedule"], state, times, noise=noise, start=at)

    def member_latents(self, labels: Sequence[int], images: Sequence[int]) -> Tensor:
        """Return final latents [M, B, K, c, h, w] of all members, for each label and noise, and each of its K bases."""
        batches = self.by_bases(labels)
        parts = []
        for places in batches:
            bases = self.bases(labels[places[0]])
            own = [labels[place] for place in places]
            numbers = [images[place] for place in places]
            branched = self.sample_branched(own, numbers, bases)
            parts.append(branched.samples.unflatten(1, (len(places), len(bases))))
        order = torch.tensor([place for places in batches for place in places]).argsort()
        return torch.cat(parts, 1)[:, order.to(self.device)]

    def describe(self) -> dict[str, Any]:
        """Return what the outputs depend on, for records."""
        spec = self.ensemble.spec
        return {
            "ensemble": str(self.ensemble.folder),
            "trunk_sha256": spec["trunk"]["sha256"],
            "members": self.members,
            "members_sha256": self.ensemble.members_sha256,
            "heads": list(spec["heads"]),
            "split": spec.get("split"),
            **self.describe_sampling(),
            "branch_step": self.branch,
            "branch_time": float(self.times[self.branch]),
            "base_members": "uncertain" if self.branching.uncertain else list(self.base_members),
        }
