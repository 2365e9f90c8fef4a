"""Words of the sentences that commands and pages say."""

from __future__ import annotations


def count_noun(number: int, one: str, several: str | None = None) -> str:
    """Return a number with what it counts: "1 image", "3 images".

    Args:
        number: how many.
        one: the word, or words, where there is one.
        several: those where there are others; `one` with an s where not given.
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
