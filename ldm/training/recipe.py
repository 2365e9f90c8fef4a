"""Configs for one's own pictures: what a survey of them suggests, written as YAML with a comment beside each key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ldm.data.survey import Survey

# From this side on the model generates latents of a first stage, whose sides are a quarter.
LATENT_FROM = 64
FACTOR = 4
LATENT_CHANNELS = 4
# What the config says of a data set's parameters.
COMMENTS = {
    "target": "how the pictures are read; see docs/own_pictures.md",
    "depth": "how many levels of folders name a class",
    "test_fraction": "share of each class for validation",
    "split": "which split of them",
    "folder": "the folder of this split",
    "file": "the list of paths with classes or captions",
    "broken": "a picture that cannot be read is replaced by the next of its class",
    "class_names": "the classes in their order, where a split may lack some",
    "image_size": "side in pixels; the middle is cut out",
    "channels": "1 for grey, 3 for colour",
}


@dataclass(frozen=True)
class Recipe:
    """A model for one's own pictures, and how long it trains; a place to start from.

    A base model of 1,437 pictures trains 1,200 steps at 8x8 (the digits of this project, of which 99 % are recognised),
    longer with more pictures and larger ones; from 64 pixels on it generates latents of a first stage.

    Args:
        survey: what was found of the pictures.
        size: side of the pictures in pixels, a multiple of 4; of 16 where it generates latents.
        folder: where bins and checkpoints go.
        width: channels of the finest resolution.
        workers: processes that read pictures.
        latent: whether the model generates latents; None decides by the size.

    Raises:
        ValueError: if the size does not fit.
    """

    survey: Survey
    size: int
    folder: str
    width: int = 32
    workers: int = 0
    latent_choice: bool | None = None

    def __post_init__(self) -> None:
        unit = 4 * FACTOR if self.latent else 4
        if self.size < 8 or self.size % unit:
            kind = "of a model in latents" if self.latent else "of a model in pixels"
            raise ValueError(f"--size {kind} must be a multiple of {unit}, 8 at least; got {self.size}")
        layout = self.survey.layout
        written = [self.root, self.folder, *layout.shared.get("class_names", ()), *self.words]
        wrong = next((name for name in written if "${" in name), None)
        if wrong is not None:
            raise ValueError(f"a config takes ${{ for a reference to another key: rename {wrong}")
        listed = [*written, *self.survey.class_names, *(path for part in layout.owners.values() for path in part)]
        odd = next((name for name in listed if not name.isprintable()), None)
        if odd is not None:
            raise ValueError(f"lists of pictures have a line for each, of signs that can be printed: rename {odd!r}")

    @property
    def latent(self) -> bool:
        """Whether the model generates latents of a first stage."""
        return self.size >= LATENT_FROM if self.latent_choice is None else self.latent_choice

    @property
    def root(self) -> str:
        """The pictures, by a path that holds in every folder."""
        return str(Path(self.survey.root).resolve())

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.survey.class_names)

    @property
    def images(self) -> int:
        """Number of pictures to train on."""
        return self.survey.total("train")

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return self.survey.channels

    @property
    def side(self) -> int:
        """Side of what the model generates."""
        return self.size // FACTOR if self.latent else self.size

    @property
    def latent_channels(self) -> int:
        """Channels of what the model generates."""
        return LATENT_CHANNELS if self.latent else self.channels

    @property
    def multipliers(self) -> list[int]:
        """Width of each resolution as multiples of the finest; the coarsest has a side of 4 to 8."""
        return [1, 2] if self.side <= 8 else [1, 2, 2] if self.side <= 32 else [1, 1, 2, 2]

    @property
    def attention(self) -> list[int]:
        """What the side is divided by where attention acts: in the coarsest resolution."""
        return [2 ** (len(self.multipliers) - 1)]

    @property
    def batch(self) -> int:
        """Pictures a step."""
        return min(64, max(8, self.images // 4)) if self.images < 256 else 64

    @property
    def steps(self) -> int:
        """Steps of the base model."""
        data = max(1.0, self.images / 1437) ** 0.35
        detail = max(1.0, self.side / 8) ** 0.5
        return min(200_000, 100 * math.ceil(12 * data * detail))

    @property
    def first_stage_steps(self) -> int:
        """Steps of the first stage."""
        return min(50_000, 100 * math.ceil(10 * max(1.0, self.images / 1437) ** 0.35))

    @property
    def member_steps(self) -> int:
        """Steps of a member."""
        return min(5_000, 100 * math.ceil(4 * max(1.0, self.images / 1437) ** 0.35))

    @property
    def every(self) -> int:
        """Epochs between two validations, about ten in a training."""
        epochs = self.steps * self.batch / self.images
        return max(1, round(epochs / 10))

    @cached_property
    def words(self) -> list[str]:
        """The words of the captions in the order of their letters; none where classes are given."""
        if not self.survey.layout.captioned:
            return []
        return sorted({word for caption in self.survey.class_names for word in caption.lower().split()})

    @property
    def longest(self) -> int:
        """Number of words of the longest caption."""
        return max(len(caption.split()) for caption in self.survey.class_names)

    @property
    def train(self) -> str:
        """The split to train on, as YAML: what it shares with the split for validation refers to that."""
        layout = self.survey.layout
        shared = {name: f"${{data.params.validation.params.{name}}}" for name in self._shared}
        return _write({"target": layout.target, "params": {**shared, **layout.train}})

    @property
    def validation(self) -> str:
        """The split for validation, as YAML."""
        layout = self.survey.layout
        return _write({"target": layout.target, "params": {**self._shared, **layout.validation}})

    @property
    def _shared(self) -> dict[str, Any]:
        """Parameters that both splits have."""
        size = self.size if self.latent else "${model.params.image_size}"
        channels = self.channels if self.latent else "${model.params.channels}"
        own = {"root": "${paths.data_root}", "image_size": size, "channels": channels}
        broken = {"broken": "skip"} if self.survey.broken else {}
        return {**self.survey.layout.shared, **own, **broken}


def _write(node: Mapping[str, Any]) -> str:
    """Return a split of a data set as YAML with comments, a key or an item a line."""
    lines = yaml.safe_dump(dict(node), sort_keys=False, width=math.inf, allow_unicode=True).splitlines()
    return "\n".join(line if "${data." in line else _comment(line) for line in lines)


def _write_scalar(value: str) -> str:
    """Return a path or a name as one value of YAML, quoted where it must be."""
    return yaml.safe_dump([value], width=math.inf, allow_unicode=True, default_flow_style=False)[2:].rstrip()


def _comment(line: str) -> str:
    """Return a line of YAML with the comment of its key."""
    comment = COMMENTS.get(line.strip().partition(":")[0], "")
    return f"{line}  # {comment}" if comment else line


def write_recipe(recipe: Recipe, name: str, title: str, command: str, out: str, first_stage: str = "") -> str:
    """Return the text of a config.

    Args:
        recipe: what it says.
        name: "model" or "first_stage".
        title: its first words.
        command: the words that it was written by.
        out: where it will lie.
        first_stage: where the config of the first stage will lie.
    """
    templates = Environment(
        loader=PackageLoader("ldm.training"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates.filters["scalar"] = _write_scalar
    template = templates.get_template(f"{name}.yaml.j2")
    return template.render(recipe=recipe, title=title, command=command, out=out, first_stage=first_stage)
