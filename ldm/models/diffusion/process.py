"""The noising of a LightningModule: a table of betas with its 12 buffers, or a continuous schedule from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.buffers import schedule_buffers
from ldm.diffusion.denoiser import Target, make_target
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.losses import elbo_weights
from ldm.diffusion.noise import TrainingDraws
from ldm.diffusion.schedule import Schedule, VPSchedule, make_betas
from ldm.diffusion.time_importance import LossSecondMoments
from ldm.diffusion.training_times import TrainingTimes, UniformTimes
from ldm.util import instantiate_from_config

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class NoiseProcess:
    """What a module needs to noise data and to tell its network the time; goes before it among the bases.

    The module sets `target`, `channels`, `parameterization`, `v_posterior` and `original_elbo_weight`. Its `t` [B]
    count the entries of a table from 0 (latent-diffusion), or are the times u of a continuous schedule, in float64.
    """

    schedule: Schedule
    target: Target
    num_timesteps: int | None
    times: TrainingTimes | None = None
    learned_variance: LearnedVariance | None = None
    time_importance: LossSecondMoments | None

    def register_process(
        self,
        path_config: Mapping[str, Any] | None,
        times_config: Mapping[str, Any] | None,
        tables: Sequence[Any],
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
    ) -> None:
        """A continuous schedule where a config names one, else a table of betas (`tables`: see `register_schedule`).

        Raises:
            ValueError: if what belongs to one of the two comes with the other, or the target is no schedule.
        """
        if path_config is None:
            if times_config is not None:
                raise ValueError("times_config belongs to a continuous schedule: set path_config, or leave it out")
            self.register_schedule(*tables)
            self._register_logvar(learn_logvar, logvar_init)
            return
        given = {"given_betas": tables[0], "unit_time": tables[-1], "learn_logvar": learn_logvar}
        given["original_elbo_weight"] = self.original_elbo_weight
        foreign = [name for name, value in given.items() if value]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} belong to a table of betas: leave them out, or leave out path_config"
            )
        schedule = instantiate_from_config(path_config)
        if not isinstance(schedule, Schedule) or isinstance(schedule, VPSchedule):
            raise ValueError(
                f"path_config.target must be a continuous schedule, FlowSchedule for example; got {path_config}"
            )
        self.schedule, self.num_timesteps = schedule, None
        self.target = make_target(schedule, self.target.name, self.target.sigma_data)
        self.times = UniformTimes() if times_config is None else instantiate_from_config(times_config)

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        unit_time: bool = False,
    ) -> None:
        """Build the schedule and its 12 buffers; a list of betas goes before a named schedule."""
        if given_betas is None:
            betas = make_betas(schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = torch.as_tensor(given_betas, dtype=torch.float64)
        self.schedule, self.num_timesteps = VPSchedule(betas, unit_time), len(betas)
        tables = schedule_buffers(self.schedule, self.v_posterior)
        for name, table in tables.items():
            self.register_buffer(name, table)
        weights = elbo_weights(self.schedule, self.parameterization, tables["posterior_variance"].double())
        self.register_buffer("lvlb_weights", weights.float(), persistent=False)

    def seed_draws(self, seed: int, member: int = 0) -> None:
        """Choose the streams of times, noises and label dropout."""
        self.draws = TrainingDraws(seed, member)
        self.validation_draws = TrainingDraws(seed, member, purpose="validation")

    def _register_logvar(self, learn: bool, value: float) -> None:
        """The logarithm of the loss's variance at each entry of the table (latent-diffusion), learned or held."""
        self.learn_logvar = learn
        logvar = torch.full((self.num_timesteps,), float(value))
        if learn:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    def register_variance(
        self, learned: str | Mapping[str, Any] | None, schedule_sampler: str, network: nn.Module
    ) -> None:
        """Whether and how the variance of ancestral steps is learned, and how often each time is trained.

        Raises:
            ValueError: for an unknown name, a choice that a continuous schedule does not have, or a network whose
            output
                has another number of channels.
        """
        if schedule_sampler not in SCHEDULE_SAMPLERS:
            raise ValueError(f"schedule_sampler must be one of {SCHEDULE_SAMPLERS}, got '{schedule_sampler}'")
        if self.times is not None and (learned is not None or schedule_sampler != "uniform"):
            raise ValueError(
                "learned_variance and schedule_sampler belong to a table of betas: leave them out (a continuous "
                "schedule has times_config), or leave out path_config"
            )
        if learned is not None:
            self.learned_variance = LearnedVariance(**({"loss": learned} if isinstance(learned, str) else learned))
        self.time_importance = None if schedule_sampler == "uniform" else LossSecondMoments(self.num_timesteps)
        expected, found = self.channels * (1 if learned is None else 2), getattr(network, "out_channels", None)
        if found != expected and found in (self.channels, 2 * self.channels):
            raise ValueError(
                f"learned_variance: {learned or 'null'} needs a network with out_channels: {expected} for "
                f"{self.channels} channels, got {found}; {2 * self.channels} go with learned_variance: hybrid"
            )

    @property
    def drawn_timesteps(self) -> int | None:
        """What `TrainingDraws` takes as `timesteps`: None asks for a uniform draw in [0, 1) for each time."""
        return None if self.time_importance is not None and self.training else self.num_timesteps

    def drawn_times(self, draws: Tensor) -> Tensor:
        """Times t of any shape that draws of `TrainingDraws` stand for: themselves, or quantiles of the times' law."""
        if self.times is not None:
            return self.times(draws, self.schedule)
        return self.time_importance.times(draws) if draws.is_floating_point() else draws

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B, 1, 1, 1] at times t [B], in the dtype of `like`."""
        if self.times is not None:
            return self.schedule.coefficients(t, like)
        return self.sqrt_alphas_cumprod[t].reshape(-1, 1, 1, 1), self.sqrt_one_minus_alphas_cumprod[t].reshape(
            -1, 1, 1, 1
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise [B, C, H, W] at times t [B]."""
        alpha, sigma = self.levels(t, x_start)
        return alpha * x_start + sigma * noise

    def network_input(self, x_noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x_t [B, C, H, W], and what the network takes as time [B]."""
        scale = self.target.coefficients(*self.levels(t, x_noisy))[2]
        if self.times is not None:
            return scale * x_noisy, self.schedule.time_to_net(t).to(x_noisy)
        return scale * x_noisy, (t + 1) / self.num_timesteps if self.schedule.unit_time else t
