"""What wraps a model's denoiser: epsilon scaling, clipping, a classifier's gradient; in this order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import sha256
from ldm.diffusion.classifier_guidance import ClassifierScore, classifier_guided
from ldm.diffusion.denoiser import Clipping, Denoiser, clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, load_scaling, published_scaling, scaled
from ldm.diffusion.samplers import SAMPLERS, ancestral, ddim
from ldm.diffusion.samplers.ancestral import MeanShift
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.classifier import NoisyClassifier, load_classifier_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.settings import ClassifierGuidance, Sampling, Scaling
from ldm.training.config_keys import load_checked_config
from ldm.util import instantiate_from_config

PUBLISHED = "published"


@dataclass(frozen=True)
class GuidingClassifier:
    """A classifier of noisy images, ready to guide: `module(x, t) -> logits [B, n_classes]`."""

    module: nn.Module
    n_classes: int
    scale: float
    checkpoint: Path

    def score(self, model: LatentDiffusion, labels: Tensor | None) -> ClassifierScore:
        """Return the gradient of its log probability of classes [B].

        Raises:
            ValueError: where there are no classes to guide to.
        """
        if labels is None:
            raise ValueError("a classifier guides to classes, and these images have none: name classes")
        return ClassifierScore(self.module, model.schedule, labels, self.scale)

    def describe(self) -> dict[str, Any]:
        """What guided images depend on."""
        return {"sha256": sha256(self.checkpoint), "scale": self.scale}


@dataclass(frozen=True)
class Wrappers:
    """Epsilon scaling, clipping and a classifier, each of which may be off, around the denoiser of `model`."""

    model: LatentDiffusion
    scaling: EpsilonScaling
    clip: Clipping
    classifier: GuidingClassifier | None

    @cached_property
    def off(self) -> bool:
        """Whether nothing is wrapped."""
        return self.scaling.off and not self.clip and self.classifier is None

    def wrap(self, denoiser: Denoiser, times: Tensor, sampler: str, labels: Tensor | None) -> Denoiser:
        """`denoiser` as `sampler` shall see it; ancestral sampling takes the classifier by `mean_shift` instead."""
        path = self.model.schedule
        denoiser = scaled(denoiser, path, self.scaling, times)
        if self.clip:
            keeps_eps = self.clip == "x0_only" and SAMPLERS[sampler] is ddim
            denoiser = clipped(denoiser, path, rederive=not keeps_eps)
        if self.classifier is None or SAMPLERS[sampler] is ancestral:
            return denoiser
        return classifier_guided(denoiser, self.classifier.score(self.model, labels))

    def mean_shift(self, sampler: str, labels: Tensor | None) -> MeanShift | None:
        """What ancestral sampling adds to its means, if it is guided by a classifier."""
        if self.classifier is None or SAMPLERS[sampler] is not ancestral:
            return None
        return self.classifier.score(self.model, labels).mean_shift

    def describe(self) -> dict[str, Any]:
        """What the outputs depend on; None where a wrapper is off."""
        return {
            "epsilon_scaling": None if self.scaling.off else self.scaling.as_dict(),
            "clip_denoised": self.clip or None,
            "classifier": None if self.classifier is None else self.classifier.describe(),
        }


def make_wrappers(
    sampling: Sampling, model: LatentDiffusion, config: Mapping[str, Any], device: torch.device
) -> Wrappers:
    """Make the wrappers that `sampling` asks for.

    Raises:
        ValueError: for values that exclude each other, or that the model or the sampler cannot follow.
    """
    clip = model.clip_denoised if sampling.clip is None else sampling.clip
    if clip and not isinstance(model.first_stage_model, IdentityFirstStage):
        raise ValueError("--clip_denoised is for models of pixels in [-1, 1]; this one diffuses latents")
    scaling = make_scaling(sampling.scaling, config, sampling.steps, sampling.sampler)
    scaling.check_sampler(sampling.sampler)
    if clip is True and scaling.direction == "x0_only" and not scaling.off:
        raise ValueError(
            "--eps_direction x0_only is full on clipped models, whose eps is derived again from the clipped x_0: "
            "leave it out, or turn clipping off"
        )
    return Wrappers(model, scaling, clip, load_guiding_classifier(sampling.classifier, model, device))


def make_scaling(
    given: Scaling, config: Mapping[str, Any], steps: int | str | None, sampler: str | None = None
) -> EpsilonScaling:
    """Read the schedule file, or take k t + b; each of the other fields changes a schedule, too.

    Published values are those of the number of steps, and of the sampler where they are one sampler's alone.

    Raises:
        ValueError: for a schedule together with b or k.
    """
    beside = [name for name in ("unit", "window", "direction") if getattr(given, name) is not None]
    if beside and not given.given:
        raise ValueError(f"--eps_{beside[0]} acts on a scaling: give --eps_scaler, --eps_slope or --eps_schedule")
    if given.schedule is not None:
        if given.b is not None or given.slope is not None:
            raise ValueError("--eps_schedule replaces --eps_scaler and --eps_slope: give the file, or b and k")
        scaling = load_scaling(given.schedule)
    elif isinstance(given.b, str):
        if given.slope is not None:
            raise ValueError(f"--eps_scaler {given.b} brings its own slope: leave out --eps_slope")
        scaling = _published(config.get("epsilon_scaling"), steps, given.b != PUBLISHED, sampler)
    else:
        scaling = EpsilonScaling(1.0 if given.b is None else given.b, given.slope or 0.0)
    changes: dict[str, Any] = {"unit": given.unit, "window": given.window, "direction": given.direction}
    return replace(scaling, **{name: value for name, value in changes.items() if value is not None})


def _published(
    entries: Iterable[Mapping[str, Any]] | None, steps: int | str | None, linear: bool, sampler: str | None
) -> EpsilonScaling:
    """Return the config's published scaling for a number of steps, given as a number or as a respacing "100"."""
    count = int(str(steps).removeprefix("ddim")) if str(steps).removeprefix("ddim").isdigit() else None
    if not entries or count is None:
        raise ValueError(
            "--eps_scaler published needs a config with a section epsilon_scaling (configs/guided-diffusion, "
            f"configs/edm) and the number of steps (--steps 100); got --steps {steps}"
        )
    return published_scaling(entries, count, linear, sampler)


