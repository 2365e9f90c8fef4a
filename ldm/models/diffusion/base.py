"""DDPM: the LightningModule of a diffusion model: schedule, network, loss, optimiser, components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor

from ldm.checkpoint import averaged, load_checkpoint, load_into, unwrap_state_dict
from ldm.diffusion.denoiser import Target
from ldm.diffusion.losses import elementwise_error
from ldm.diffusion.network import UNET, ConditionedNetwork, DiffusionWrapper, network_alone
from ldm.diffusion.noise import TrainingDraws
from ldm.ensembles.heads import Component
from ldm.models.diffusion import components
from ldm.models.diffusion.anchor import Anchor
from ldm.models.diffusion.optimisation import evaluation_positions, from_all_devices, log_step, optimiser, positions
from ldm.models.diffusion.process import NoiseProcess
from ldm.modules.ema import LitEma

EMA_KEYS = ("model_ema.*",)
IMPORTANCE_KEYS = ("time_importance.*",)


def _take(
    model: DDPM, content: Mapping[str, Any], path: str, ignore_keys: tuple[str, ...], only_model: bool, averages: bool
) -> None:
    """See `DDPM.init_from_ckpt`."""
    alone = network_alone(content, averages)
    if alone is not None:
        state, only_model = {f"{UNET}{name}": value for name, value in alone.items()}, True
    else:
        state = averaged(unwrap_state_dict(content, path)) if averages else unwrap_state_dict(content, path)
    state = {name: value for name, value in state.items() if not name.startswith(ignore_keys or ("\0",))}
    has_copies = any(name.startswith("model_ema.") for name in state)
    ignore = ignore_keys + (() if model.use_ema and has_copies else EMA_KEYS)
    factors = (model.low_rank or ())[:2]
    ignore += factors if not any(name in state for name in factors) else ()
    ignore += IMPORTANCE_KEYS if model.time_importance is None else ()
    if only_model:
        state = {name[len("model.") :]: value for name, value in state.items() if name.startswith("model.")}
        load_into(model.model, state)
    else:
        load_into(model, state, ignore)
    if model.use_ema and (only_model or not has_copies):
        model.model_ema.reset(model.model)


class DDPM(components.ComponentTraining, NoiseProcess, pl.LightningModule):
    """Diffusion on what `get_input` returns; arguments are latent-diffusion's.

    Ours: `weight_decay` (0; the published AdamW default is 0.01); for training components of an ensemble,
    `pretrained_path` and `heads` (see `ComponentTraining`); a continuous path in place of a table of betas:
    `path_config` (`FlowSchedule`, `EDMSchedule`, ...), `times_config` (`ldm.diffusion.training_times`; uniform by
    default) and
    `sigma_data`; `unit_time` tells the network t / T (DDAE). As ADM has them: `learned_variance` (hybrid, vlb, or
    the arguments of `LearnedVariance`; the network has 2 C output channels), `schedule_sampler` (uniform or
    loss-second-moment), and `input_perturbation`. `ema` holds arguments of `LitEma`: decay, ramp.
    """

    component: Component | None
    anchor: Anchor | None

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        ema: Mapping[str, Any] | None = None,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        weight_decay: float = 0.0,
        pretrained_path: str | None = None,
        heads: Mapping[str, Any] | None = None,
        path_config: Mapping[str, Any] | None = None,
        times_config: Mapping[str, Any] | None = None,
        sigma_data: float = 0.5,
        unit_time: bool = False,
        learned_variance: str | Mapping[str, Any] | None = None,
        schedule_sampler: str = "uniform",
        input_perturbation: float = 0.0,
    ):
        super().__init__()
        self.target, self.parameterization = Target(parameterization, sigma_data), parameterization
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.clip_denoised, self.input_perturbation = log_every_t, clip_denoised, input_perturbation
        self.use_positional_encodings, self.v_posterior, self.monitor = use_positional_encodings, v_posterior, monitor
        self.scheduler_config, self.weight_decay, self.loss_type = scheduler_config, weight_decay, loss_type
        self.pretrained_path, self.head_options, self.use_ema = pretrained_path, dict(heads or {}), use_ema
        self.seed_draws(0)
        self.component = self.anchor = self.learning_rate = None
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model, **(ema or {}))
        tables = (given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s, unit_time)
        self.register_process(path_config, times_config, tables, learn_logvar, logvar_init)
        self.register_variance(learned_variance, schedule_sampler, self.model.diffusion_model)
        self._pending_checkpoint = ckpt_path and (ckpt_path, tuple(ignore_keys), load_only_unet)
        if type(self) is DDPM:
            self._load_pending()

    # Weights

    def _load_pending(self) -> None:
        if self._pending_checkpoint:
            self.init_from_ckpt(*self._pending_checkpoint)
            self._pending_checkpoint = None

    def init_from_ckpt(
        self,
        path: str,
        ignore_keys: Sequence[str] = (),
        only_model: bool = False,
        use_averaged: bool = False,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint strictly; `use_averaged` takes EMA copies, where the file has them, as the weights.

        Otherwise EMA copies are read where the model keeps them and left out where it does not. Averages that the file
        does not hold start from the weights it does hold. Published files of a network alone are read too, see
        `network_alone`. `content` is what the file holds, where it was read already.
        """
        content = load_checkpoint(path) if content is None else content
        _take(self, content, path, tuple(ignore_keys), only_model, use_averaged)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Use the averaged weights inside the block, where the model keeps them (`context` is latent-diffusion's)."""
        return self.model_ema.scope(self.model) if self.use_ema else nullcontext()

    @property
    def network(self) -> ConditionedNetwork:
        """The network of (x, t, condition), sharing this model's parameters under the same names."""
        return ConditionedNetwork(self.model)

    # Loss

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """batch[k] [B, H, W, C] (or [B, H, W]) as float [B, C, H, W]."""
        x = batch[k]
        x = x[..., None] if x.ndim == 3 else x
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Error of the network's output, reduced to its mean or unreduced."""
        error = elementwise_error(pred, target, self.loss_type)
        return error.mean() if mean else error

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The network's output for an embedded condition: a tensor [B, L, D], a list, or DiffusionWrapper's dict."""
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: list(cond) if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its parts at a condition.

        Args:
            x_start: clean states [B, C, H, W]; t: times [B], see `NoiseProcess`; noise: like x_start, the target's;
            input_noise: what the network's input is noised with instead, see `input_noise`.
        """
        x_noisy = self.q_sample(x_start, t, noise if input_noise is None else input_noise)
        inputs, time = self.network_input(x_noisy, t)
        return self.losses_of(self.apply_model(inputs, time, cond), x_start, t, noise, input_noise)

    def input_noise(self, draws: TrainingDraws, step: int, samples: Sequence[int], noise: Tensor) -> Tensor:
        """In training, noise + gamma xi with xi standard normal: the input differs from what the target says, as it
        does in sampling (Ning et al. 2023, DDPM-IP); gamma is `input_perturbation`."""
        if not (self.input_perturbation and self.training):
            return noise
        return noise + self.input_perturbation * draws.perturbation(step, samples, noise.shape[1:]).to(noise)

    def losses_of(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts of the network's output, means over the batch (weighted where times are drawn unevenly).

        Args: those of `p_losses`.
        """
        losses = self.image_losses(output, x_start, t, noise, input_noise)
        prefix = "train" if self.training else "val"
        if self.time_importance is not None and self.training:
            weights = self.time_importance.weights(t).to(x_start)
            self.time_importance.update(*from_all_devices(t, losses["loss"].detach()))
            losses = {name: weights * value for name, value in losses.items()}
        parts = {f"{prefix}/{name}": value.mean().detach() for name, value in losses.items()}
        if self.times is None and self.learn_logvar:
            parts["logvar"] = self.logvar.mean().detach()
        return losses["loss"].mean(), parts

    def image_losses(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss` and its parts, each [B]: the mean squared error of what is regressed; on a table of betas
        latent-diffusion's l_simple / exp(logvar) + logvar, and the bound; or the loss of `LearnedVariance`."""
        v = None
        if self.learned_variance is not None:
            output, v = output.chunk(2, dim=1)
        target = self.target.of(x_start, noise, *self.levels(t, x_start))
        simple = self.get_loss(output, target, mean=False).mean(dim=(1, 2, 3))
        losses = {"loss_simple": simple}
        if self.times is not None:
            return {**losses, "loss": self.l_simple_weight * simple}
        if v is not None:
            seen = noise if input_noise is None else input_noise
            bound = self.learned_variance.bound(self.schedule, self.target, output, v, x_start, t, seen)
            return {**losses, "loss_vlb": bound, "loss": self.learned_variance.loss_of(simple, bound)}
        logvar = self.logvar[t]
        gamma = simple / logvar.exp() + logvar
        if self.learn_logvar:
            losses["loss_gamma"] = gamma
        bound = self.lvlb_weights[t] * simple
        return {**losses, "loss_vlb": bound, "loss": self.l_simple_weight * gamma + self.original_elbo_weight * bound}

    def condition_of(self, batch: Mapping[str, Any], uniform: Tensor) -> Any:
        """The embedded condition of a batch; `uniform` [B] decides label dropout. None for unconditional models."""
        return None

    def shared_step(self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]):
        """Loss of a batch at the draws that belong to (step, samples)."""
        x = self.get_input(batch, self.first_stage_key)
        t, noise, uniform = draws(step, samples, x.shape[1:], self.drawn_timesteps)
        t, noise, uniform = self.drawn_times(t).to(x.device), noise.to(x), uniform.to(x)
        input_noise = self.input_noise(draws, step, samples, noise)
        return self.regularised(*self.p_losses(x, self.condition_of(batch, uniform), t, noise, input_noise))

    def regularised(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the pull of an anchored member to its training loss."""
        if self.anchor is None or not self.training:
            return loss, parts
        penalty = components.anchor_penalty(self)
        loss = loss + penalty
        return loss, {**parts, "train/loss_anchor": penalty.detach(), "train/loss": loss.detach()}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches
        samples = positions(self.trainer, len(batch[self.first_stage_key]), part)
        loss, parts = self.shared_step(batch, self.draws, self.global_step, samples)
        log_step(self, parts)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size, draws = len(batch[self.first_stage_key]), self.validation_draws
        samples = evaluation_positions(self.trainer, size)
        _, parts = self.shared_step(batch, draws, batch_idx, samples)
        self.log_dict(parts, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        if self.use_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch, draws, batch_idx, samples)
            averaged = {f"{name}_ema": value for name, value in averaged.items()}
            self.log_dict(averaged, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    # Optimiser

    def configure_optimizers(self) -> Any:
        """AdamW over everything that trains, with the configured warm-up rule per step."""
        rules = components.row_rules(self)
        return optimiser(self.parameters(), self.learning_rate, self.weight_decay, self.scheduler_config, rules)
