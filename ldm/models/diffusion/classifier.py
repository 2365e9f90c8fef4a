"""Training a classifier of noisy images, whose gradient guides sampling (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint import load_into, load_state_dict
from ldm.diffusion.denoiser import Target
from ldm.diffusion.network import is_bare
from ldm.diffusion.noise import TrainingDraws
from ldm.diffusion.schedule import Schedule
from ldm.models.diffusion.optimisation import evaluation_positions, log_step, optimiser, positions
from ldm.models.diffusion.process import NoiseProcess
from ldm.util import instantiate_from_config

PREFIX = "classifier."
TOP = (1, 5)


class NoisyClassifier(NoiseProcess, pl.LightningModule):
    """`classifier(x_t, t) -> logits` under cross-entropy at random times of a diffusion model's schedule.

    Args:
        classifier_config: the network, called with (x [B, C, H, W], time [B]): `EncoderUNetModel`.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas, unit_time, path_config, times_config:
            the noising, as those of the diffusion model that will be guided (see `DDPM`).
        image_key, label_key: names in a batch of images [B, H, W, C] in [-1, 1] and labels [B].
        noised: False shows clean images only (a published option), told the time of the table's first entry; on a
            continuous schedule that of clean data, or of sigma_min where the network takes the logarithm of the noise.
        weight_decay, scheduler_config, monitor, ckpt_path: as in `DDPM`.
    """

    use_ema = False
    channels = 0

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
        self.target, self.parameterization = Target("eps"), "eps"
        self.v_posterior = self.original_elbo_weight = 0.0
        self.image_key, self.label_key, self.noised = image_key, label_key, noised
        self.weight_decay, self.scheduler_config, self.monitor = weight_decay, scheduler_config, monitor
        self.learning_rate: float | None = None
        self.seed_draws(0)
        self.classifier = instantiate_from_config(classifier_config)
        tables = (given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s, unit_time)
        self.register_process(path_config, times_config, tables)
        self.time_importance = None
        if ckpt_path:
            self.init_from_ckpt(ckpt_path)

    @classmethod
    def around(cls, network: nn.Module) -> NoisyClassifier:
        """A network that was built already, on a schedule of no account."""
        made = cls({"target": "torch.nn.Identity"})
        made.classifier = network
        return made

    def init_from_ckpt(self, schedule: str) -> None:
        """Load the network strictly, from a run's checkpoint or from guided-diffusion's file of the network alone."""
        state = load_state_dict(schedule)
        if not is_bare(state):
            state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        load_into(self.classifier, state)

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
        """Images [B, C, H, W] as they are: such a classifier has no first stage."""
        return images

    def get_first_stage_encoding(self, encoded: Tensor) -> Tensor:
        """The same."""
        return encoded

    def noisy(self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]):
        """What the network sees: (c_in x_t [B, C, H, W], its time [B]) at the draws that belong to (step, samples)."""
        x = batch[self.image_key].movedim(-1, 1).float()
        t, noise, _ = draws(step, samples, x.shape[1:], self.drawn_timesteps)
        t, noise = self.drawn_times(t).to(x.device), noise.to(x)
        if not self.noised:
            return self.network_input(x, torch.full_like(t, 0 if self.times is None else self.schedule.cleanest))
        return self.network_input(self.q_sample(x, t, noise), t)

    def forward(self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]):
        """Cross-entropy in nats [], and it with the share of images whose label is among the first 1 and 5."""
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
        """The images of a batch, and noised as the network sees them."""
        noised, _ = self.noisy(batch, self.validation_draws, 0, range(len(batch[self.image_key])))
        return {"inputs": batch[self.image_key].movedim(-1, 1).float(), "noised": noised}

    def configure_optimizers(self) -> Any:
        """AdamW, with the configured warm-up rule per step."""
        return optimiser(self.parameters(), self.learning_rate, self.weight_decay, self.scheduler_config)
