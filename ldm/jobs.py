"""Resumable work lists: one result file an item, written whole or not at all, under settings that must not change.

An item that has its file is done. Any number of processes may share a folder: each takes every `world`-th item.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.util import atomic_write


def shard_from_environment() -> tuple[int, int]:
    """(rank, world) of this process under torchrun or a SLURM array job, else (0, 1)."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in os.environ and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        return int(os.environ["SLURM_ARRAY_TASK_ID"]) - first, int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1


def local_rank() -> int:
    """Number of this process on its machine (torchrun, Lightning, srun), else 0: which device is its own."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def parts_of(count: int, size: int) -> dict[str, range]:
    """{key: images} of parts of `size` images; the key tells its first image and their number."""
    parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return {f"{part.start:07d}_{len(part)}": part for part in parts}


class WorkList:
    """Results `{folder}/{key}.json` of items that were worked on under the same `settings`.

    Raises:
        ValueError: if the folder holds results of other settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], shard: tuple[int, int] = (0, 1)):
        self.folder, self.shard = Path(folder), shard
        settings = json.loads(json.dumps(dict(settings), default=str))
        file = self.folder / "settings.json"
        if file.exists():
            before = json.loads(file.read_text())
            changed = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
            if changed:
                differences = ", ".join(f"{key}: {before.get(key)} -> {settings.get(key)}" for key in sorted(changed))
                raise ValueError(
                    f"{self.folder} holds results of other settings ({differences}); choose another output folder, or "
                    "delete it"
                )
        else:
            with atomic_write(file, overwrite=True) as partial:
                partial.write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def apart(cls, stem: str | os.PathLike, settings: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> WorkList:
        """The list in `{stem}_{digest of the settings}`: results of other settings lie beside it."""
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        return cls(f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:10]}", settings, shard)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def pending(self, keys: Iterable[str]) -> list[str]:
        """Items of this process's share that have no result yet, in order."""
        rank, world = self.shard
        return [key for key in list(keys)[rank::world] if not self._file(key).exists()]

    def save(self, key: str, result: Mapping[str, Any]) -> None:
        """Write an item's result."""
        with atomic_write(self._file(key), overwrite=True) as partial:
            partial.write_text(json.dumps(dict(result)) + "\n")

    def load(self, key: str) -> dict[str, Any]:
        """An item's result."""
        return json.loads(self._file(key).read_text())

    def complete(self, keys: Iterable[str]) -> bool:
        """True if every item has its result, whoever worked on it."""
        return all(self._file(key).exists() for key in keys)
