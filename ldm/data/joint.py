"""Data of all members of an ensemble at once: batch k holds, member after member, batch k of each member's own run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler

from ldm.data.module import KeyedBatches

Key = tuple[int, int, int]  # member, epoch of that member, position in its data


class JointDataset(Dataset):
    """Items of M data sets by (member, epoch, position): each member's own augmentation belongs to its own epoch."""

    def __init__(self, members: Sequence[Any]):
        self.members = list(members)
        self.epochs: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(len(data) for data in self.members)

    def __getitem__(self, key: Key) -> Any:
        member, epoch, position = key
        data = self.members[member]
        if self.epochs.get(member) != epoch and hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        self.epochs[member] = epoch
        return data[position]


class JointBatches(Sampler[list[Key]]):
    """Batch k of every member, one after the other, of equal size; an epoch is the longest member's.

    Args:
        members: the batches of each member's own run; `done` of the first counts the batches so far.

    Raises:
        ValueError: if their batches have different sizes, which happens where a member's data do not fill one batch.
    """

    def __init__(self, members: Sequence[KeyedBatches]):
        self.members = list(members)
        sizes = {min(one.batch_size * one.world_size, len(one.data)) for one in members}
        if len(sizes) != 1:
            raise ValueError(
                f"the members' batches have sizes {sorted(sizes)}, since some members have fewer images than a batch: "
                "choose a smaller data.params.batch_size, or train the components one by one"
            )
        self.orders: dict[int, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return max(one.per_epoch for one in self.members)

    def __iter__(self) -> Iterator[list[Key]]:
        done = self.members[0].done()
        for number in range(done, done - done % len(self) + len(self)):
            yield [key for member in range(len(self.members)) for key in self._keys(member, number)]

    def _keys(self, member: int, number: int) -> list[Key]:
        batches = self.members[member]
        epoch, batch = divmod(number, batches.per_epoch)
        known = self.orders.get(member)
        if known is None or known[0] != epoch:
            self.orders[member] = (epoch, batches.order(epoch))
        return [(member, epoch, position) for position in batches.share(self.orders[member][1], batch)]
