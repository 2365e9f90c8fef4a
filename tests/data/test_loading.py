"""What fails in a loader's worker is raised in one sentence, and no worker keeps the process from ending."""

import subprocess
import sys

import pytest

from ldm.data.loading import Loader, WorkerTraceback, shorten_worker_error

# A worker waits for ever, and the main process fails: Python's own way to end it would wait as well.
HANGS = """
import time
from ldm.data.loading import Loader

class Slow:
    def __len__(self): return 8
    def __getitem__(self, index):
        if index == 4: time.sleep(1000)
        return index

batches = iter(Loader(Slow(), batch_size=2, num_workers=2))
next(batches)
kept = batches.batches
raise SystemExit(7)
"""


class Failing:
    """Sixteen numbers, of which one fails in a way of its own."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return index


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the file a b.png\nValueError: is broken"), "the file a b.png\nValueError: is broken"),
        (OSError(28, "No space left on device", "/x/y"), "[Errno 28] No space left on device: '/x/y'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_an_error_of_a_worker_says_what_it_said_there(error, said):
    with pytest.raises(type(error)) as caught:
        list(Loader(Failing(error), batch_size=2, num_workers=1))
    assert str(caught.value) == said
    assert isinstance(caught.value.__cause__, WorkerTraceback) and "__getitem__" in str(caught.value.__cause__)


def test_the_last_of_chained_errors_is_told_and_other_texts_are_left():
    text = "Caught KeyError in DataLoader worker process 3.\nOriginal Traceback (most recent call last):\n"
    chain = "  File x\nOSError: first\n\nThe above\n\nTraceback (most recent call last):\n  File y\n    z\n"
    assert shorten_worker_error(f"{text}{chain}pkg.KeyError: 'second: third'\n") == "'second: third'"
    assert shorten_worker_error("the disk burns") is None


def test_without_workers_errors_are_as_they_are():
    error = ValueError("as it is")
    with pytest.raises(ValueError, match="as it is") as caught:
        list(Loader(Failing(error), batch_size=2))
    assert caught.value is error


@pytest.mark.slow
def test_a_process_ends_whatever_its_workers_do():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and not done.stderr
