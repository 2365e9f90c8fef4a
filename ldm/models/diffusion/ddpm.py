"""LatentDiffusion: a DDPM in the latent space of a first stage, with a condition embedder (Rombach et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Clipping, Denoiser, Network, clipped, make_denoiser
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step, ddim, run
from ldm.ensembles.heads import ClassTables
from ldm.models.diffusion import pictures, stages
from ldm.models.diffusion.log_images import make_log_images
from ldm.models.diffusion.training import DDPM
from ldm.modules.choices import Choices
from ldm.modules.conditioned import (
    EMBEDDER,
    ConditionedNetwork,
    ConditionEmbedder,
    DiffusionWrapper,
    find_model_parts,
)
from ldm.modules.encoders.text import TextEmbedder
from ldm.modules.parts import Parts

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion"]


def refuse_noise_on_the_condition(timesteps: int | None) -> None:
    """Raise a ValueError for latent-diffusion's option of a noisy condition, which no released model uses."""
    if timesteps not in (None, 1):
        raise ValueError(f"num_timesteps_cond must be 1 (no noise on the condition), got {timesteps}")


class LatentDiffusion(DDPM):
    """Diffusion of z = scale_factor * encode(image), conditioned through `cond_stage_config`.

    Attribute names fix the checkpoint: `model.diffusion_model`, `first_stage_model`, `cond_stage_model`, `model_ema`
    and the 12 schedule buffers.

    Args:
        first_stage_config: the first stage; one without a target leaves images as they are.
        cond_stage_config: the embedder of conditions, "__is_first_stage__" or "__is_unconditional__".
        num_timesteps_cond: only 1, no noise on the condition, is supported.
        cond_stage_key: name of the condition in a batch.
        cond_stage_trainable: whether the embedder trains.
        concat_mode: where there is no `conditioning_key`, whether it is concat or crossattn.
        picture_key: of a hybrid model, name of the picture in a batch; of others it is `cond_stage_key`.
        mask_key: name of the picture's mask, which is joined to it where the network has a channel for it.
        first_stage_encoding: what training and validation make of a KL first stage's posterior: "sample", drawn anew in
            every step, or "mode", its mean. All else takes the mean.
        scale_factor: of the latents; with `scale_by_std` it is measured on the first batch of a training.
        guidance_scale: of logged samples.
        ddpm: further arguments of `DDPM`; those that are named here but not described are its as well.

    Attributes:
        choices: the prompts or pictures that labels stand for; None: labels are classes. See `with_choices`.
    """

    first_stage_model: Any
    cond_stage_model: nn.Module | None
    scale_factor: float | Tensor
    choices: Choices | None = None
    instantiate_first_stage = stages.instantiate_first_stage
    instantiate_cond_stage = stages.instantiate_cond_stage
    differentiable_decode_first_stage = stages.decode_with_gradients
    get_learned_conditioning = pictures.embed_given_conditions
    read_conditions = pictures.read_batch_conditions
    read_labels = pictures.read_kept_batch_conditions
    null_condition = pictures.make_null_condition
    rename_released = stages.rename_released
    encoded = stages.encode_images
    draw_input = stages.draw_latents
    on_train_batch_start = stages.measure_scale

    def __init__(
        self,
        first_stage_config: Mapping[str, Any] | nn.Module,
        cond_stage_config: Mapping[str, Any] | nn.Module | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        conditioning_key: str | None = None,
        picture_key: str | None = None,
        mask_key: str = "mask",
        first_stage_encoding: str = "sample",
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        guidance_scale: float = 1.0,
        clip_denoised: Clipping = False,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **ddpm: Any,
    ):
        refuse_noise_on_the_condition(num_timesteps_cond)
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, clip_denoised=clip_denoised, **ddpm)
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.picture_key = picture_key
        self.mask_key = mask_key
        self.first_stage_encoding = stages.check_encoding(first_stage_encoding)
        self.guidance_scale = guidance_scale
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.ignore_keys = tuple(ignore_keys)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Training mode for all but the frozen stages."""
        super().train(mode)
        if hasattr(self, "first_stage_model"):
            self.first_stage_model.eval()
        stage = getattr(self, "cond_stage_model", None)
        if stage is not None and not self.cond_stage_trainable:
            stage.eval()
        return self

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode images [B, C, H, W] in [-1, 1]: into a latent, or a distribution, as the first stage has it."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return the scaled latent [B, c, h, w]; of a distribution its mode, or with a generator a sample."""
        return self.scale_factor * self.before_scaling(encoder_posterior, generator)

    @staticmethod
    def before_scaling(encoder_posterior: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return the same without the scale."""
        if isinstance(encoder_posterior, Tensor):
            return encoder_posterior
        return encoder_posterior.mode() if generator is None else encoder_posterior.sample(generator)

    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Decode scaled latents [B, c, h, w], or with `predict_cids` indices [B, h, w], to images [B, C, H, W]."""
        if predict_cids:
            z = self.first_stage_model.quantize.get_codebook_entry(z, (*z.shape, self.first_stage_model.embed_dim))
        z = z / self.scale_factor
        if force_not_quantize:
            return self.first_stage_model.decode(z, force_not_quantize=True)
        return self.first_stage_model.decode(z)

    @property
    def embedder(self) -> ConditionEmbedder:
        """What embeds conditions; an unconditional model raises a ValueError."""
        if self.cond_stage_model is None:
            raise ValueError("this model is unconditional; it takes no condition")
        return cast(ConditionEmbedder, self.cond_stage_model)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the scaled latents [B, c, h, w] of batch[k], which are encoded where the batch says `encoded`.

        Of a KL first stage they are the posterior's means; training samples it, see `draw_input`. Under autocast the
        encoder computes in half precision; what noise is added to, and the noise, do not.
        """
        x = super().get_input(batch, k)
        return self.get_first_stage_encoding(x if "encoded" in batch else self.encode_first_stage(x)).detach().float()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        super().validation_step(self.encoded(batch) if self.use_ema else batch, batch_idx)

    def embed_condition(self, batch: Mapping[str, Any], uniform: Tensor) -> Any:
        return pictures.embed_batch_condition(self, batch, uniform)

    # Class embeddings

    @property
    def null_class(self) -> int | None:
        """Label of classifier-free guidance's null class, the embedder's last row; None where there is none."""
        if self.choices is not None:
            return self.choices.null_class
        return getattr(self.cond_stage_model, "null_class", None)

    @property
    def n_classes(self) -> int | None:
        """Number of classes (or choices), the null class not counted; None for a model of neither."""
        if self.choices is not None:
            return len(self.choices.names)
        rows = getattr(self.cond_stage_model, "n_classes", None)
        return rows if rows is None or self.null_class is None else rows - 1

    @property
    def reads_text(self) -> bool:
        """Whether conditions are texts."""
        return isinstance(self.cond_stage_model, TextEmbedder)

    @property
    def label_dropout(self) -> float:
        """Share of the labels that training replaces by the null class."""
        drops = self.member is None or self.member.record.null_class == "trained"
        return getattr(self.cond_stage_model, "ucg_rate", 0.0) if drops else 0.0

    @property
    def parts(self) -> Parts:
        return find_model_parts(self.model, self.cond_stage_model)

    @property
    def weights_elsewhere(self) -> tuple[str, ...]:
        """The stages that have read files of their own."""
        stages_here = {"first_stage_model.": self.first_stage_model, EMBEDDER: self.cond_stage_model}
        return tuple(name for name, stage in stages_here.items() if getattr(stage, "has_weights", False))

    @property
    def class_tables(self) -> ClassTables:
        """Tables of the embedder and of the network, and low-rank factors where they have them."""
        return stages.make_class_tables(self)

    # The model as a denoiser

    @property
    def network(self) -> ConditionedNetwork:
        return ConditionedNetwork(self.model, self.cond_stage_model, self.choices)

    def with_choices(self, choices: Choices) -> LatentDiffusion:
        """Return this model with the same weights, whose labels stand for prompts or pictures.

        Raises:
            ValueError: if they lack what the model is conditioned on.
        """
        made = copy.copy(self)
        made.choices = choices.to(self.device)
        made.network  # noqa: B018  # which refuses choices that do not fit
        return made

    def denoiser(self, cond: Tensor | None = None, scale: float = 1.0, network: Network | None = None) -> Denoiser:
        """Make a denoiser for labels [B] or token ids [B, L] under guidance `scale`; `network` replaces ours.

        Raises:
            ValueError: if guidance is asked for and there is no null condition.
        """
        null = None if scale == 1 or cond is None else self.null_condition(cond)
        if scale != 1 and cond is not None and null is None:
            raise ValueError(
                f"guidance scale {scale} needs a null class, and this model has none: all {self.n_classes} rows of its "
                "embedder are classes (null_class: false); use scale 1"
            )
        network = self.network if network is None else network
        learned = self.learned_variance is not None
        return make_denoiser(network, self.schedule, self.target, cond, null=null, scale=scale, learned_range=learned)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor | None,
        noise: ImageNoise,
        times: Tensor,
        scale: float = 1.0,
        sampler: Callable[..., Iterator[Step]] = ddim,
        **options: Any,
    ) -> Tensor:
        """Sample latents [B, c, h, w] for labels [B] (None: unconditional), one for each image that `noise` names.

        `times` are those of `sampling_times`, `scale` is guidance's, `sampler` is one of `SAMPLERS` with its options.
        """
        x = noise.initial((len(noise.images), *self.latent_shape)) * self.schedule.prior_std
        denoiser = self.denoiser(cond, scale)
        if self.clip_denoised:
            rederive = self.clip_denoised is True or sampler is not ddim
            denoiser = clipped(denoiser, self.schedule, rederive=rederive)
        return run(sampler(denoiser, self.schedule, x, times, noise=noise, **options))

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int | None = None, ddim_steps: int = 50, ddim_eta: float = 0, seed: int = 0
    ) -> dict[str, Tensor]:
        """Make images in [-1, 1] for a logger from the first N images of a batch (all), see `make_log_images`."""
        first = {name: value[:N] for name, value in batch.items() if isinstance(value, (Tensor, list))}
        return make_log_images(self, first, ddim_steps, ddim_eta, seed)