def load_guiding_classifier(
    given: ClassifierGuidance, model: LatentDiffusion, device: torch.device
) -> GuidingClassifier | None:
    """Load the classifier that guides; None where none is given.

    Its config is that of a `NoisyClassifier`, or names the network itself (configs/guided-diffusion).

    Raises:
        ValueError: if config or weights are missing, or the classifier was trained on other noise levels than the
            model.
    """
    if given.config is None and given.checkpoint is None:
        if given.scale is not None:
            raise ValueError("--classifier_scale needs --classifier_config and --classifier_ckpt")
        return None
    if given.config is None or given.checkpoint is None:
        raise ValueError("guidance by a classifier needs both --classifier_config and --classifier_ckpt")
    found = instantiate_from_config(load_checked_config([given.config], build=("model",)).model)
    network = found.classifier if isinstance(found, NoisyClassifier) else found
    if isinstance(found, NoisyClassifier) and not found.knows(model.schedule):
        raise ValueError(f"{given.config} is a classifier for other noise levels than the model's")
    load_classifier_weights(network, given.checkpoint, found if isinstance(found, NoisyClassifier) else model)
    module = network.to(device).eval().requires_grad_(False)
    shape = (1, *model.latent_shape)
    with torch.no_grad():
        n_classes = module(torch.zeros(shape, device=device), torch.zeros(1, device=device)).shape[-1]
    scale = 1.0 if given.scale is None else given.scale
    return GuidingClassifier(module, n_classes, scale, Path(given.checkpoint))
