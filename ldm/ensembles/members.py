"""A posterior over weights as members: dictionaries of parameter overrides, keys as in the base model's state dict.

`MemberNetwork` evaluates all members of a network in one call: x [B, ...] or [M, B, ...] -> [M, B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ldm.ensembles.folding import can_fold, fold_members
from ldm.memory import Chunker
from ldm.modules.diffusionmodules.util import repeat_rows
from ldm.modules.parts import find_parts


@dataclass(frozen=True)
class Members:
    """Stacked overrides {name: [M, ...]}: everything in which the members differ."""

    overrides: Mapping[str, Tensor]

    def __post_init__(self):
        sizes = {name: len(value) for name, value in self.overrides.items()}
        if not sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"members need at least one override, and the same number in each, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.overrides.values())))

    @classmethod
    def stack(cls, dictionaries: Sequence[Mapping[str, Tensor]]) -> Members:
        """Join one dictionary a member.

        Raises:
            ValueError: if there are none, or their names or shapes differ.
        """
        if not dictionaries:
            raise ValueError("an ensemble needs at least one member")
        names = list(dictionaries[0])
        for number, member in enumerate(dictionaries):
            if sorted(member) != sorted(names):
                raise ValueError(
                    f"member {number} overrides {sorted(member)}, member 0 {sorted(names)}: train the same heads"
                )
        return cls({name: torch.stack([member[name] for member in dictionaries]) for name in names})

    def select(self, members: Sequence[int]) -> Members:
        """Some of the members, in the order given.

        Raises:
            ValueError: for an index that is not there.
        """
        wrong = [index for index in members if not 0 <= index < len(self)]
        if wrong or not len(members):
            raise ValueError(f"members must be indices 0..{len(self) - 1}, got {list(members)}")
        return Members({name: value[list(members)] for name, value in self.overrides.items()})

    def to(self, device: torch.device | str) -> Members:
        return Members({name: value.to(device) for name, value in self.overrides.items()})


def _only(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names)


class StagedNetwork(Protocol):
    """A network in three stages, see `ldm.modules.conditioned`."""

    def condition(self, t: Tensor, cond: Tensor | None) -> Sequence[Tensor | None]:
        """Embed times [B] and conditions [B, ...]."""

    def backbone(self, x: Tensor, *state: Tensor | None) -> Tensor:
        """Return features [B, F, H, W], the input of the last stage."""

    def readout(self, features: Tensor) -> Tensor:
        """Return the output [B, C, H, W]."""


class MemberNetwork:
    """All members of a network at once: `members(x, t, cond) -> [M, B, C, H, W]`.

    x is [B, C, H, W] (shared) or [M, B, C, H, W]; t and cond are [B], the same for every member, or t [M, B] and cond
    [M, B, ...] (or None), each member's own (training on its own data). With r B conditions, condition j is for image
    j mod B and r B images come out. Where the network runs `in_stages` (`condition`, `backbone`, `readout`) and the
    members differ only in the first and last, as its `parts` say, the frozen backbone runs once on the folded batch.
    While members share x, it runs once for all conditions in which they agree (a shared null class), and what comes
    before the first conditioned block once for all of them. Members that differ in linear layers and convolutions of
    the backbone run through it in one batch, each layer in one product (`ldm.ensembles.folding`). Otherwise, and where
    these are trained, `vmap` over the whole network; all agree. `chunk` bounds the images a backbone pass holds.
    """

    def __init__(
        self, network: nn.Module, members: Members, chunk: int | Chunker | None = None, staged: bool | None = None
    ):
        known = network.state_dict().keys()
        unknown = sorted(set(members.overrides) - set(known))
        if unknown:
            raise ValueError(
                f"members override {unknown[:4]}, which the network does not have: is this their base model?"
            )
        self.network = network
        self.stages = cast(StagedNetwork, network)  # which it has where `staged`
        self.members = members
        self.count = len(members)
        self.shares_x = getattr(network, "shares_x", False)
        self.chunker = chunk if isinstance(chunk, Chunker) else Chunker(chunk)
        parts = find_parts(network)
        inputs = parts.condition
        outputs = parts.output
        names = list(members.overrides)
        self.at_input = {name: members.overrides[name] for name in names if _only([name], inputs)}
        self.at_output = {name: members.overrides[name] for name in names if _only([name], outputs)}
        inside = {name: members.overrides[name] for name in names if name not in {**self.at_input, **self.at_output}}
        trained = any(value.requires_grad for value in inside.values())
        possible = getattr(network, "in_stages", False) and can_fold(network, inside) and not trained
        if staged and not possible:
            raise ValueError(
                "staged evaluation needs members that differ only in input-side and output-side heads, and in linear "
                "layers and convolutions"
            )
        self.staged = possible if staged is None else staged
        self.folds = bool(self.staged and inside)
        if self.folds:
            folded, self.present = fold_members(network, inside)
            self.stages = cast(StagedNetwork, folded)

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        if x.ndim == 5 and len(x) != self.count:
            raise ValueError(f"x holds {len(x)} members, the ensemble {self.count}")
        if t.ndim == 2 and (x.ndim != 5 or t.shape != x.shape[:2]):
            raise ValueError(f"times of every member [M, B] need x [M, B, ...]; got {list(t.shape)}, {list(x.shape)}")
        return self._by_stages(x, t, cond) if self.staged else self._by_vmap(x, t, cond)

    def _by_vmap(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        def one(overrides: dict[str, Tensor], x: Tensor, *condition: Tensor | None) -> Tensor:
            return functional_call(self.network, overrides, (x, *condition))

        own = 0 if t.ndim == 2 else None
        in_dims = (0, 0 if x.ndim == 5 else None, own, None if cond is None else own)
        images = max(x.shape[-4], 0 if cond is None else cond.shape[t.ndim - 1])  # of one member

        def call(limit: int) -> Tensor:
            chunk = None if limit >= images * self.count else max(1, limit // images)
            return vmap(one, in_dims, chunk_size=chunk)(dict(self.members.overrides), x, t, cond)

        return self.chunker.within(call, images * self.count)

    def _by_stages(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        state = self._condition(t, cond)  # each [M or 1, B or r B, ...]
        if self.folds:
            return self._of_all(x if x.ndim == 5 else x.expand(self.count, *x.shape), state)
        if x.ndim == 5:
            return self._of_own_x(x, state)
        return self._of_shared_x(x, state)

    def _condition(self, t: Tensor, cond: Tensor | None) -> list[Tensor]:
        """What the members make of times and conditions, [M, ...]; [1, ...] where they cannot differ."""
        if not self.at_input and t.ndim == 1:
            return [part[None] for part in self.stages.condition(t, cond) if part is not None]

        def condition(overrides: dict[str, Tensor], t: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
            state = functional_call(self.network, overrides, (t, cond), {"stage": "condition"})
            return tuple(part for part in state if part is not None)

        own = 0 if t.ndim == 2 else None
        return list(vmap(condition, (0, own, None if cond is None else own))(self.at_input, t, cond))

    def _of_all(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        images = max(part.shape[1] for part in (x, *state))  # r B of one member
        inputs = [part.expand(self.count, *part.shape[1:]) for part in (x, *state)]
        inputs = [part.repeat(1, images // part.shape[1], *[1] * (part.ndim - 2)) for part in inputs]  # [M, r B, ...]

        def call(limit: int) -> Tensor:
            # A backward pass may run layers again, of all members.
            members = self.count if torch.is_grad_enabled() else min(self.count, limit)
            rows = []
            for start in range(0, self.count, members):
                self.present.members = slice(start, start + members)
                pieces = zip(
                    *[part[self.present.members].split(max(1, limit // members), 1) for part in inputs], strict=True
                )
                rows.append(torch.cat([self._run_present(*piece) for piece in pieces], 1))
            return torch.cat(rows)

        output = self.chunker.within(call, images * self.count)
        return self._read_out(output, 0) if self.at_output else output

    def _run_present(self, *inputs: Tensor) -> Tensor:
        """Features, or outputs where the members have no heads there, of inputs [m, b, ...] of the present members."""
        flat = [part.flatten(0, 1) for part in inputs]
        features = self.stages.backbone(*flat, *[None] * (3 - len(flat)))
        output = features if self.at_output else self.stages.readout(features)
        return output.unflatten(0, (len(inputs[0]), -1))

    def _of_own_x(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        count, batch = x.shape[:2]
        parts = []
        for part in state:
            part = part.expand(count, *part.shape[1:]).unflatten(1, (-1, batch))  # [M, 1 or r, B, ...]
            parts.append(part.transpose(0, 1).flatten(0, 2))  # [r M B, ...]
        output = self._run(x.flatten(0, 1), parts)  # [r M B, ...]
        output = output.unflatten(0, (-1, count, batch)).transpose(0, 1).flatten(1, 2)  # [M, r B, ...]
        return self._read_out(output, 0) if self.at_output else output

    def _of_shared_x(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        count, batch = self.count, len(x)
        blocks = [part.unflatten(1, (-1, batch)) for part in state]  # [M or 1, 1 or r, B, ...]
        ways = max(part.shape[1] for part in blocks)
        agreed = _agreement(blocks)
        alike = [all(own[way % len(own)] for own in agreed) for way in range(ways)]
        # Passes of x, as (member, condition): one for all members where they agree on the condition.
        passes = [(member, way) for way in range(ways) for member in range(1 if alike[way] else count)]
        parts = []
        for part, own in zip(blocks, agreed, strict=True):
            once = own == [True]  # the same for every member and condition, a time for example: [B, ...]
            chosen = passes[:1] if once else passes
            parts.append(torch.cat([part[member % len(part), way % len(own)] for member, way in chosen]))
        output = self._run(x, parts).unflatten(0, (-1, batch))  # [passes or 1, B, ...]
        if self.at_output and len(output) == ways:  # every member reads the same features
            return self._read_out(output.flatten(0, 1), None)
        places = [[passes.index((0 if alike[way] else member, way)) for way in range(ways)] for member in range(count)]
        output = output[torch.tensor(places, device=output.device)].flatten(1, 2)  # [M, r B, ...]
        return self._read_out(output, 0) if self.at_output else output

    def _run(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Features of the backbone, or outputs where the members have no heads there: [r B, ...]."""

        def run(x: Tensor, *state: Tensor) -> Tensor:
            inputs = [x, *state]
            if not self.shares_x:
                rows = max(map(len, inputs))
                inputs = [repeat_rows(part, rows) for part in inputs]
            features = self.stages.backbone(*inputs, *[None] * (3 - len(inputs)))
            return features if self.at_output else self.stages.readout(features)

        return self.chunker(run, x, *parts)

    def _read_out(self, features: Tensor, axis: int | None) -> Tensor:
        """Each member's output [M, B, ...] of features [B, ...] (axis None) or its own [M, B, ...] (axis 0)."""

        def readout(overrides: dict[str, Tensor], features: Tensor) -> Tensor:
            return functional_call(self.network, overrides, (features,), {"stage": "readout"})

        def some(features: Tensor) -> Tensor:  # [b, M, F, H, W] or [b, F, H, W]
            own = features if axis is None else features.transpose(0, 1).contiguous()  # group norms take no strides
            return vmap(readout, (0, axis), 1)(self.at_output, own)

        images = features if axis is None else features.transpose(0, 1)
        return self.chunker(some, images).transpose(0, 1)


def _agreement(blocks: Sequence[Tensor]) -> list[list[bool]]:
    """Of each part [M or 1, 1 or r, B, ...], on which of its conditions all members agree; the device is asked once."""
    same = [(part == part[:1]).movedim(1, 0).flatten(1).all(1) for part in blocks]
    flat = torch.cat(same).tolist()
    return [[flat.pop(0) for _ in own] for own in same]


class SingleMember:
    """One member alone as an ordinary network: `(x [B, ...], t, cond) -> [r B, ...]`.

    Args:
        network: the base network; members: all of them; index: the one.
        chunk: images in one pass.
    """

    def __init__(self, network: nn.Module, members: Members, index: int, chunk: int | Chunker | None = None):
        self.network = network
        self.overrides = {name: value[index] for name, value in members.overrides.items()}
        self.shares_x = getattr(network, "shares_x", False)
        self.chunker = chunk if isinstance(chunk, Chunker) else Chunker(chunk)

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.chunker(lambda *inputs: functional_call(self.network, self.overrides, inputs), x, t, cond)
