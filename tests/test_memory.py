"""Calls in pieces give what one call gives, whatever the limit, and go on with fewer rows when memory runs out."""

import logging

import pytest
import torch

from ldm.memory import Chunker, LiveBytes, free_bytes, peak_bytes, rows_that_fit


def weighted(x, shared, several):
    """Something of rows alone: x and shared [B, 3], several [r B]."""
    rows = len(several)
    return (x + shared).repeat(rows // len(x), 1) * several[:, None]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7, 12, 100, None])
@pytest.mark.parametrize("copies", [1, 3])
def test_pieces_equal_one_call(limit, copies):
    source = torch.Generator().manual_seed(0)
    x, shared = (torch.randn(4, 3, generator=source) for _ in range(2))
    several = torch.randn(4 * copies, generator=source)
    seen = []

    def function(x, shared, several):
        seen.append(len(several))
        return weighted(x, shared, several)

    assert torch.equal(Chunker(limit)(function, x, shared, several), weighted(x, shared, several))
    assert max(seen) <= (limit or 100) and sum(seen) == 4 * copies


def test_fewer_rows_when_memory_runs_out(caplog):
    """Of 32 rows, what fits is found by halving; the limit stays for the calls that follow."""
    calls = []

    def function(x):
        calls.append(len(x))
        if len(x) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    chunker, x = Chunker(), torch.arange(32.0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(chunker(function, x), 2 * x)
    assert calls == [32, 16, 8, 8, 8, 8] and chunker.limit == 8 and "going on with 8" in caplog.text
    chunker(function, x)
    assert calls[6:] == [8] * 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("something else")])
def test_what_cannot_be_helped_is_raised(error):
    def function(x):
        raise error

    with pytest.raises(RuntimeError, match=str(error)):
        Chunker()(function, torch.zeros(4))
    with pytest.raises(ValueError, match="at least one row"):
        Chunker(0)


def test_live_bytes_of_a_known_sequence():
    """Three tensors of 4,000 bytes of which two live at a time; views cost nothing, nor does what came from outside."""
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        a = outside + 1
        b = a.view(10, 100) * 2
        del a
        c = b + 1
        assert (live.now, live.peak) == (8000, 8000)
        del b, c
    assert live.now == 0


def test_rows_of_a_cpu_are_bounded():
    device = torch.device("cpu")
    megabytes = torch.zeros(2**20)  # 4 MiB a row
    assert peak_bytes(lambda: megabytes + 1) == 4 * 2**20
    assert rows_that_fit(lambda: megabytes + 1, device) == min(64, int(0.6 * free_bytes(device)) // (4 * 2**20))
    assert rows_that_fit(lambda: torch.zeros(1) + 1, device) == 4096
