"""The weaker model that guidance leads away from (autoguidance, Karras et al. 2024b), and which options act."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import sha256
from ldm.diffusion.denoiser import Denoiser, NetworkDenoiser
from ldm.diffusion.guidance import GuidanceRule, RuledGuidance, SharedDenoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.translated import TranslatedDenoiser
from ldm.memory import ChunkedNetwork, Chunker
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.building import build_model, load_weights
from ldm.settings import Guidance
from ldm.training.config_keys import read_model_config
from ldm.training.runs import find_run


@dataclass(frozen=True)
class Guide:
    """A weaker model of the same classes, images and latents, with averaged weights where it has them.

    Args:
        model: frozen, on its device.
        checkpoint: where its weights came from.
        passes: bounds the images in one pass of its network.
    """

    model: LatentDiffusion
    checkpoint: Path
    passes: Chunker

    def denoiser(self, schedule: Schedule, cond: Tensor | None) -> Denoiser:
        """Return its denoiser of states of another model's schedule, for classes [B] (None: unconditional)."""
        network = ChunkedNetwork(self.model.network, self.passes)
        learned = self.model.learned_variance is not None
        own = SharedDenoiser(network, self.model.schedule, self.model.target, cond, learned)
        return own if self._knows(schedule) else TranslatedDenoiser(own, self.model.schedule, schedule)

    def _knows(self, schedule: Schedule) -> bool:
        """Whether times of a schedule are this model's: the same data and noise in each."""
        own = self.model.schedule
        times = torch.linspace(0, 1, 101, dtype=torch.float64) * schedule.end
        pairs = ((getattr(own, name), getattr(schedule, name)) for name in ("alpha", "sigma"))
        return own.end == schedule.end and all(torch.equal(one(times), other(times)) for one, other in pairs)

    def describe(self) -> dict[str, Any]:
        """Return what guided images depend on."""
        return {"checkpoint": self.checkpoint.name, "sha256": sha256(self.checkpoint)}


def load_guide(given: Guidance, model: LatentDiffusion, device: torch.device, passes: Chunker) -> Guide:
    """Load the model that `given.guide` names.

    Raises:
        ValueError: if it makes other images than `model`, or of other classes.
        FileNotFoundError: if a file is missing.
    """
    run, checkpoint = find_run(str(given.guide), given.epoch)
    config = read_model_config(run, None)
    load_weights(found := build_model(config), checkpoint, config=config)
    for what, own, other in (
        ("states of shape", model.latent_shape, found.latent_shape),
        ("number of classes", model.n_classes, found.n_classes),
        ("latents of a first stage", _encodes(model), _encodes(found)),
        ("scale_factor", float(model.scale_factor), float(found.scale_factor)),
    ):
        if own != other:
            raise ValueError(
                f"--guide {given.guide} is a model of other images: its {what} is {other}, the model's is {own}"
            )
    return Guide(found.to(device).eval().requires_grad_(False), checkpoint, passes)


def _encodes(model: LatentDiffusion) -> bool:
    return not isinstance(model.first_stage_model, IdentityFirstStage)


def check_guidance(given: Guidance, scale: float, conditional: bool, members: int) -> None:
    """Make sure that what is said of guidance acts.

    Args:
        given: what is said.
        scale: of guidance.
        conditional: whether there is a condition to guide to.
        members: number of members that sample; 1 for a model.

    Raises:
        ValueError: naming the option that would not act, or does not fit.
    """
    if given == Guidance():
        return
    name = "--" + next(
        option
        for option, value in (
            ("guidance_interval", given.interval),
            ("guidance_rescale", given.rescale),
            ("member_scales", given.member_scales),
            ("guide", given.guide),
        )
        if value is not None
    )
    if given.guide is None and not conditional:
        raise ValueError(f"{name} is one of guidance, and this model has no classes: name a weaker model with --guide")
    scales = given.member_scales
    if scales is not None and (members == 1 or len(scales) != members):
        of = f"there are {members} members" if members > 1 else "this is no ensemble"
        raise ValueError(f"--member_scales takes a scale for each member of an ensemble; got {len(scales)}, {of}")
    if all(one == 1 for one in scales or (scale,)):
        raise ValueError(f"{name} acts on guidance, which the scale 1 turns off: give --scale, above 1 for example")


def make_guided(
    own: NetworkDenoiser, null: Any, scale: float | Tensor, given: Guidance, guide: Guide | None
) -> Denoiser:
    """Return a denoiser under guidance.

    Args:
        own: of the model.
        null: null conditions [B, ...]; they are not looked at where there is a guide.
        scale: of guidance: one, or those of members or images, see `GuidanceRule`.
        given: where it acts, and how its size is corrected.
        guide: the weaker model; None: the null condition.

    Raises:
        ValueError: if there is neither a guide nor a null condition.
    """
    if guide is None and (own.cond is None or null is None):
        raise ValueError("guidance needs a conditional model and its null class, or a weaker model: use scale 1")
    low, high = given.interval or (0.0, math.inf)
    rule = GuidanceRule(scale, low, high, given.rescale or 0.0)
    weaker = None if guide is None else guide.denoiser(own.schedule, own.cond)
    return RuledGuidance(own, weaker, null, rule)
