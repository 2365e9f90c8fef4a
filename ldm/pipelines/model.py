"""A loaded model with the values that say how it is sampled: its latents, its images, and its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.arguments import check_value
from ldm.checkpoint import tensors_sha256
from ldm.diffusion.denoiser import Denoiser, Network, NetworkDenoiser, guided
from ldm.diffusion.noise import INITIAL, ImageNoise
from ldm.diffusion.samplers import run
from ldm.diffusion.samplers.registry import Sampler
from ldm.ensembles.classes import Classes
from ldm.memory import ChunkedNetwork
from ldm.pipelines.base import Pipeline, find_spacing, read_scheduled
from ldm.pipelines.guides import Guide, check_guidance, load_guide, make_guided
from ldm.ranges import OPTIONS, check_range
from ldm.settings import Guidance, Steering
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN_GUIDANCE = Guidance()


@dataclass(frozen=True)
class ModelPipeline(Pipeline):
    """A loaded model, ready to sample; `ldm.load_model` makes one. Its values are those of `Pipeline`."""

    # Classes

    @cached_property
    def classes(self) -> Classes:
        """The real classes; their names are read from the training data only where they are asked for."""
        return Classes(self.n_classes)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One name a class: of prompts or pictures theirs, else what the training data tell, where they can be read."""
        if self.model.choices is not None:
            return self.model.choices.names
        train = ((self.config.get("data") or {}).get("params") or {}).get("train")
        try:
            data = None if train is None else instantiate_from_config(train)
        except (ValueError, FileNotFoundError):
            return ()
        names = getattr(data, "human_names", None) or getattr(data, "class_names", None)
        names = names or read_scheduled(self.config, "class_names") or ()
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
            raise ValueError(f"classes must lie in 0..{count - 1}, got {wrong}: name others, or another model")
        return torch.tensor(list(labels), device=self.device)

    def cycle_classes(self, images: Sequence[int]) -> list[int] | None:
        """Return the classes in turn, one for each image number; None for an unconditional model."""
        return [image % self.n_classes for image in images] if self.n_classes else None

    # Guidance

    @property
    def members(self) -> int:
        """Number of members that sample at once: 1 for a model."""
        return 1

    @cached_property
    def guide(self) -> Guide | None:
        """The weaker model that guidance leads away from; None: the null class.

        Raises:
            ValueError: if it makes other images.
        """
        given = self.sampling.guidance
        if given.guide is None:
            return None
        if self.model.choices is not None:
            raise ValueError("--guide knows classes, and these images have prompts or pictures: leave it out")
        return load_guide(given, self.model, self.device, self.passes)

    def check(self) -> Self:
        """See `Pipeline.check`; what is said of guidance has to act, too."""
        made = super().check()
        conditional = self.null_class is not None or self.base_network.needs_choices
        check_guidance(self.sampling.guidance, self.scale, conditional, self.members)
        if self.sampling.steering != Steering() and self.members == 1:
            raise ValueError("--steer and --steer_steps ask where members of an ensemble agree: this is no ensemble")
        _ = self.guide
        return made

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
        return noise(INITIAL, shape) * self.initial_std

    def sampler_for(self, labels: Tensor | None) -> Sampler:
        """Return `sampler` for images of classes [B], to which a classifier may guide ancestral steps."""
        return self.sampler if self.wrappers.classifier is None else self._make_sampler(labels)

    def denoiser(
        self, labels: Tensor | None = None, network: Network | None = None, scale: Tensor | None = None
    ) -> Denoiser:
        """Return the model's denoiser for labels [B] with all that wraps it.

        Args:
            labels: classes [B].
            network: in place of the model's own.
            scale: of guidance, in place of the one for all: of members or of images, see `GuidanceRule`.
        """
        network = ChunkedNetwork(self.base_network, self.passes) if network is None else network
        model = self.model
        cond = labels if self.conditional else None
        null = None
        if cond is not None and (scale is not None or self.scale != 1):
            known = self.null_class if model.choices is None else None
            null = model.null_condition(cond) if known is None else torch.full_like(cond, known)
        learned = model.learned_variance is not None
        own = NetworkDenoiser(network, model.schedule, model.target, cond, learned_range=learned)
        denoiser: Denoiser
        if self.sampling.guidance == PLAIN_GUIDANCE:
            denoiser = guided(own, null, self.scale)
        else:
            scales = self.scale if scale is None else scale
            denoiser = make_guided(own, null, scales, self.sampling.guidance, self.guide)
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
        x = self.initial(noise) if initial is None else initial.to(self.device) * self.initial_std
        steps = self.sampler_for(given)(self.denoiser(given), self.model.schedule, x, self.times, noise=noise)
        return run(steps)

    def sample(self, classes: Sequence[int | str] | None = None, n: int = 1) -> Tensor:
        """Return images [B, C, H, W] in [-1, 1], `n` of each class in the order of the classes, on the CPU.

        Args:
            classes: numbers or names; all classes where None (an unconditional model has none).
            n: images of a class. Its k-th image has the noise of image k.

        Raises:
            ValueError: for a class that the model does not have, or no number of images.
        """
        check_value(n, int, "n")
        check_range("n", n, OPTIONS, "n")
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
            "checkpoint": "in memory" if self.checkpoint is None else self.checkpoint.name,
            "checkpoint_sha256": self.weights_sha256,
            "averaged": self.averaged,
            **self.describe_sampling(),
        }

    def describe_sampling(self) -> dict[str, Any]:
        """Return what the sampler and its noise depend on, for records."""
        sampling, choices = self.sampling, self.model.choices
        return {
            "sampler": sampling.sampler,
            "steps": len(self.times) - 1,
            "eta": self.eta,
            "scale": self.scale,
            "spacing": sampling.steps if isinstance(sampling.steps, str) else find_spacing(sampling, self.config),
            "seed": sampling.seed,
            "variance": sampling.variance,
            **{name: value for name, value in sampling.levels.items() if value is not None},
            **({"sampler_options": self.sampler_options} if self.sampler_options else {}),
            **({} if self.model.choices is None else {"choices": list(self.model.choices.names)}),
            **self.speed.describe(),
            **({} if choices is None else {"conditions_sha256": tensors_sha256(choices.tensors())}),
            **self.wrappers.describe(),
            **self._describe_guidance(),
            **({} if sampling.steering == Steering() else {"steering": asdict(sampling.steering)}),
        }

    def _describe_guidance(self) -> dict[str, Any]:
        """Return what is said of guidance beside its scale, where anything is."""
        given = self.sampling.guidance
        if given == PLAIN_GUIDANCE:
            return {}
        said = {"interval": given.interval, "rescale": given.rescale, "member_scales": given.member_scales}
        found = {name: value for name, value in said.items() if value is not None}
        return {"guidance": found if self.guide is None else {**found, "guide": self.guide.describe()}}
