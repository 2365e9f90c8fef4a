"""What the parts of a training ask of a model, so that any module that has it will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from ldm.ensembles.heads import ClassTables, HasNamedParameters
from ldm.util import ImageSize


class HasParameters(HasNamedParameters, Protocol):
    """Parameters that can be asked for by name, as every `nn.Module` has them."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a name."""


class HasHeads(HasParameters, Protocol):
    """What training a member of an ensemble asks of a model: heads by name, and a base checkpoint that it can read.

    Attributes:
        channels: of the states that are noised.
        image_size: height and width of these, one number where they are equal.
        weight_decay: of the optimiser.
        head_patterns: state-dict patterns of each head, see `ldm.ensembles.heads`.
    """

    channels: int
    image_size: ImageSize
    weight_decay: float

    @property
    def head_patterns(self) -> Mapping[str, Sequence[str]]: ...

    @property
    def class_tables(self) -> ClassTables:
        """Which parameters hold something for each class."""

    @property
    def network(self) -> nn.Module:
        """The network of (x, t, condition), which shares this model's parameters under the same names."""

    def init_from_ckpt(self, path: str, *, use_averaged: bool = False) -> None:
        """Load a checkpoint strictly; `use_averaged` takes its averages, where it has them, as the weights."""

    def drop_averages(self) -> None:
        """Keep no averages of the weights from now on."""
