"""A loaded model: its weights and its samples."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_checkpoint, sha256
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.network import ChunkedNetwork, network_alone
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import make_sampler, run
from ldm.diffusion.samplers.registry import Sampler, sampler_options
from ldm.ensembles.heads import merge
from ldm.ensembles.storage import verified_base
from ldm.jobs import pick_device
from ldm.memory import Chunker, rows_that_fit
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import speed_up
from ldm.pipelines.wrappers import Wrappers, make_wrappers
from ldm.training.config import load_config
from ldm.training.runs import find_run
from ldm.util import get_obj_from_str, instantiate_from_config

FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path"


@dataclass(frozen=True)
class ModelPipeline:
    """A model with its weights, the config and file they came from, and what the options say of sampling it.

    `passes` bounds the images in a pass of the network, `decoding` those in one of the first stage's decoder.
    """

    model: LatentDiffusion
    config: Mapping[str, Any]
    checkpoint: Path
    options: argparse.Namespace
    device: torch.device
    passes: Chunker
    decoding: Chunker

    def setting(self, name: str, default: Any) -> Any:
        """A value of the config's `uncertainty` section."""
        return (self.config.get("uncertainty") or {}).get(name, default)

    @cached_property
    def times(self) -> torch.Tensor:
        """Times of the chosen number of steps.

        Raises:
            ValueError: if a respacing comes with a --spacing, which would not act.
        """
        given = self.options.ddim_steps
        if isinstance(given, str) and self.options.spacing != "auto":
            raise ValueError(f"--steps {given} is a respacing already; leave out --spacing {self.options.spacing}")
        steps = self.setting("steps", self.options.default_steps) if given is None else given
        return self.model.sampling_times(steps, self.options.spacing)

    @property
    def n_classes(self) -> int:
        """Number of real classes, without the null class of guidance; of an unconditional model those of the
        classifier that guides it, or 0."""
        if self.model.n_classes or self.wrappers.classifier is None:
            return self.model.n_classes or 0
        return self.wrappers.classifier.n_classes

    @cached_property
    def wrappers(self) -> Wrappers:
        """Epsilon scaling, clipping and a classifier, as the options say."""
        return make_wrappers(self.options, self.model, self.config, self.device)

    @property
    def sampler(self) -> Sampler:
        """The chosen sampler with its options bound; one that it does not act on is an error."""
        return self.sampler_for(None)

    def sampler_for(self, labels: torch.Tensor | None) -> Sampler:
        """`sampler` for images of classes [B], to which a classifier may guide ancestral steps."""
        name, variance = self.options.sampler, self.options.variance
        if variance is None and "variance" in sampler_options(name) and self.model.learned_variance is not None:
            variance = "learned_range"
        shift = self.wrappers.mean_shift(name, labels)
        return make_sampler(name, eta=self.options.ddim_eta or None, variance=variance, mean_shift=shift)

    def denoiser(self, labels: torch.Tensor | None = None, network: Network | None = None) -> Denoiser:
        """The model's denoiser for labels [B] with everything the options put around it; see `Wrappers`."""
        cond = labels if self.model.n_classes else None
        network = ChunkedNetwork(self.model.network, self.passes) if network is None else network
        denoiser = self.model.denoiser(cond, self.scale, network)
        return self.wrappers.wrap(denoiser, self.times, self.options.sampler, labels)

    @property
    def scale(self) -> float:
        """Guidance scale.

        Raises:
            ValueError: if guidance is asked for and the model has no null class.
        """
        if self.model.null_class is None:
            if self.options.scale not in (None, 1.0):
                raise ValueError(f"--scale {self.options.scale}: this model has no null class, there is no guidance")
            return 1.0
        configured = self.config["model"]["params"].get("guidance_scale", self.options.default_scale)
        return configured if self.options.scale is None else self.options.scale

    def images_at_once(self, copies: int = 1) -> int:
        """Images worth working on together: each takes `copies` rows of a pass, twice as many under guidance."""
        return max(1, (self.passes.limit or 1) // (copies * (1 if self.scale == 1 or not self.n_classes else 2)))

    def noise(self, images: Sequence[int]) -> ImageNoise:
        return ImageNoise(self.options.seed, tuple(images), device=self.device)

    def labels(self, labels: Sequence[int], null: bool = False) -> torch.Tensor:
        """Class labels [B] on the device; `null` admits the null class as well.

        Raises:
            ValueError: for a label the model does not have.
        """
        count = self.n_classes + (null and self.model.null_class is not None)
        wrong = [label for label in labels if not 0 <= label < count]
        if wrong:
            raise ValueError(f"classes must be 0..{count - 1}, got {wrong}")
        return torch.tensor(list(labels), device=self.device)

    def in_turn(self, images: Sequence[int]) -> list[int] | None:
        """The classes in turn, one for each image number; None for an unconditional model."""
        return [image % self.n_classes for image in images] if self.n_classes else None

    @torch.no_grad()
    def sample(
        self, labels: Sequence[int] | None, images: Sequence[int], initial: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents [B, c, h, w] for labels [B] (None: unconditional) and image numbers [B], which name the noise.

        `initial` [B, c, h, w], standard normal, replaces the first draw.
        """
        noise, given = self.noise(images), None if labels is None else self.labels(labels, null=True)
        if initial is None:
            initial = noise.initial((len(images), *self.model.latent_shape))
        x = initial.to(self.device) * self.model.schedule.prior_std
        return run(self.sampler_for(given)(self.denoiser(given), self.model.schedule, x, self.times, noise=noise))

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of latents [..., c, h, w], decoded in pieces that fit into memory, on the CPU."""
        flat = z.reshape(-1, *z.shape[-3:])
        images = self.decoding(lambda piece: self.model.decode_first_stage(piece).float().cpu(), flat)
        return images.reshape(*z.shape[:-3], *images.shape[1:]).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """What the outputs of this run depend on."""
        return {
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": sha256(self.checkpoint),
            "averaged": self.options.ema,
            **self.describe_sampling(),
        }

    def describe_sampling(self) -> dict[str, Any]:
        """Sampler and noise."""
        return {
            "sampler": self.options.sampler,
            "steps": len(self.times) - 1,
            "eta": self.options.ddim_eta,
            "scale": self.scale,
            "spacing": self.options.ddim_steps if isinstance(self.options.ddim_steps, str) else self.options.spacing,
            "seed": self.options.seed,
            "variance": self.options.variance,
            **({} if self.options.precision == "float32" else {"precision": self.options.precision}),
            **self.wrappers.describe(),
        }


def build_model(config: Mapping[str, Any]) -> LatentDiffusion:
    """The diffusion model of a config without weights: no file is read, and no averages are kept.

    Raises:
        ValueError: if the config's model is something else, a first stage for example.
    """
    spec = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(config)["model"], resolve=True))
    target = get_obj_from_str(spec.target)
    if not (isinstance(target, type) and issubclass(target, LatentDiffusion)):
        raise ValueError(f"model.target {spec.target} is no LatentDiffusion, there is nothing to sample from it")
    spec.params.use_ema = False
    for params in (spec.params, OmegaConf.select(spec, "params.first_stage_config.params")):
        if params is not None and "ckpt_path" in params:
            params.ckpt_path = None
    return instantiate_from_config(spec)


