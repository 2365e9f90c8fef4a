"""A loaded model with the values that say how it is sampled: its latents, its images, and its denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import sha256
from ldm.diffusion.denoiser import Denoiser, Network, make_denoiser
from ldm.diffusion.epsilon_scaling import EpsilonScaling
from ldm.diffusion.noise import INITIAL, ImageNoise
from ldm.diffusion.samplers import make_sampler, run
from ldm.diffusion.samplers.registry import Sampler, sampler_options
from ldm.ensembles.classes import Classes
from ldm.memory import ChunkedNetwork, Chunker
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import with_speed
from ldm.pipelines.wrappers import Wrappers, make_wrappers
from ldm.settings import Sampling, Speed
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Defaults:
    """What a pipeline takes where neither its values nor the config say: steps of a sampler, guidance scale."""

    steps: int = 200
    scale: float = 1.0


@dataclass(frozen=True)
class ModelPipeline:
    """A model with its weights, and the values that say how it is sampled; `ldm.load_model` makes one.

    Attributes:
        model: the frozen model on its device.
        config: what it was trained with.
        checkpoint: the file its weights came from; of an ensemble its base checkpoint.
        device: where it runs.
        passes: bounds the images in one pass of the network.
        decoding: bounds the images in one pass of the first stage's decoder.
        sampling, speed: see `ldm.settings`.
        averaged: whether averaged weights were taken, where there were any.
        scaling: epsilon scaling in place of what `sampling` says.
    """

    model: LatentDiffusion
    config: Mapping[str, Any]
    checkpoint: Path
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
        for name, change in changes.items():
            owner = next(
                (key for key, value in values.items() if name in {field.name for field in fields(value)}), None
            )
            if owner is None:
                raise ValueError(f"with_ takes {sorted(values)} or one of their fields, got '{name}'")
            values[owner] = replace(values[owner], **{name: change})
        kept = {"network", "base_network", "classes", "class_names", "_latent_shape", "null_class", "conditional"}
        if values["sampling"] == self.sampling:
            kept |= {"times", "wrappers", "sampler", "scale", "n_classes"}
        if values["speed"] != self.speed:
            kept -= {"network", "base_network"}
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
        _ = (self.times, self.scale, self.wrappers.off, self.sampler, self.n_classes, self.base_network)
        _ = (self.conditional, self.null_class, self._latent_shape)
        return self

    def with_scaling(self, scaling: EpsilonScaling) -> Self:
        """Return this pipeline under another epsilon scaling, one that was estimated for example."""
        return replace(self, scaling=scaling)

    def setting(self, name: str, default: Any) -> Any:
        """Return a value of the config's `uncertainty` section."""
        return (self.config.get("uncertainty") or {}).get(name, default)

    @cached_property
    def times(self) -> Tensor:
        """Times of the sampler's steps, float64 [S + 1], descending.

        Raises:
            ValueError: if a respacing comes with a spacing, which would not act.
        """
        given = self.sampling.steps
        if isinstance(given, str) and self.sampling.spacing != "auto":
            raise ValueError(f"--steps {given} is a respacing already; leave out --spacing {self.sampling.spacing}")
        steps = self.setting("steps", self.defaults.steps) if given is None else given
        return self.model.sampling_times(steps, self.sampling.spacing)

    @cached_property
    def scale(self) -> float:
        """Scale of classifier-free guidance.

        Raises:
            ValueError: if guidance is asked for and the model has no null class.
        """
        given = self.sampling.scale
        if self.null_class is None:
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

    # Classes

    @cached_property
    def null_class(self) -> int | None:
        """Label of the null class of guidance; None where there is none."""
        return self.model.null_class

    @cached_property
    def conditional(self) -> bool:
        """Whether the model itself takes class labels."""
        return bool(self.model.n_classes)

    @cached_property
    def n_classes(self) -> int:
        """Number of real classes, without the null class; of an unconditional model those of the classifier that
        guides it, or 0."""
        if self.model.n_classes or self.wrappers.classifier is None:
            return self.model.n_classes or 0
        return self.wrappers.classifier.n_classes

    @cached_property
    def classes(self) -> Classes:
        """The real classes; their names are read from the training data only where they are asked for."""
        return Classes(self.n_classes)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, where the config's training data can be read and tell them; else none."""
        train = ((self.config.get("data") or {}).get("params") or {}).get("train")
        try:
            data = None if train is None else instantiate_from_config(train)
        except (ValueError, FileNotFoundError):
            return ()
        names = getattr(data, "human_names", None) or getattr(data, "class_names", None) or ()
        return tuple(str(name) for name in names)

    def choose_classes(self, given: Sequence[int | str] | None, count: int | None = None) -> list[int]:
        """Return classes given by number or name; where none are given up to `count`, or all; see `Classes.choose`.

        Raises:
            ValueError: for a class that the model does not have, or that comes twice.
        """
        numbered = all(str(one).lstrip("-").isdigit() for one in given or ())
        classes = self.classes if numbered or self.classes.names else replace(self.classes, names=self.class_names)
        return classes.choose(given, count)

    def labels(self, labels: Sequence[int], null: bool = False) -> Tensor:
        """Return class labels [B] on the device; `null` admits the null class as well.

        Raises:
            ValueError: for a label that the model does not have.
        """
        count = self.n_classes + (null and self.null_class is not None)
        wrong = [label for label in labels if not 0 <= label < count]
        if wrong:
            raise ValueError(f"classes must be 0..{count - 1}, got {wrong}")
        return torch.tensor(list(labels), device=self.device)

    def cycle_classes(self, images: Sequence[int]) -> list[int] | None:
        """Return the classes in turn, one for each image number; None for an unconditional model."""
        return [image % self.n_classes for image in images] if self.n_classes else None

    # Sampling

    def images_at_once(self, copies: int = 1) -> int:
        """Return how many images are worth working on together: each takes `copies` rows, twice as many if guided."""
        guided = self.scale != 1 and self.n_classes
        return max(1, (self.passes.limit or 1) // (copies * (2 if guided else 1)))

    def noise(self, images: Sequence[int]) -> ImageNoise:
        """Return the noise of these image numbers under the seed."""
        return ImageNoise(self.sampling.seed, tuple(images), device=self.device)

    def initial(self, noise: ImageNoise) -> Tensor:
        """Return the states [B, c, h, w] that sampling starts from."""
        shape = (len(noise.images), *self._latent_shape)
        return noise(INITIAL, shape) * self.model.schedule.prior_std

    @cached_property
    def _latent_shape(self) -> tuple[int, ...]:
        return tuple(self.model.latent_shape)

    @cached_property
    def sampler(self) -> Sampler:
        """The chosen sampler with its options bound; an option that it does not act on is an error."""
        return self._make_sampler(None)

    def sampler_for(self, labels: Tensor | None) -> Sampler:
        """Return `sampler` for images of classes [B], to which a classifier may guide ancestral steps."""
        return self.sampler if self.wrappers.classifier is None else self._make_sampler(labels)

    def _make_sampler(self, labels: Tensor | None) -> Sampler:
        name = self.sampling.sampler
        variance = self.sampling.variance
        if variance is None and "variance" in sampler_options(name) and self.model.learned_variance is not None:
            variance = "learned_range"
        shift = None if labels is None else self.wrappers.mean_shift(name, labels)
        return make_sampler(name, eta=self.sampling.eta or None, variance=variance, mean_shift=shift)

    @cached_property
    def base_network(self) -> nn.Module:
        """The model's own network of (x, t, condition)."""
        return self.model.network

    def denoiser(self, labels: Tensor | None = None, network: Network | None = None) -> Denoiser:
        """Return the model's denoiser for labels [B] with all that wraps it; `network` replaces the model's own."""
        network = ChunkedNetwork(self.base_network, self.passes) if network is None else network
        denoiser = make_denoiser(
            network,
            self.model.schedule,
            self.model.target,
            labels if self.conditional else None,
            null_class=self.null_class,
            scale=self.scale,
            learned_range=self.model.learned_variance is not None,
        )
        if self.wrappers.off:
            return denoiser
        return self.wrappers.wrap(denoiser, self.times, self.sampling.sampler, labels)

    @torch.no_grad()
    def sample_latents(
        self, labels: Sequence[int] | None, images: Sequence[int], initial: Tensor | None = None
    ) -> Tensor:
        """Return latents [B, c, h, w] for labels [B] (None: unconditional) and image numbers [B], which name the noise.

        Args:
            initial: standard normal [B, c, h, w], in place of the first draw.
        """
        noise = self.noise(images)
        given = None if labels is None else self.labels(labels, null=True)
        x = self.initial(noise) if initial is None else initial.to(self.device) * self.model.schedule.prior_std
        steps = self.sampler_for(given)(self.denoiser(given), self.model.schedule, x, self.times, noise=noise)
        return run(steps)

    def sample(self, classes: Sequence[int | str] | None = None, n: int = 1) -> Tensor:
        """Return images [B, C, H, W] in [-1, 1], `n` of each class in the order of the classes, on the CPU.

        Args:
            classes: numbers or names; all classes where None (an unconditional model has none).
            n: images of a class. Its k-th image has the noise of image k.

        Raises:
            ValueError: for a class that the model does not have.
        """
        labels = self.choose_classes(classes) if self.n_classes else None
        if labels is None:
            return self.decode(self.sample_latents(None, range(n)))
        each = [label for label in labels for _ in range(n)]
        return self.decode(self.sample_latents(each, list(range(n)) * len(labels)))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return images in [-1, 1] of latents [..., c, h, w], decoded in chunks that fit into memory, on the CPU."""
        flat = z.reshape(-1, *z.shape[-3:])
        images = self.decoding(lambda chunk: self.model.decode_first_stage(chunk).float().cpu(), flat)
        return images.reshape(*z.shape[:-3], *images.shape[1:]).clamp(-1, 1)

    # Records

    def describe(self) -> dict[str, Any]:
        """Return what the outputs depend on, for records."""
        return {
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": sha256(self.checkpoint),
            "averaged": self.averaged,
            **self.describe_sampling(),
        }

    def describe_sampling(self) -> dict[str, Any]:
        """Return what the sampler and its noise depend on, for records."""
        sampling = self.sampling
        return {
            "sampler": sampling.sampler,
            "steps": len(self.times) - 1,
            "eta": sampling.eta,
            "scale": self.scale,
            "spacing": sampling.steps if isinstance(sampling.steps, str) else sampling.spacing,
            "seed": sampling.seed,
            "variance": sampling.variance,
            **({} if self.speed.precision == "float32" else {"precision": self.speed.precision}),
            **self.wrappers.describe(),
        }
