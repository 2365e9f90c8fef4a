"""What every pipeline holds: a loaded model, the values that say how it is sampled, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.checkpoint import sha256, tensors_sha256
from ldm.diffusion.epsilon_scaling import EpsilonScaling
from ldm.diffusion.samplers import make_sampler
from ldm.diffusion.samplers.registry import Sampler, sampler_defaults
from ldm.memory import Chunker
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.choices import Choices
from ldm.modules.conditioned import ConditionedNetwork
from ldm.pipelines.prompts import make_text_choices
from ldm.pipelines.sizes import resize_states
from ldm.pipelines.speed import keep_deep, with_speed
from ldm.pipelines.wrappers import Wrappers, make_wrappers
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Defaults:
    """What a pipeline takes where neither its values nor the config say: steps (its table's at most), a scale."""

    steps: int = 200
    scale: float = 1.0


def read_scheduled(config: Mapping[str, Any], name: str) -> Any:
    """Return what the scheduler of a folder of diffusers, which a model came from, says of sampling; None: nothing."""
    return (config.get("diffusers") or {}).get(name)


def find_spacing(sampling: Sampling, config: Mapping[str, Any]) -> str:
    """Return how steps are spaced: as `sampling` says, else as the scheduler of a folder of diffusers did."""
    said = isinstance(sampling.steps, str) or sampling.spacing != "auto"
    return sampling.spacing if said else read_scheduled(config, "spacing") or "auto"


@dataclass(frozen=True)
class Pipeline:
    """A model with its weights, and the values that say how it is sampled.

    Attributes:
        model: the frozen model on its device.
        config: what it was trained with.
        checkpoint: the file its weights came from; of an ensemble its base checkpoint. None: they came from memory.
        device: where it runs.
        passes: bounds the images in one pass of the network.
        decoding: bounds the images in one pass of the first stage's decoder.
        sampling, speed: see `ldm.settings`.
        averaged: whether averaged weights were taken, where there were any.
        scaling: epsilon scaling in place of what `sampling` says.
    """

    model: LatentDiffusion
    config: Mapping[str, Any]
    checkpoint: Path | None
    device: torch.device
    passes: Chunker
    decoding: Chunker
    sampling: Sampling = Sampling()
    speed: Speed = Speed()
    averaged: bool = True
    defaults: Defaults = Defaults()
    scaling: EpsilonScaling | None = None

    # Values

    def with_(self, *, sampling: Sampling | None = None, speed: Speed | None = None, **changes: Any) -> Self:
        """Return this pipeline with other values; no file is read again, and this pipeline stays as it is.

        Args:
            sampling, speed: whole values (an ensemble also takes `branching`).
            changes: single fields of these values, `with_(steps=20, eta=1.0)`.

        Raises:
            ValueError: for a field that none of the values has.
        """
        values: dict[str, Any] = {"sampling": sampling or self.sampling, "speed": speed or self.speed}
        return self._changed(values, changes)

    def _changed(self, values: dict[str, Any], changes: Mapping[str, Any]) -> Self:
        given: dict[str, dict[str, Any]] = {}
        for name, change in changes.items():
            known = (key for key, value in values.items() if name in {field.name for field in fields(value)})
            owner = next(known, None)
            if owner is None:
                raise ValueError(f"with_ takes {sorted(values)} or one of their fields, got '{name}'")
            given.setdefault(owner, {})[name] = change
        values.update({owner: replace(values[owner], **own) for owner, own in given.items()})
        kept = {"network", "base_network", "classes", "class_names", "_latent_shape", "null_class", "conditional"}
        if values["sampling"] == self.sampling:
            kept |= {"times", "initial_std", "wrappers", "sampler", "scale", "n_classes"}
        if values["sampling"].guidance == self.sampling.guidance:
            kept |= {"guide"}
        if values["speed"] != self.speed:
            kept -= {"network", "base_network", "sampler"}
            model, passes = with_speed(self.model, values["speed"], self.device)
            values.update(model=model, passes=passes)
        made = replace(self, **values)
        # What does not depend on the changed values is not computed again.
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        return made

    def check(self) -> Self:
        """Make the sampler and all that wraps the denoiser, so that values that do not fit are refused at once.

        Raises:
            ValueError: naming the value.
        """
        _ = (self.times, self.initial_std, self.scale, self.wrappers.off, self.sampler, self.base_network)
        _ = (self.conditional, self.null_class, self._latent_shape)
        if not self.base_network.needs_choices:
            _ = self.n_classes
        return self

    def with_choices(self, choices: Choices) -> Self:
        """Return this pipeline with conditions by number: its classes are prompts or pictures.

        Raises:
            ValueError: if the choices lack what the model is conditioned on.
        """
        return replace(self, model=self.model.with_choices(choices)).check()

    def with_prompts(self, prompts: Sequence[str]) -> Self:
        """Return this pipeline with texts by number: its classes are the prompts.

        They are embedded once where the text encoder is the same for all that is sampled, else by each member.

        Raises:
            ValueError: if the model takes no texts, a prompt comes twice, or there is no tokenizer.
        """
        shared = not self._embeds_differently
        return self.with_choices(make_text_choices(self.model, prompts, embedded=shared))

    def with_size(self, height: int, width: int) -> Self:
        """Return this pipeline for pictures of another height and width, in pixels.

        Raises:
            ValueError: if the network or the first stage does not take them.
        """
        return replace(self, model=resize_states(self.model, height, width)).check()

    @property
    def _embeds_differently(self) -> bool:
        """Whether members have text encoders of their own."""
        return False

    def with_scaling(self, scaling: EpsilonScaling) -> Self:
        """Return this pipeline under another epsilon scaling, one that was estimated for example."""
        return replace(self, scaling=scaling)

    def setting(self, name: str, default: Any) -> Any:
        """Return a value of the config's `uncertainty` section."""
        return (self.config.get("uncertainty") or {}).get(name, default)

    # What follows from them

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint; of weights from memory that of the tensors."""
        return tensors_sha256(self.model.state_dict()) if self.checkpoint is None else sha256(self.checkpoint)

    @cached_property
    def times(self) -> Tensor:
        """Times of the sampler's steps, float64 [S + 1], descending.

        Raises:
            ValueError: if a respacing comes with a spacing, which would not act.
        """
        given = self.sampling.steps
        if isinstance(given, str) and self.sampling.spacing != "auto":
            raise ValueError(f"--steps {given} is a respacing already; leave out --spacing {self.sampling.spacing}")
        most = min(self.defaults.steps, self.model.num_timesteps or self.defaults.steps)
        steps = self.setting("steps", most) if given is None else given
        return self.model.sampling_times(steps, find_spacing(self.sampling, self.config), **self.sampling.levels)

    @cached_property
    def initial_std(self) -> float:
        """Standard deviation of the first states: of the schedule's end, or of the first time where that was chosen."""
        schedule = self.model.schedule
        chosen = self.sampling.sigma_max is not None or self.sampling.spacing == "vp"
        return float(schedule.sigma(self.times[0])) if chosen else schedule.prior_std

    @cached_property
    def scale(self) -> float:
        """Scale of classifier-free guidance.

        Raises:
            ValueError: if guidance is asked for and the model has no null class.
        """
        given = self.sampling.scale
        unguided = self.null_class is None and not self.base_network.needs_choices
        if unguided and self.sampling.guidance.guide is None:
            if given not in (None, 1.0):
                raise ValueError(f"--scale {given}: this model has no null class, there is no guidance")
            return 1.0
        configured = self.config["model"]["params"].get("guidance_scale", self.defaults.scale)
        return configured if given is None else given

    @cached_property
    def wrappers(self) -> Wrappers:
        """Epsilon scaling, clipping and a guiding classifier, as `sampling` says."""
        made = make_wrappers(self.sampling, self.model, self.config, self.device)
        return made if self.scaling is None else replace(made, scaling=self.scaling)

    @cached_property
    def null_class(self) -> int | None:
        """Label of the null class of guidance; None where there is none."""
        return self.model.null_class

    @cached_property
    def conditional(self) -> bool:
        """Whether the model itself takes class labels, texts, or pictures."""
        return bool(self.model.n_classes) or self.model.reads_text or self.base_network.joins_picture

    @cached_property
    def n_classes(self) -> int:
        """Number of real classes (or choices), without the null class; of an unconditional model those of the
        classifier that guides it, or 0.

        Raises:
            ValueError: if the model is conditioned on text or pictures, and none were given.
        """
        if self.base_network.needs_choices:
            kind = "pictures" if self.base_network.joins_picture else "prompts"
            raise ValueError(
                f"this model is conditioned on {kind}: give them (--{kind}; in Python Pipeline.with_prompts or, of "
                "pictures, ldm.pipelines.pictures.with_pictures)"
            )
        if self.model.n_classes or self.wrappers.classifier is None:
            return self.model.n_classes or 0
        return self.wrappers.classifier.n_classes

    @cached_property
    def sampler(self) -> Sampler:
        """The chosen sampler with its options bound; an option that it does not act on is an error."""
        return self._make_sampler(None)

    @property
    def eta(self) -> float:
        """The noise of the sampler's steps: what was given, the sampler's own default, or 0 where it has none."""
        given = self.sampling.eta
        return sampler_defaults(self.sampling.sampler).get("eta", 0.0) if given is None else given

    @property
    def churns(self) -> bool:
        """Whether the sampler adds noise before its steps."""
        able = "S_churn" in sampler_defaults(self.sampling.sampler)
        return able and bool(self.sampling.options.get("S_churn") or self.eta)

    @property
    def sampler_options(self) -> dict[str, Any]:
        """Further options of the sampler: the given ones, and where it churns those of the config's section `churn`.

        Raises:
            ValueError: for options that have a word of their own on the command line.
        """
        given = dict(self.sampling.options)
        own = [name for name in ("eta", "variance", "mean_shift") if name in given]
        if own:
            raise ValueError(f"sampler_options take no {', '.join(own)}: --eta and --variance are options of their own")
        known = sampler_defaults(self.sampling.sampler)
        if self.churns:
            configured = (self.config.get("churn") or {}).items()
            return {name: value for name, value in configured if name in known} | given
        return given

    def _make_sampler(self, labels: Tensor | None) -> Sampler:
        name = self.sampling.sampler
        variance = self.sampling.variance
        known = sampler_defaults(name)
        if variance is None and "variance" in known:
            learns = self.model.learned_variance is not None
            variance = "learned_range" if learns else read_scheduled(self.config, "variance")
        shift = None if labels is None else self.wrappers.mean_shift(name, labels)
        eta = self.sampling.eta if "eta" in known else self.sampling.eta or None
        made = make_sampler(name, eta=eta, variance=variance, mean_shift=shift, **self.sampler_options)
        return keep_deep(self.model, made)

    @cached_property
    def base_network(self) -> ConditionedNetwork:
        """The model's own network of (x, t, condition)."""
        return self.model.network

    @cached_property
    def _latent_shape(self) -> tuple[int, ...]:
        return tuple(self.model.latent_shape)