def load_weights(
    model: LatentDiffusion,
    checkpoint: Path,
    averaged: bool = True,
    pretrained: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Load a checkpoint strictly; that of a component is its heads, on the trunk it names or `pretrained`.

    A published file of the network alone comes without a first stage: it is read from the file that `config` names.

    Raises:
        ValueError: if the first stage has weights and none are given.
    """
    content = load_checkpoint(checkpoint)
    if "component" not in content:
        alone = network_alone(content, averaged) is not None
        model.init_from_ckpt(str(checkpoint), use_averaged=averaged, content=content)
        if alone and any(True for _ in model.first_stage_model.parameters()):
            first_stage = OmegaConf.select(OmegaConf.create(config or {}), FIRST_STAGE)
            if not first_stage:
                raise ValueError(
                    f"{checkpoint} holds the network alone: name its first stage in the config, {FIRST_STAGE}"
                )
            model.first_stage_model.init_from_ckpt(first_stage)
        return
    component = content["component"]
    trunk = verified_base(pretrained or component["trunk_path"], component["trunk_sha256"])
    model.init_from_ckpt(str(trunk), use_averaged=True)
    model.load_state_dict(merge(model.state_dict(), content["state_dict"]))


def make_ready(model: LatentDiffusion, options: argparse.Namespace, device: torch.device) -> tuple[Chunker, Chunker]:
    """Let a frozen model run as the options say; what one pass of its network, and of its decoder, may hold."""
    x = torch.zeros((1, *model.latent_shape), device=device)
    cond = torch.zeros(1, dtype=torch.long, device=device) if model.n_classes else None
    passes = options.chunk or rows_that_fit(lambda: model.network(x, x.new_zeros(1), cond), device)
    speed_up(model.model.diffusion_model, options, device)
    return Chunker(passes), Chunker(lambda: rows_that_fit(lambda: model.decode_first_stage(x), device))


def open_model(options: argparse.Namespace) -> ModelPipeline:
    """Load the model that the options of `ldm.arguments.add_model_arguments` name.

    Raises:
        ValueError: if --base comes without --ckpt.
    """
    if options.base and not options.ckpt:
        raise ValueError("--base needs --ckpt: the checkpoint to sample from")
    device = pick_device(options.device)
    epoch = getattr(options, "epoch", None)
    run, checkpoint = find_run(options.run, epoch) if options.run else (None, Path(options.ckpt))
    config = run.config() if run else load_config([options.base])
    model = build_model(config)
    load_weights(model, checkpoint, options.ema, options.pretrained, config)
    model = model.to(device).eval().requires_grad_(False)
    return ModelPipeline(model, config, checkpoint, options, device, *make_ready(model, options, device))
