"""A step of `decu uncertainty study`: a command, and whether what it makes is there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class StudyStep:
    """A step of a study.

    Attributes:
        title: what it does, in words.
        name: of its command.
        words: of its command.
        done: whether what it makes is there.
        run: of a training, the name of its run directory after the time.
    """

    title: str
    name: str
    words: list[str]
    done: bool
    run: str | None = None

    @property
    def command(self) -> str:
        """The command line of the step."""
        return shlex.join(["decu", *self.name.split(), *self.words])

    def by_hand(self, own_classes: Iterable[str]) -> str:
        """Return the command line as one gives it, which admits classes of one's own in the files that it reads.

        Args:
            own_classes: that the config names; a command that is given the config needs no word for them.
        """
        packages = sorted({name.partition(".")[0] for name in own_classes})
        words = [] if "--base" in self.words else [word for name in packages for word in ("--trust", name)]
        return " ".join([self.command, *words])


def find_foreign_classes(file: str, member: DictConfig) -> set[str]:
    """Return the classes beyond this project's that a config of the user's names, for its base model or its members.

    Args:
        file: the config; member: the same as a member reads it, with words.
    """
    from ldm.training.config import read_config
    from ldm.trust import find_own_classes, is_admitted

    named = find_own_classes(read_config(file)) | find_own_classes(member)
    return {name for name in named if not is_admitted(name)}
