"""A loaded ensemble: its members' split, where they part, and the walk there and beyond."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ldm.data.bins import MASKED, class_size_order
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step
from ldm.ensembles.members import MemberNetwork
from ldm.ensembles.storage import Ensemble, load_ensemble
from ldm.jobs import pick_device
from ldm.pipelines.model import ModelPipeline, build_model, make_ready
from ldm.uncertainty.branch import Branched, InterleavedMembers, after_branch, before_branch, branch, branch_indices


class Groups(NamedTuple):
    """The members that saw a class in training, and those that it was hidden from."""

    certain: tuple[int, ...]
    uncertain: tuple[int, ...]


@dataclass(frozen=True)
class EnsemblePipeline(ModelPipeline):
    """A loaded ensemble with everything the scripts ask of it; `checkpoint` is its trunk."""

    ensemble: Ensemble

    # The members and their data

    @cached_property
    def network(self) -> MemberNetwork:
        """All members at once, in passes that fit into memory."""
        return MemberNetwork(self.model.network, self.ensemble.members.to(self.device), self.passes)

    @property
    def members(self) -> int:
        return len(self.ensemble.members)

    @property
    def bins(self) -> dict[int, Any]:
        """{class: class_size}; empty where the ensemble records none."""
        return {int(label): class_size for label, class_size in (self.ensemble.spec.get("bins") or {}).items()}

    @property
    def masked(self) -> bool:
        """Whether classes were hidden from members."""
        return self.ensemble.spec.get("split") == MASKED

    def groups(self, label: int) -> Groups | None:
        """The members that saw class `label` and those that did not; None where no class is hidden from anyone.

        Raises:
            ValueError: if the members' split is masked and the record does not say which classes each one saw.
        """
        if not self.masked:
            return None
        sees = self.ensemble.spec.get("sees")
        if not sees:
            raise ValueError(
                f"{self.ensemble.folder}/ensemble.yaml has split {MASKED} but no key 'sees' ({{member: [classes]}}): "
                "write it anew with save_ensemble.py"
            )
        saw = {int(member): set(classes) for member, classes in sees.items()}
        certain = tuple(member for member in range(self.members) if label in saw.get(member, ()))
        return Groups(certain, tuple(member for member in range(self.members) if member not in certain))

    @property
    def class_names(self) -> list[str]:
        """One name a class, without the null class."""
        return list(self.ensemble.spec.get("class_names") or [str(label) for label in range(self.n_classes)])

    def describe_class(self, label: int) -> str:
        """Name and class_size of a class, for a picture."""
        class_size = None if self.masked else self.bins.get(label)
        return self.class_names[label] + (
            "" if class_size is None else f"\n{class_size} image{'s' * (class_size != 1)}"
        )

    def member_names(self, label: int | None = None) -> list[str]:
        """Names of the members for a picture; of a masked ensemble with what each knows of class `label`."""
        groups = None if label is None else self.groups(label)
        knows = [""] * self.members
        if groups is not None:
            knows = [" (saw it)" if member in groups.certain else " (hidden)" for member in range(self.members)]
        return [f"member {member}{known}" for member, known in enumerate(knows)]

    def spread_classes(self, count: int = 10) -> list[int]:
        """Up to `count` classes, evenly over the bins in their order, else evenly over the numbers."""
        bins, total = self.bins, self.n_classes
        if len(set(bins.values())) < 2:
            return sorted({round(k * (total - 1) / max(1, count - 1)) for k in range(min(count, total))})
        by_bin: dict[Any, list[int]] = {}
        for label in sorted(bins, key=lambda label: (class_size_order(bins[label]), label)):
            by_bin.setdefault(bins[label], []).append(label)
        share = -(-count // len(by_bin))
        chosen = [label for place in range(share) for labels in by_bin.values() for label in labels[place : place + 1]]
        return sorted(chosen[:count], key=lambda label: (class_size_order(bins[label]), label))

    def choose_classes(self, given: Sequence[int] | None, count: int | None = 10) -> list[int]:
        """The classes given; where there are none up to `count`, spread over the bins (None: all classes).

        Raises:
            ValueError: for a class that the model does not have, or that comes twice.
        """
        if not given:
            return list(range(self.n_classes)) if count is None else self.spread_classes(count)
        wrong = [label for label in given if not 0 <= label < self.n_classes]
        if wrong or len(set(given)) != len(given):
            raise ValueError(f"--classes takes different classes of 0..{self.n_classes - 1}, got {list(given)}")
        return list(given)

    # Where the members part

    @cached_property
    def branches(self) -> list[int]:
        """Grid steps at which the members part: those asked for, else the config's, else the last step."""
        given = {name: getattr(self.options, name) for name in ("unc_branch", "branch_at", "branch_t")}
        default = self.setting("branch_at", None) if self.options.default_branch == "config" else None
        return branch_indices(self.times, **given, default=default)

    @property
    def branch(self) -> int:
        """The step at which the members part.

        Raises:
            ValueError: if there are several; see `at_branches`.
        """
        if len(self.branches) > 1:
            raise ValueError(f"one branch point is needed here, got the steps {self.branches}")
        return self.branches[0]

    def at_branches(self) -> Iterator[EnsemblePipeline]:
        """This ensemble at each of its branch points."""
        for step in self.branches:
            only = {"unc_branch": step, "branch_at": None, "branch_t": None}
            yield replace(self, options=argparse.Namespace(**{**vars(self.options), **only}))

    @cached_property
    def base_members(self) -> tuple[int, ...]:
        """The members of `--base_comp`, which walk to the branch.

        Raises:
            ValueError: if one does not exist, or comes twice.
        """
        chosen, every = self.options.base_comp, tuple(range(self.members))
        if chosen is None:
            return (0,)
        chosen = every if "all" in chosen else tuple(chosen)
        if len(set(chosen)) != len(chosen) or not set(chosen) <= set(every):
            raise ValueError(f"--base_comp takes different members of 0..{self.members - 1}, or 'all'; got {chosen}")
        return chosen

    def bases(self, label: int) -> tuple[int, ...]:
        """The members that walk class `label` to the branch: `--base_comp`, or with `--uncertain_comp` the first one
        that the class was hidden from.

        At step 0 nothing has been walked yet: every base gives the same, and the first stands for all.

        Raises:
            ValueError: if `--uncertain_comp` comes with `--base_comp`, or no member is uncertain of the class.
        """
        if not self.options.uncertain_comp:
            return self.base_members if self.branch else self.base_members[:1]
        groups = self.groups(label)
        if self.options.base_comp is not None or groups is None or not groups.uncertain:
            raise ValueError(
                f"--uncertain_comp chooses the base member of class {label} among those that did not see it: it needs "
                "an ensemble on masked_classes, and no --base_comp"
            )
        return groups.uncertain[:1]

    def by_bases(self, labels: Sequence[int]) -> list[list[int]]:
        """Positions in `labels`, sorted into batches of the same bases."""
        batches: dict[tuple[int, ...], list[int]] = {}
        for place, label in enumerate(labels):
            batches.setdefault(self.bases(label), []).append(place)
        return list(batches.values())

    # The walk

    def _chains(self, labels: Sequence[int], images: Sequence[int], bases: Sequence[int]) -> dict[str, Any]:
        """Arguments of `branch`: image b of the k-th base lies at b K + k, and has the noise of image b."""
        count = len(bases)
        cond = self.labels([label for label in labels for _ in range(count)])
        noise = ImageNoise(
            self.options.seed, tuple(image for image in images for _ in range(count)), device=self.device
        )
        x = noise.initial((len(cond), *self.model.latent_shape)) * self.model.schedule.prior_std
        base = InterleavedMembers(
            MemberNetwork(self.model.network, self.network.members.select(bases), self.network.chunker)
        )
        return {
            "sampler": self.sampler_for(cond),
            "base": self.denoiser(cond, base),
            "members": self.denoiser(cond, self.network),
            "schedule": self.model.schedule,
            "x": x,
            "times": self.times,
            "at": self.branch,
            "noise": noise,
        }

    def walk(self, labels: Sequence[int], images: Sequence[int], bases: Sequence[int], **keep: bool) -> Branched:
        """Walk each base member to the branch and all members from there, for one label and noise an image.

        With K bases there are B K chains, image b of the k-th base at b K + k; their noises are those of image b.
        """
        return branch(**self._chains(labels, images, bases), **keep)

    def member_samples(self, labels: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        """Final latents [M, B, K, c, h, w] of all members, for each label and noise, and each of its K bases."""
        batches, parts = self.by_bases(labels), []
        for places in batches:
            bases = self.bases(labels[places[0]])
            walked = self.walk([labels[place] for place in places], [images[place] for place in places], bases)
            parts.append(walked.samples.unflatten(1, (len(places), len(bases))))
        order = torch.tensor([place for places in batches for place in places]).argsort()
        return torch.cat(parts, 1)[:, order.to(self.device)]

    @torch.no_grad()
    def parted(self, labels: Sequence[int], images: Sequence[int], bases: Sequence[int]) -> Iterator[Step]:
        """The steps that `walk` takes after the branch, one at a time; whoever stops early saves the rest."""
        chains = self._chains(labels, images, bases)
        base, members, state = chains.pop("base"), chains.pop("members"), chains.pop("x")
        for step in before_branch(denoiser=base, x=state, **chains):
            state = step.x_next
        yield from after_branch(denoiser=members, x=state, **chains)

    def describe(self) -> dict[str, Any]:
        """What the outputs of this run depend on."""
        return {
            "ensemble": str(self.ensemble.folder),
            "trunk_sha256": self.ensemble.spec["trunk"]["sha256"],
            "members": self.members,
            "members_sha256": self.ensemble.members_sha256,
            "heads": list(self.ensemble.spec["heads"]),
            "split": self.ensemble.spec.get("split"),
            **self.describe_sampling(),
            "branch_step": self.branch,
            "branch_time": float(self.times[self.branch]),
            "base_members": "uncertain" if self.options.uncertain_comp else list(self.base_members),
        }


def open_ensemble(options: argparse.Namespace) -> EnsemblePipeline:
    """Load the ensemble and the trunk that the options of `ldm.arguments.add_ensemble_arguments` name.

    Raises:
        ValueError: if `--dataset` names another split than the members were trained on.
    """
    device = pick_device(options.device)
    ensemble = load_ensemble(options.path)
    split = ensemble.spec.get("split")
    if options.dataset not in (None, split):
        found = f"the members were trained on {split}" if split else "the ensemble records no split; leave it out"
        raise ValueError(f"--dataset {options.dataset}: {found}")
    config, trunk = ensemble.spec["config"], ensemble.trunk(options.pretrained)
    model = build_model(config)
    model.init_from_ckpt(str(trunk), use_averaged=True)
    model = model.to(device).eval().requires_grad_(False)
    return EnsemblePipeline(model, config, trunk, options, device, *make_ready(model, options, device), ensemble)
