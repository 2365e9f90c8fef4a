"""DDPM: the training of a diffusion model, which holds a loss and, in an ensemble, the member that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.arguments import leave_out_neutral
from ldm.diffusion.losses import DiffusionLoss, LossSettings, elementwise_error
from ldm.diffusion.noise import TrainingDraws
from ldm.diffusion.time_importance import LossSecondMoments, make_importance
from ldm.diffusion.weighting import make_loss_weight
from ldm.models.diffusion.alignment import Alignment, compute_aligned, set_up_alignment
from ldm.models.diffusion.base import DiffusionModel
from ldm.models.diffusion.loss_parameters import hold_loss_parameters
from ldm.models.diffusion.members import MemberTraining, merge_heads, start_member
from ldm.models.diffusion.optimisation import (
    attached_trainer,
    check_base,
    evaluation_positions,
    gather_from_devices,
    log_step,
    make_optimiser,
    positions,
    read_states,
    shares_state,
)

Batch = Mapping[str, Any]
# latent-diffusion's keys that are accepted, by the values under which they change nothing; (): all of them.
IGNORED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "log_every_t": (),
    "use_positional_encodings": (None, False),
    "cond_stage_forward": (None, "encode", "forward"),
}


def read_images(x: Tensor) -> Tensor:
    """Return images [B, H, W, C] (or [B, H, W]) of a batch as float [B, C, H, W]."""
    x = x[..., None] if x.ndim == 3 else x
    return rearrange(x, "b h w c -> b c h w").contiguous().float()


class DDPM(DiffusionModel):
    """Training of a diffusion model on what `get_input` returns; arguments are latent-diffusion's.

    Args:
        loss_type: l1 or l2.
        ckpt_path: checkpoint to start from.
        ignore_keys: beginnings of names that are left out of it.
        load_only_unet: take the network alone of it.
        monitor: the metric by which the best checkpoint is chosen.
        first_stage_key: name of the images [B, H, W, C] in a batch.
        original_elbo_weight: weight of the variational bound in the loss.
        l_simple_weight: weight of the mean error in the loss.
        scheduler_config: rule by which the learning rate changes, per step.
        learn_logvar: whether the logarithm of the loss's variance at each entry of the table trains.
        logvar_init: its start.
        alignment_config: a term of features of another network, see `AlignmentOptions`; members train without it.
        loss_weight: weight of the loss per noise level, see `ldm.diffusion.weighting`; None: the keys above.
        weight_decay: of AdamW (the published default is 0.01).
        pretrained_path: base checkpoint of the members of an ensemble.
        heads: options of a member's heads, see `start_member`.
        schedule_sampler: uniform, or loss-second-moment, as ADM has it.
        input_perturbation: see `input_noise`.
        model: arguments of `DiffusionModel`, and those of `IGNORED_ARGUMENTS`, whose other values are errors.

    Attributes:
        member: the ensemble member that is trained; None for a base model.
        draws: streams of times, noises and label dropout in training.
        validation_draws: the same in validation.
        learning_rate: of the optimiser, to be set before a training.
    """

    logvar: Tensor | None
    lvlb_weights: Tensor | None
    loss_weight: nn.Module | None
    learning_rate: float | None
    member: MemberTraining | None
    alignment: Alignment | None
    time_importance: LossSecondMoments | None
    draw_input = read_states
    setup = set_up_alignment

    def __init__(
        self,
        unet_config: Mapping[str, Any] | nn.Module,
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        first_stage_key: str = "image",
        original_elbo_weight: float = 0.0,
        l_simple_weight: float = 1.0,
        scheduler_config: Mapping[str, Any] | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        loss_weight: str | Mapping[str, Any] | None = None,
        weight_decay: float = 0.0,
        pretrained_path: str | None = None,
        heads: Mapping[str, Any] | None = None,
        schedule_sampler: str = "uniform",
        input_perturbation: float = 0.0,
        alignment_config: Mapping[str, Any] | None = None,
        **model: Any,
    ):
        known = leave_out_neutral(model, IGNORED_ARGUMENTS)
        super().__init__(unet_config, **known)
        self.first_stage_key = first_stage_key
        self.input_perturbation = input_perturbation
        self.alignment_config = alignment_config
        self.alignment = None
        self.monitor = monitor
        self.weight_decay = weight_decay
        self.scheduler_config = scheduler_config
        self.learning_rate = None
        self.pretrained_path = pretrained_path
        self.head_options = dict(heads or {})
        self.member = None
        self.seed_draws(0)
        weights = (l_simple_weight, original_elbo_weight, learn_logvar, self.learned_variance)
        self.loss_settings = LossSettings(loss_type, *weights, make_loss_weight(loss_weight))
        hold_loss_parameters(self, logvar_init)
        self.time_importance = make_importance(schedule_sampler, self.num_timesteps)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def seed_draws(self, seed: int, member: int = 0) -> None:
        """Choose the streams of times, noises and label dropout."""
        self.draws = TrainingDraws(seed, member)
        self.validation_draws = replace(self.draws, purpose="validation")

    # Loss

    @property
    def loss(self) -> DiffusionLoss:
        """What training minimises, of each image, on the device and in the precision that the buffers have now."""
        return self.loss_settings.build(self.process, self.target, self.logvar, self.lvlb_weights)

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Return the error of the network's output, reduced to its mean or unreduced."""
        error = elementwise_error(pred, target, self.loss_settings.error)
        return error.mean() if mean else error

    @property
    def drawn_timesteps(self) -> int | None:
        """What `TrainingDraws` takes as `timesteps`: None asks for a uniform draw in [0, 1) for each time."""
        return None if self.time_importance is not None and self.training else self.num_timesteps

    def drawn_times(self, draws: Tensor) -> Tensor:
        """Turn draws of `TrainingDraws`, of any shape, into the times t that they stand for."""
        if self.time_importance is not None and draws.is_floating_point():
            return self.time_importance.times(draws)
        return self.process.training_times(draws)

    def input_noise(self, draws: TrainingDraws, step: int, samples: Sequence[int], noise: Tensor) -> Tensor:
        """In training, return noise + gamma xi with xi standard normal, gamma being `input_perturbation`.

        The input then differs from what the target says, as it does in sampling (Ning et al. 2023, DDPM-IP).
        """
        if not (self.input_perturbation and self.training):
            return noise
        return noise + self.input_perturbation * draws.perturbation(step, samples, noise.shape[1:]).to(noise)

    def p_losses(
        self,
        x_start: Tensor,
        cond: Any,
        t: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss [] and its parts for an embedded condition.

        Args:
            x_start: clean states [B, C, H, W].
            cond: see `apply_model`.
            t: times [B], see `NoiseProcess`.
            noise: like x_start, the target's.
            input_noise: what the network's input is noised with instead, see `input_noise`.
            target_noise: see `compute_loss`.
        """
        x_noisy = self.q_sample(x_start, t, noise if input_noise is None else input_noise)
        inputs, time = self.network_input(x_noisy, t)
        output = self.apply_model(inputs, time, cond)
        return self.compute_loss(output, x_start, t, noise, input_noise, target_noise)

    def compute_loss(
        self,
        output: Tensor,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        target_noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss [] and parts of the network's output, means over the batch; arguments: see `DiffusionLoss`.

        Images are weighted where times are drawn unevenly. `target_noise` is added to the targets.
        """
        if target_noise is not None:
            output = output - target_noise
        losses = self.loss(output, x_start, t, noise, input_noise)
        if self.time_importance is not None and self.training:
            weights = self.time_importance.weights(t).to(x_start)
            self.time_importance.update(*gather_from_devices(t, losses.total.detach()))
            losses = losses.weighted(weights)
        parts = losses.batch_means("train" if self.training else "val")
        if self.loss_settings.learns_logvar and self.logvar is not None:
            parts["logvar"] = self.logvar.mean().detach()
        return losses.total.mean(), parts

    def draw_target_noise(self, batch: Batch, x: Tensor) -> Tensor | None:
        """Return the noise of an anchored member's targets in training; None where it has none."""
        return None if self.member is None or not self.training else self.member.draw_target_noise(batch, x)

    def add_penalty(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the pull of an anchored member to its training loss."""
        if self.member is None or self.member.anchor is None or not self.training:
            return loss, parts
        penalty = self.member.penalty(self, attached_trainer(self))
        loss = loss + penalty
        return loss, {**parts, "train/loss_anchor": penalty.detach(), "train/loss": loss.detach()}

    # Steps

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """Return batch[k] [B, H, W, C] (or [B, H, W]) as float [B, C, H, W]."""
        return read_images(batch[k])

    def embed_condition(self, batch: Batch, uniform: Tensor) -> Any:
        """Embed the condition of a batch; `uniform` [B] decides label dropout. None for unconditional models."""
        return None

    def shared_step(
        self, batch: Batch, draws: TrainingDraws, step: int, samples: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss [] and parts of a batch at the draws that belong to (step, samples)."""
        x = self.draw_input(batch, [draws], step, samples)
        t, noise, uniform = draws(step, samples, x.shape[1:], self.drawn_timesteps)
        t, noise, uniform = self.drawn_times(t).to(x.device), noise.to(x), uniform.to(x)
        input_noise = self.input_noise(draws, step, samples, noise)
        cond = self.embed_condition(batch, uniform)
        compute = partial(self.p_losses, x, cond, t, noise, input_noise, self.draw_target_noise(batch, x))
        return self.add_penalty(*compute_aligned(self, batch, compute))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches
        samples = positions(self.trainer, len(batch[self.first_stage_key]), part)
        loss, parts = self.shared_step(batch, self.draws, self.global_step, samples)
        log_step(self, parts)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        draws = self.validation_draws
        size = len(batch[self.first_stage_key])
        samples = evaluation_positions(self.trainer, size)
        _, parts = self.shared_step(batch, draws, batch_idx, samples)
        self.log_dict(parts, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        if self.use_ema:
            with self.ema_scope():
                _, parts = self.shared_step(batch, draws, batch_idx, samples)
            with_averages = {f"{name}_ema": value for name, value in parts.items()}
            self.log_dict(with_averages, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """Make an AdamW over everything that trains, with the configured warm-up rule per step."""
        rules = None if self.member is None else self.member.row_rules(self, attached_trainer(self))
        own = (self.learning_rate, self.weight_decay, self.scheduler_config)
        return make_optimiser(self.parameters(), *own, rules, shares_state(attached_trainer(self)))

    # Member of an ensemble

    def start_from_pretrained(self, index: int, seed: int) -> MemberTraining:
        """Become member `index`: load and freeze the base checkpoint, start the heads; see `start_member`."""
        base = check_base(self.pretrained_path)
        self.member = start_member(self, base, index, seed, self.head_options)
        self.member.check_loss(self.loss_settings)
        return self.member

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.member is not None:
            self.member.keep_heads(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "component" in checkpoint:
            merge_heads(checkpoint, self.member, self.state_dict())
