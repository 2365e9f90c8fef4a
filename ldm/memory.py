"""How much one call may hold: rows that fit into memory, measured once, and fewer of them when memory runs out."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

# Share of the free memory that one call may fill: the rest is for workspaces and for what the caller keeps.
SHARE = 0.6
# On a CPU more rows than fill this much memory gain nothing, and fewer than MIN_CPU_ROWS leave it waiting for weights.
CPU_BYTES, MIN_CPU_ROWS, MAX_ROWS = 256 * 2**20, 8, 4096
CGROUP = Path("/sys/fs/cgroup")
# glibc's mallopt: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; the smaller value is the largest that old versions take.
TRIM_THRESHOLD, MMAP_THRESHOLD, THRESHOLDS = -1, -3, (2**30, 2**25)


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of large tensors rather than hand each back to the system; True if it does.

    By default every large tensor of a network's pass is mapped, filled with zeros by the kernel page by page, and
    unmapped. Without that a pass on the CPU takes 10 to 20 % less time. Nothing happens under other allocators.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return all(any(mallopt(name, value) for value in THRESHOLDS) for name in (MMAP_THRESHOLD, TRIM_THRESHOLD))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations under it made: `now` alive, `peak` the most there were, `total`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.total = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in inputs:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.total += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of tensors that lived at once while `call` ran, beyond what it was given."""
    with torch.no_grad(), LiveBytes() as live:
        call()
    return live.peak


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free for tensors; of a CPU also within the limit of its container."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the system could give, its file caches included
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else free
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def rows_that_fit(one_row: Callable[[], Any], device: torch.device) -> int:
    """How many rows one call may hold, from the memory that a call with a single row takes.

    On a CPU the number is bounded further: larger batches gain nothing there.
    """
    row = max(1, peak_bytes(one_row))
    rows = int(SHARE * free_bytes(device)) // row
    if device.type == "cpu":
        rows = min(rows, max(MIN_CPU_ROWS, CPU_BYTES // row))
    return max(1, min(rows, MAX_ROWS))


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for the errors of a full device or a full CPU memory."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in words or "not enough memory" in words


class Chunker:
    """Runs functions of many rows in pieces of at most `limit` rows; when memory runs out the limit is halved.

    Args:
        limit: rows of a call, or a function that finds the number when it is first needed; None: all of them, until
            memory runs out.
    """

    def __init__(self, limit: int | Callable[[], int] | None = None):
        if isinstance(limit, int) and limit < 1:
            raise ValueError(f"a call must hold at least one row, got a limit of {limit}")
        self._limit = limit

    @property
    def limit(self) -> int | None:
        """Rows that a call holds at most."""
        if callable(self._limit):
            self._limit = self._limit()
        return self._limit

    def __call__(self, function: Callable[..., Tensor], x: Tensor, *parts: Tensor | None) -> Tensor:
        """`function(x, *parts)`, row by row the same.

        Args:
            x: [B, ...]. parts: [B, ...], or [r B, ...] of which row j belongs to row j mod B of x, or None.

        Returns:
            [r B, ...], as the function gives for its rows.
        """
        count = max([len(x), *(len(part) for part in parts if part is not None)])
        return self.within(lambda limit: self._split(function, limit, x, parts), count)

    def within(self, call: Callable[[int], Tensor], rows: int) -> Tensor:
        """`call(limit)` with the largest limit, up to `rows`, that memory allows.

        Raises:
            RuntimeError: if a single row does not fit.
        """
        while True:
            limit = rows if self.limit is None else min(self.limit, rows)
            try:
                return call(limit)
            except RuntimeError as error:
                if limit == 1 or not is_out_of_memory(error):
                    raise
            self._limit = limit // 2
            log.warning("memory ran out at %d images in one pass, going on with %d", limit, self._limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @staticmethod
    def _split(function: Callable[..., Tensor], limit: int, x: Tensor, parts: tuple[Tensor | None, ...]) -> Tensor:
        rows = len(x)
        copies = max([1, *(len(part) // rows for part in parts if part is not None)])
        if rows * copies <= limit:
            return function(x, *parts)
        some = max(1, min(rows, limit // copies))  # images of a piece, with as many of their copies as fit
        found = []
        for first in range(0, copies, max(1, limit // some)):
            block = slice(first, first + max(1, limit // some))
            pieces = []
            for start in range(0, rows, some):
                piece = slice(start, start + some)
                own = [None if part is None else _part(part, rows, block, piece) for part in parts]
                output = function(x[piece], *own)
                pieces.append(output.unflatten(0, (-1, len(x[piece]))))  # [copies, images, ...]
            found.append(torch.cat(pieces, 1))
        return torch.cat(found).flatten(0, 1)


def _part(part: Tensor, rows: int, block: slice, piece: slice) -> Tensor:
    """Some images of some copies of a part [B, ...] or [r B, ...]."""
    copies = part.unflatten(0, (-1, rows))  # [1 or r, B, ...]
    return (copies if len(copies) == 1 else copies[block])[:, piece].flatten(0, 1)


class ChunkedNetwork:
    """A network `(x, t, cond)` of many images in passes that fit into memory; takes r B conditions where it does."""

    def __init__(self, network: nn.Module, chunker: Chunker):
        self.network = network
        self.chunker = chunker
        self.shares_x = getattr(network, "shares_x", False)

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.chunker(self.network, x, t, cond)
