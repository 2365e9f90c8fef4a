"""What a command says where it cannot go on: one sentence, exit 1, and the traceback where --debug asks for it."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from ldm.commands.failures import SYSTEM_FAILURES, describe_failure
from ldm.commands.line import _run


@dataclass(frozen=True)
class Writes:
    """Writes.

    Args:
        out: where.
    """

    out: str = "results/x"


def one_sentence(message):
    """Whether a message is on one line, and no longer than a screen."""
    return message.strip() != "" and "\n" not in message.strip() and len(message) < 1500


def caught(raising):
    try:
        raising()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@dataclass(frozen=True)
class Fails:
    """Fails.

    Args:
        kind: how.
    """

    kind: str = "key"

    def run(self):
        """Fail as asked."""
        if self.kind == "key":
            return {}["missing"]
        if self.kind == "ours":
            raise ValueError("--n must be at least 1, got 0: give a larger one")
        if self.kind == "folder":
            return open(os.curdir)
        return torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize("kind", ["key", "ours", "folder", "shapes"])
@pytest.mark.parametrize("debug", [False, True])
def test_a_command_ends_with_one_sentence(kind, debug, capsys):
    words = ["--kind", kind, *(["--debug"] if debug else [])]
    with pytest.raises(SystemExit) as end:
        _run(Fails, words, "fails")
    message = str(end.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert ("Traceback" in capsys.readouterr().err) == debug


def test_a_value_of_many_letters_is_cut():
    def fail():
        raise ValueError(f"no layer {'x' * 5000}, known are a, b")

    message = describe_failure(caught(fail))
    assert len(message) < 600 and message.startswith("no layer xxx") and message.endswith("x, known are a, b")


def test_numbers_beyond_the_memory_say_so():
    message = describe_failure(caught(lambda: torch.empty(2**46)))
    assert message.startswith("the memory is used up: take smaller numbers") and "\n" not in message


def test_the_sentence_stands_on_a_line_of_its_own():
    code = """
import sys
from tqdm import tqdm
from ldm.commands.line import _run
from tests.commands.test_failures import Fails
bar = tqdm(total=4, file=sys.stderr)
bar.update(2)
_run(Fails, ["--kind", "ours"], "fails")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "error: --n must be at least 1, got 0: give a larger one" and "50%" in ended.stderr


def test_words_after_two_dashes_are_not_the_commands_own():
    """The command there may have a --debug of its own."""
    with pytest.raises(SystemExit) as end:
        _run(Fails, ["--", "--debug"], "fails")
    assert end.value.code == 2


@pytest.mark.parametrize("number", SYSTEM_FAILURES)
def test_failures_of_the_system_name_the_file(number):
    def fail():
        raise OSError(number, os.strerror(number), "results/a.npz")

    message = describe_failure(caught(fail))
    assert "results/a.npz" in message and "Errno" not in message


def test_a_failure_without_a_file_or_a_number_of_its_own_is_still_a_sentence():
    assert "input" not in describe_failure(OSError(errno.ENOSPC, "x"))
    assert describe_failure(caught(lambda: os.listdir("/proc/self/nothing"))).startswith("there is no /proc")


def test_a_full_disk_without_a_file_is_that_of_the_output():
    """As `write` of an open file says it."""
    named = describe_failure(caught(lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x")), Fails())
    assert named.startswith("the disk of what is written")
    named = describe_failure(caught(lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x")), Writes())
    assert named.startswith("the disk of results/x is full")


def test_a_message_of_a_library_says_what_was_done():
    message = describe_failure(caught(lambda: torch.zeros(2) + torch.zeros(3)))
    assert "failed with RuntimeError" in message and "--debug" in message


def test_long_messages_of_libraries_are_shortened():
    message = describe_failure(
        caught(lambda: torch.nn.Linear(2, 2).load_state_dict({"k" * 50 + str(i): 1 for i in range(99)}))
    )
    assert len(message) < 800 and "\n" not in message
