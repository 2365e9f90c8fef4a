"""A step of `decu uncertainty study`: a command, and whether what it makes is there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def base_words(changes: Sequence[str]) -> list[str]:
    """Return the words a.b=c that change the base model."""
    return [word for word in changes if not word.startswith("components.")]


def member_words(file: str, changes: Sequence[str]) -> list[str]:
    """Return the words that change members: those of the base model but where `components` has its own value."""
    from omegaconf import OmegaConf

    from ldm.training.config import read_config

    own = read_config(file).get("components") or OmegaConf.create()
    base = base_words(changes)
    return [word for word in changes if word not in base or OmegaConf.select(own, word.partition("=")[0]) is None]


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
    own = load_config([str(one) for one in run.config_files()], needs=())  # read, and nothing of it is built
    other = find_other_config(own, load_config([file], base_words(changes)))
    if other:
        print(
            f"note: {run.path} was trained by a config with other {', '.join(other)}, and is used as it is: for a "
            "study of the new one give the config another name and folder (decu new --out --folder)"
        )


def find_other_config(old: DictConfig, new: DictConfig) -> list[str]:
    """Return the keys of data and classes that two configs have otherwise, once what they refer to is put in."""
    keys = ("data.params.train", "data.params.validation", "model.params.cond_stage_config")
    was, now = _fill_in(old), _fill_in(new)
    return [key for key in keys if _look_up(was, key) != _look_up(now, key)]


def refuse_idle_words(run: RunDirectory | None, words: Sequence[str], seed: int | None = None) -> None:
    """Refuse words that can change nothing any more, since a training that is there had other values.

    Args:
        run: of the training, None where there is none.
        words: a.b=c for the training, or components.a.b=c, which its config holds as a.b.
        seed: of its members.

    Raises:
        ValueError: naming the first such word, and what the training had.
    """
    from omegaconf import OmegaConf

    if run is None or not run.has_config:
        return
    had = {**_fill_in(run.config()), "lightning": _fill_in(run.config("lightning"))}
    asked = [] if seed is None else [(f"--seed {seed}", "run.seed", seed)]
    for word in words:
        own = OmegaConf.to_container(OmegaConf.from_dotlist([word.removeprefix("components.")]))
        asked += [(word, key, value) for key, value in _leaves(own) if "${" not in str(value)]
    for word, key, value in asked:
        old = _look_up(had, key)
        if old != value:
            raise ValueError(
                f"{word} comes too late: {run.path} was trained with {'none' if old is None else old}, and a study "
                "keeps what is there; leave the word out, or give another --logdir or a config of another name"
            )


def _leaves(plain: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in plain mappings that is none itself."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _fill_in(config: DictConfig) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def _look_up(plain: Any, key: str) -> Any:
    """Return what is at a dotted key of plain mappings, None where there is nothing."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, Mapping) else None
    return plain
