"""Plain values: what moves samples towards their class, beside the scale of classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ldm.options import check_options, option


@dataclass(frozen=True)
class Guidance:
    """Where guidance acts, what it leads away from, and how far that of each member goes (docs/samplers.md).

    Raises:
        ValueError: for an interval that is empty.
    """

    interval: Annotated[
        tuple[float, float] | None, option(name="guidance_interval", metavar="LOW HIGH", default="everywhere")
    ] = None
    """Guide only where sigma / alpha is above LOW and at most HIGH; elsewhere the scale is 1."""
    rescale: Annotated[float | None, option(name="guidance_rescale", metavar="PHI", default="0, off")] = None
    """The share, 0 to 1, of guided outputs whose deviation over an image is made that of the conditional ones."""
    guide: Annotated[str | None, option(metavar="DIR", default="the null class")] = None
    """Lead away from this model, a smaller or an earlier one, in place of the null class: its run directory, or a
    checkpoint in one."""
    epoch: Annotated[int | None, option(name="guide_epoch", metavar="N", default="the last checkpoint")] = None
    """The checkpoint that the run of --guide kept of this epoch."""
    member_scales: Annotated[tuple[float, ...] | None, option(metavar="S ...", default="--scale for all")] = None
    """The scale of guidance of each member of an ensemble, in place of one for all."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"--guidance_interval expects 0 <= LOW < HIGH of sigma / alpha, got {self.interval}")
        if self.epoch is not None and self.guide is None:
            raise ValueError("--guide_epoch chooses a checkpoint of the run that --guide names: give --guide, too")


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by the gradient of a classifier of noisy images (Dhariwal and Nichol 2021, section 4)."""

    config: Annotated[str | None, option(name="classifier_config", metavar="YAML", default="no classifier")] = None
    """The config of a noisy classifier."""
    checkpoint: Annotated[str | None, option(name="classifier_ckpt", metavar="FILE", default="no classifier")] = None
    """Its weights: the checkpoint of a run, or guided-diffusion's file."""
    scale: Annotated[float | None, option(name="classifier_scale", metavar="S", default="1")] = None
    """The scale of its gradient, which epsilon scaling leaves alone."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Steering:
    """How an ensemble's samples are led to where its members agree, and where they spend steps (docs/acting.md).

    Raises:
        ValueError: for a direction without a strength.
    """

    strength: Annotated[float | None, option(name="steer", metavar="S", default="0, off")] = None
    """Lead the base member, up to the branch, to where the members agree: a turn of its predicted noise by this share
    of its length; below 0 away from there."""
    by: Annotated[
        Literal["disagreement", "edges", "random"] | None,
        option(name="steer_by", metavar="disagreement|edges|random", default="disagreement"),
    ] = None
    """What is made small: how far the members are apart; or a control of the same strength, edges or a direction."""
    spread: Annotated[float | None, option(name="steer_steps", metavar="POWER", default="0, off")] = None
    """Lay the steps closer where the members are further apart, in proportion to that variance to this power."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.by is not None and not self.strength:
            raise ValueError(
                f"--steer_by {self.by} says what steers, and not how strongly: give --steer, 0.1 for example"
            )

    def describe(self) -> str:
        """Return ", steered 0.1 by edges, steps spread 0.5" for a title; nothing of samples that are not steered."""
        led = f", steered {self.strength:g} by {self.by or 'disagreement'}" if self.strength else ""
        return led + (f", steps spread {self.spread:g}" if self.spread else "")
