"""A posterior over weights as members: dictionaries of parameter overrides, keys as in the base model's state dict.

`MemberNetwork` evaluates all members of a network in one call: x [B, ...] or [M, B, ...] -> [M, B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


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


class MemberNetwork:
    """All members of a network at once: `members(x, t, cond) -> [M, B, C, H, W]`.

    x is [B, C, H, W] (shared) or [M, B, C, H, W]; t and cond are [B], the same for every member, or t [M, B] and cond
    [M, B, ...] (or None), each member's own (training on its own data). Where the network has stages (`condition`,
    `trunk`, `readout` with `input_patterns` and `output_patterns`) and the members differ only in the first and last,
    the frozen trunk runs once on the folded batch, or once for all members where they share its inputs. Otherwise
    `vmap` over the whole network; both agree. `chunk` bounds the images a trunk pass holds.
    """

    def __init__(self, network: nn.Module, members: Members, chunk: int | None = None, staged: bool | None = None):
        known = network.state_dict().keys()
        unknown = sorted(set(members.overrides) - set(known))
        if unknown:
            raise ValueError(
                f"members override {unknown[:4]}, which the network does not have: is this their base model?"
            )
        self.network, self.members, self.chunk = network, members, chunk
        inputs, outputs = getattr(network, "input_patterns", ()), getattr(network, "output_patterns", ())
        names = list(members.overrides)
        self.at_input = {name: members.overrides[name] for name in names if _only([name], inputs)}
        self.at_output = {name: members.overrides[name] for name in names if _only([name], outputs)}
        possible = bool(inputs) and _only(names, (*inputs, *outputs))
        if staged and not possible:
            raise ValueError("staged evaluation needs members that differ only in input-side and output-side heads")
        self.staged = possible if staged is None else staged

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        if x.ndim == 5 and len(x) != len(self.members):
            raise ValueError(f"x holds {len(x)} members, the ensemble {len(self.members)}")
        if t.ndim == 2 and (x.ndim != 5 or t.shape != x.shape[:2]):
            raise ValueError(f"times of every member [M, B] need x [M, B, ...]; got {list(t.shape)}, {list(x.shape)}")
        return self._by_stages(x, t, cond) if self.staged else self._by_vmap(x, t, cond)

    def _by_vmap(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        def one(overrides: Mapping[str, Tensor], x: Tensor, *condition: Tensor | None) -> Tensor:
            return functional_call(self.network, overrides, (x, *condition))

        chunk = None if self.chunk is None else max(1, self.chunk // x.shape[-4])
        in_dims = (0, 0 if x.ndim == 5 else None, *self._axes(t, cond))
        return vmap(one, in_dims, chunk_size=chunk)(dict(self.members.overrides), x, t, cond)

    @staticmethod
    def _axes(t: Tensor, cond: Tensor | None) -> tuple[int | None, int | None]:
        """Member axes of t and cond, for `vmap`."""
        own = 0 if t.ndim == 2 else None
        return own, None if cond is None else own

    def _by_stages(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        count, batch = len(self.members), x.shape[-4]
        own = bool(self.at_input) or t.ndim == 2
        if own:

            def condition(overrides: Mapping[str, Tensor], t: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
                state = functional_call(self.network, overrides, (t, cond), {"stage": "condition"})
                return tuple(part for part in state if part is not None)

            state = vmap(condition, (0, *self._axes(t, cond)))(self.at_input, t, cond)  # each [M, B, ...]
        else:
            state = tuple(part for part in self.network.condition(t, cond) if part is not None)
        shared = not own and x.ndim == 4
        if not shared:
            state = tuple(self._fold(part, count, batch, own) for part in state)
            x = (x if x.ndim == 5 else x.expand(count, *x.shape)).flatten(0, 1)  # [M B, C, H, W]
        features = self._trunk(x, state)
        if not shared:
            features = features.unflatten(0, (count, batch))  # [M, B, F, H, W]
        if not self.at_output:
            return self.network.readout(features.flatten(0, 1)).unflatten(0, (count, batch))

        def readout(overrides: Mapping[str, Tensor], features: Tensor) -> Tensor:
            return functional_call(self.network, overrides, (features,), {"stage": "readout"})

        return vmap(readout, in_dims=(0, None if shared else 0))(self.at_output, features)

    @staticmethod
    def _fold(part: Tensor, count: int, batch: int, has_members: bool) -> Tensor:
        part = part if has_members else part.expand(count, *part.shape)
        return part.expand(count, batch, *part.shape[2:]).flatten(0, 1)

    def _trunk(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        state = (*state, None) if len(state) == 1 else state
        if self.chunk is None or len(x) <= self.chunk:
            return self.network.trunk(x, *state)
        pieces = [None if part is None else part.split(self.chunk) for part in state]
        parts = []
        for number, piece in enumerate(x.split(self.chunk)):
            parts.append(self.network.trunk(piece, *[None if part is None else part[number] for part in pieces]))
        return torch.cat(parts)


def single(network: nn.Module, members: Members, index: int):
    """Member `index` alone as an ordinary network `(x [B, ...], t, cond) -> [B, ...]`."""
    overrides = {name: value[index] for name, value in members.overrides.items()}

    def call(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return functional_call(network, overrides, (x, t, cond))

    return call
