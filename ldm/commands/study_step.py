"""A step of `decu uncertainty study`: a command, and whether what it makes is there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.training.runs import RunDirectory


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


def say_other_config(run: RunDirectory | None, file: str, changes: Sequence[str]) -> None:
    """Say that a base model which is there was trained on other data or classes than a config names by now.

    Args:
        run: of the base model, None where there is none.
        file: the config.
        changes: words a.b=c over it.
    """
    from ldm.training.config import load_config

    if run is None or not run.has_config:
        return
    words = [word for word in changes if not word.startswith("components.")]
    own = load_config([str(one) for one in run.config_files()], needs=())  # read, and nothing of it is built
    other = find_other_config(own, load_config([file], words))
    if other:
        print(
            f"note: {run.path} was trained by a config with other {', '.join(other)}, and is used as it is: for a "
            "study of the new one give the config another name and folder (decu new --out --folder)"
        )


def find_other_config(old: DictConfig, new: DictConfig) -> list[str]:
    """Return the keys of data and classes that two configs have otherwise, once what they refer to is put in."""
    from omegaconf import OmegaConf

    keys = ("data.params.train", "data.params.validation", "model.params.cond_stage_config")
    return [key for key in keys if OmegaConf.select(_resolve(old), key) != OmegaConf.select(_resolve(new), key)]


def _resolve(config: DictConfig) -> DictConfig:
    from omegaconf import OmegaConf

    copy = config.copy()
    OmegaConf.resolve(copy)
    return copy
