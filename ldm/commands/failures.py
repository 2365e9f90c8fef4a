"""How a command that cannot go on says so: one sentence with the file, the cause and what to do."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.commands.words import find_switches

# What a failure of the system means for a user, by its number; {file} is the file, where it is known.
SYSTEM_FAILURES = {
    errno.ENOSPC: "the disk of {file} is full: free some space, or choose another folder, and start it again",
    errno.EDQUOT: "the quota of the disk of {file} is used up: free some space, or choose another folder",
    errno.EFBIG: "{file} would be larger than its disk takes: choose another folder",
    errno.EROFS: "the disk of {file} is read-only: choose another folder",
    errno.EACCES: "there is no permission for {file}: change its rights, or choose another path",
    errno.EPERM: "there is no permission for {file}: change its rights, or choose another path",
    errno.ENAMETOOLONG: "the path {file} is too long for its disk: choose shorter names",
    errno.ELOOP: "{file} is a link that leads back to itself: remove it, or choose another path",
    errno.EISDIR: "{file} is a folder, where a file is expected: name a file",
    errno.ENOTDIR: "a part of the path {file} is a file, where a folder is expected: choose another path",
    errno.EEXIST: "{file} exists: choose another path",
    errno.ENOENT: "there is no {file}: check the path",
    errno.ENOTEMPTY: "the folder {file} is not empty: another process writes there, or choose another one",
    errno.EIO: "the disk of {file} fails (input/output error): copy what is there, and choose another disk",
    errno.ESTALE: "the network disk of {file} lost it: wait until the disk is back, and start it again",
    errno.ENOTCONN: "the network disk of {file} is gone: wait until it is back, and start it again",
    errno.EMFILE: "too many files are open ({file}): raise the limit (ulimit -n), or take fewer workers",
    errno.EXDEV: "{file} lies on another disk than its folder: choose another path",
    errno.EBUSY: "{file} is in use: close what uses it, and start it again",
    errno.ENOMEM: "the memory is used up ({file}): take smaller batches, or fewer workers",
}
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Of a foreign message no more than this is shown.
LONGEST = 500
_LONG_WORD = re.compile(rf"\S{{{LONGEST},}}")
DEBUG_HINT = "--debug shows where it comes from"
STANDARD_LIBRARY = sysconfig.get_path("stdlib")
PACKAGE = Path(__file__).parents[1]


def describe_failure(error: BaseException, command: Any = None) -> str:
    """Return one sentence on why a command ended: the file, the cause, and what to do.

    A message of this project is taken as it is. One of a library is put behind what was done when it came, since a
    library knows neither the option nor the key that its value was given by.

    Args:
        error: what ended it.
        command: whose output is meant where a disk is full and the system does not say which file.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return describe_system_failure(error, find_output(command))
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        remedy = "take smaller numbers and batches (--batch_size, --chunk, data.params.batch_size)"
        return f"the memory is used up: {remedy}: {first_line(error)}"
    if isinstance(error, ImportError):
        return f"{first_line(error)}: install what is missing, `pip install` names it as the message does"
    if _is_ours(error) and not isinstance(error, (LookupError, AssertionError)):
        return _LONG_WORD.sub(lambda found: _shorten(found[0]), str(error))
    return f"{_place(error)} failed with {kind}: {first_line(error)}; {DEBUG_HINT}"


def find_output(command: Any) -> str | None:
    """Return where a command writes, None where no option says it."""
    holders = (command, getattr(command, "training", None), getattr(command, "output", None))
    places = [getattr(holder, name, None) for name in ("out", "outdir", "logdir") for holder in holders]
    return next((place for place in places if isinstance(place, str) and place), None)


def describe_system_failure(error: OSError, output: str | None = None) -> str:
    """Return one sentence on a failure of the system: disk full, no permission, a path that cannot be.

    Args:
        error: the system's.
        output: what is written, for failures of writing that do not say it.
    """
    if _is_ours(error) and error.filename is None:
        return str(error)
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    unnamed = output if output is not None and error.errno in OF_WRITING else "what is written or read"
    file = _shorten(" -> ".join(named)) if named else unnamed
    known = SYSTEM_FAILURES.get(error.errno or 0)
    return known.format(file=file) if known else f"{file}: {error.strerror or error}"


def first_line(error: BaseException) -> str:
    """Return a foreign message on one line, shortened."""
    words = " ".join(str(error).split())
    return _shorten(words) or "no message"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 60]} ... {text[-50:]}"


def _is_ours(error: BaseException) -> bool:
    """Whether a `raise` of this project, or of a user's own module, made it, so that its message is meant for a user.

    What float() or a product of tensors raises comes from one of our lines as well, in the words of a library.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    library = "site-packages" in frames[-1].filename or frames[-1].filename.startswith((STANDARD_LIBRARY, "<"))
    return not library and (frames[-1].line or "raise").startswith("raise")


def _place(error: BaseException) -> str:
    """Name the innermost function of this project that a failure went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    frame = own[-1] if own else (frames[-1] if frames else None)
    if frame is None:
        return "the command"
    return f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})"


def end_bars() -> None:
    """End the progress bars that are on the screen, so that what is printed next stands on a line of its own."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()


@contextlib.contextmanager
def refused_words() -> Iterator[None]:
    """End the process with code 2 and the message, where words do not fit together.

    What a value refuses when it is made is said in the same way, where the parser would frame it with a class's name,
    and so is a value that an option cannot take; what the parser says of words that it does not know stays as it is.
    """
    said = io.StringIO()
    said.isatty = sys.stderr.isatty  # type: ignore[method-assign]  # which decides on colours
    refusal: BaseException | str | None = None
    try:
        with contextlib.redirect_stderr(said):
            yield
    except (ValueError, SystemExit) as end:
        refusal = _find_refusal(end) or _unbox(said.getvalue())
        if refusal is None:
            raise
    finally:
        sys.stderr.write(said.getvalue() if refusal is None else f"error: {refusal}\n")
    if refusal is not None:
        sys.exit(2)


def _unbox(said: str) -> str | None:
    """Return in a sentence what the parser says in a box of a value that it cannot read, None of anything else."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in said.splitlines()]
    text = " ".join(lines)
    named = re.search(r"Error parsing (?:-\w/)?(--\S+): (.*?) (?:Got errors:|[─-]{9})", text)
    if named is None:
        return None
    flag, words = named[1], named[2].strip()
    shown = next((line for line in lines if re.match(rf"(-\w[^-]*, )?{flag} ", line)), "")
    given = re.search(r"instantiated from \[(.*)\]\.$", words)
    found = f"got {given[1].replace(chr(39), '') or 'nothing'}" if given else words
    see = re.search(r"For full helptext, see (.*? --help)", text)
    return f"{flag} takes {shown.rpartition(f'{flag} ')[2] or 'another value'}: {found}" + (
        f"; see {see[1]}" if see else ""
    )


def _find_refusal(end: BaseException) -> BaseException | None:
    """Return the ValueError that an exception is, or the one of this project that it came of."""
    if isinstance(end, ValueError):
        return end
    before = end.__context__
    while before is not None and not (type(before) is ValueError and _is_ours(before)):
        before = before.__context__
    return before


@contextlib.contextmanager
def until_reader_leaves() -> Iterator[None]:
    """End the process with code 141 and no traceback where what read its output is gone, as in `decu --help | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def take_debug(kind: type, words: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without --debug, unless it is an option of the command's own, and whether it was among them."""
    end = list(words).index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    if any(switch.name == "debug" for switch in find_switches(kind)):
        return list(words), debug
    return [*(word for word in words[:end] if word != "--debug"), *words[end:]], debug
