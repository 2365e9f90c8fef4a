"""Training a classifier of noisy images, whose gradient guides sampling (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint import load_into, load_state_dict
from ldm.diffusion.noise import TrainingDraws
from ldm.diffusion.process import BetaSchedule, NoiseProcess
from ldm.diffusion.schedule import Schedule, VPSchedule
from ldm.models.diffusion.optimisation import evaluation_positions, log_step, make_optimiser, positions
from ldm.models.diffusion.process import build_schedule, check_tables, choose_config, register_tables, view_process
from ldm.modules.conditioned import is_bare
from ldm.util import instantiate_as

PREFIX = "classifier."
TOP = (1, 5)


def load_classifier_weights(network: nn.Module, file: str, holder: nn.Module) -> None:
    """Load a classifier strictly, from a run's checkpoint or from guided-diffusion's file of the network alone.

    Args:
        network: what is loaded.
        file: the weights.
        holder: a module whose noise levels must be those of the file, where that has any.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, or the noise levels are others.
    """
    state = load_state_dict(file)
    check_tables(holder, state, file)
    if not is_bare(state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    load_into(network, state, file=file)


class NoisyClassifier(pl.LightningModule):
    """`classifier(x_t, t) -> logits` under cross-entropy at random times of a diffusion model's schedule.

    Args:
        classifier_config: the network, called with (x [B, C, H, W], time [B]): `EncoderUNetModel`.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas, unit_time, schedule_config,
            path_config, times_config: the noising, as in the diffusion model that is guided (see `DiffusionModel`).
        image_key: name in a batch of the images [B, H, W, C] in [-1, 1].
        label_key: name in a batch of the labels [B].
        noised: False shows clean images only (a published option), conditioned on the time of the table's first
            entry; on a continuous schedule on that of clean data, or of sigma_min where the network takes the
            logarithm of the noise.
        weight_decay, scheduler_config, monitor, ckpt_path: as in `DDPM`.
    """

    def __init__(
        self,
        classifier_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        unit_time: bool = False,
        schedule_config: Mapping[str, Any] | None = None,
        path_config: Mapping[str, Any] | None = None,
        times_config: Mapping[str, Any] | None = None,
        image_key: str = "image",
        label_key: str = "class_label",
        noised: bool = True,
        weight_decay: float = 0.0,
        scheduler_config: Mapping[str, Any] | None = None,
        monitor: str | None = "val/loss",
        ckpt_path: str | None = None,
    ):
        super().__init__()
        self.image_key = image_key
        self.label_key = label_key
        self.noised = noised
        self.weight_decay = weight_decay
        self.scheduler_config = scheduler_config
        self.monitor = monitor
        self.learning_rate: float | None = None
        self.seed_draws(0)
        self.classifier = instantiate_as(nn.Module, classifier_config, "model.params.classifier_config")
        betas = BetaSchedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s, unit_time)
        config = choose_config(schedule_config, path_config)
        self.schedule, self.training_times = build_schedule(config, times_config, betas)
        if isinstance(self.schedule, VPSchedule):
            register_tables(self, self.schedule)
        if ckpt_path:
            self.init_from_ckpt(ckpt_path)

    def seed_draws(self, seed: int, member: int = 0) -> None:
        """Choose the streams of times and noises."""
        self.draws = TrainingDraws(seed, member)
        self.validation_draws = replace(self.draws, purpose="validation")

    def init_from_ckpt(self, path: str) -> None:
        """Load the network, see `load_classifier_weights`."""
        load_classifier_weights(self.classifier, path, self)

    @property
    def process(self) -> NoiseProcess:
        """The noising, on the device and in the precision that the buffers have now."""
        return view_process(self, self.schedule, self.training_times)

    def knows(self, schedule: Schedule) -> bool:
        """Whether the noise levels and network times of a schedule are those of training."""
        shares = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
        return self.schedule.end == schedule.end and all(
            torch.allclose(
                getattr(self.schedule, name)(shares * schedule.end), getattr(schedule, name)(shares * schedule.end)
            )
            for name in ("alpha", "sigma", "time_to_net")
        )

    def encode_first_stage(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W] as they are: such a classifier has no first stage."""
        return images

    def get_first_stage_encoding(self, encoded: Tensor) -> Tensor:
        """Return the same, unscaled."""
        return encoded

    def noisy(
        self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return what the network sees, (x_t [B, C, H, W], its time [B]), at the draws of (step, samples)."""
        process = self.process
        x = batch[self.image_key].movedim(-1, 1).float()
        t, noise, _ = draws(step, samples, x.shape[1:], process.timesteps)
        t, noise = process.training_times(t).to(x.device), noise.to(x)
        if not self.noised:
            return x, process.network_time(torch.full_like(t, process.cleanest), x)
        return process.q_sample(x, t, noise), process.network_time(t, x)

    def forward(
        self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy in nats [], and it with the shares of labels that are among the first 1 and 5."""
        logits, labels = self.classifier(*self.noisy(batch, draws, step, samples)), batch[self.label_key]
        loss = F.cross_entropy(logits, labels)
        prefix = "train" if self.training else "val"
        parts = {f"{prefix}/loss": loss.detach()}
        for count in (top for top in TOP if top < logits.shape[-1]):
            hit = (logits.topk(count).indices == labels[:, None]).any(1)
            parts[f"{prefix}/acc@{count}"] = hit.float().mean()
        return loss, parts

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches
        samples = positions(self.trainer, len(batch[self.image_key]), part)
        loss, parts = self(batch, self.draws, self.global_step, samples)
        log_step(self, parts)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = len(batch[self.image_key])
        _, parts = self(batch, self.validation_draws, batch_idx, evaluation_positions(self.trainer, size))
        self.log_dict(parts, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the images of a batch, and noised as the network sees them."""
        noised, _ = self.noisy(batch, self.validation_draws, 0, range(len(batch[self.image_key])))
        return {"inputs": batch[self.image_key].movedim(-1, 1).float(), "noised": noised}

    def configure_optimizers(self) -> Any:
        """Make an AdamW, with the configured warm-up rule per step."""
        return make_optimiser(self.parameters(), self.learning_rate, self.weight_decay, self.scheduler_config)
