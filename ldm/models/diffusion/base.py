"""DiffusionModel: a network, the noise process that it was made for, and its weights from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor, nn

from ldm.checkpoint import load_checkpoint, load_into
from ldm.diffusion.denoiser import Clipping, Target, make_target
from ldm.diffusion.learned_variance import LearnedVariance, check_out_channels, make_learned_variance
from ldm.diffusion.losses import elbo_weights
from ldm.diffusion.noise import CountedNoise
from ldm.diffusion.process import BetaSchedule, NoiseProcess
from ldm.diffusion.schedule import Schedule, VPSchedule
from ldm.diffusion.times import make_times
from ldm.diffusion.training_times import TrainingTimes
from ldm.ensembles.heads import ClassTables, name_heads
from ldm.models.diffusion.ancestral import SamplingMethods
from ldm.models.diffusion.process import (
    build_schedule,
    choose_config,
    refuse_table_options,
    register_tables,
    view_process,
)
from ldm.models.diffusion.weights import EMA_KEYS, IMPORTANCE_KEYS, WEIGHT_KEYS, read_weights
from ldm.modules.conditioned import (
    ConditionedNetwork,
    DiffusionWrapper,
    check_preconditioner,
    find_model_parts,
)
from ldm.modules.ema import LitEma
from ldm.modules.parts import Parts
from ldm.util import ImageSize, read_image_size, shorten_size


class DiffusionModel(SamplingMethods, pl.LightningModule):
    """A network with the noise process and the target that it is trained for; how it is trained is `DDPM`'s.

    Args:
        unet_config: the network, or its config.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: see `BetaSchedule`.
        use_ema: whether averages of the weights are kept.
        ema: arguments of `LitEma`: decay, ramp.
        image_size, channels: of the states that are noised; image_size is a number or [height, width].
        clip_denoised: clamp x_0 to [-1, 1] in sampling (models of pixels); with "x0_only" steps of DDIM keep eps.
        v_posterior: share of the forward variance in the buffer `posterior_variance`.
        conditioning_key: how the condition reaches the network, see `DiffusionWrapper`.
        parameterization: what the network regresses, see `Target`.
        schedule_config: a continuous schedule in place of the table; path_config is its former name.
        times_config: law of its training times (`ldm.diffusion.training_times`); uniform by default.
        sigma_data: standard deviation of the data, which the target "edm" needs.
        unit_time, first_time: what the network takes as time, see `BetaSchedule`.
        learned_variance: hybrid, vlb, or the arguments of `LearnedVariance`; the network has 2 C output channels.

    Attributes:
        schedule: of the noise.
        training_times: law of the times of a continuous schedule; None on a table of betas.
        target: what the network regresses.
        sampling_draws: noise of latent-diffusion's methods, where their callers give none.
    """

    schedule: Schedule
    training_times: TrainingTimes | None
    # Names in checkpoints that the model does not have and need not have, as its config says.
    ignore_keys: Sequence[str] = ()

    # Arguments that are keywords of something else: a config's are checked before anything is built.
    keyword_arguments: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "ema": partial(LitEma, nn.Identity()),  # in whose place the network comes
        "learned_variance": LearnedVariance,
    }

    def __init__(
        self,
        unet_config: Mapping[str, Any] | nn.Module,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        use_ema: bool = True,
        ema: Mapping[str, Any] | None = None,
        image_size: ImageSize = 256,
        channels: int = 3,
        clip_denoised: Clipping = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        v_posterior: float = 0.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        schedule_config: Mapping[str, Any] | Schedule | None = None,
        path_config: Mapping[str, Any] | None = None,
        times_config: Mapping[str, Any] | None = None,
        sigma_data: float = 0.5,
        unit_time: bool = False,
        first_time: int = 0,
        learned_variance: str | Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.image_size: ImageSize = shorten_size(read_image_size(image_size))
        self.channels = channels
        self.clip_denoised = clip_denoised
        self.v_posterior = v_posterior
        self.parameterization = parameterization
        self.sampling_draws = CountedNoise()
        self.target = Target(parameterization, sigma_data)
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, **(ema or {}))
        table = (given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        betas = BetaSchedule(*table, unit_time, first_time)
        self._hold_schedule(*build_schedule(choose_config(schedule_config, path_config), times_config, betas))
        self.learned_variance: LearnedVariance | None = make_learned_variance(learned_variance)
        if self.training_times is not None:
            refuse_table_options(learned_variance=learned_variance)
        check_out_channels(self.model.diffusion_model, channels, self.learned_variance)

    # Noise

    def _hold_schedule(self, schedule: Schedule, times: TrainingTimes | None) -> None:
        """Keep a schedule and the law of its training times; of a table of betas, register the buffers."""
        self.schedule = schedule
        self.training_times = times
        self.target = make_target(schedule, self.target.name, self.target.sigma_data)
        weights = None
        if isinstance(schedule, VPSchedule):
            register_tables(self, schedule, self.v_posterior)
            variance = self.get_buffer("posterior_variance").double()
            weights = elbo_weights(schedule, self.target.name, variance).float()
        self.register_buffer("lvlb_weights", weights, persistent=False)

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        unit_time: bool = False,
        first_time: int = 0,
    ) -> None:
        """Take another table of betas and its 12 buffers; arguments: see `BetaSchedule`."""
        table = (given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self._hold_schedule(BetaSchedule(*table, unit_time, first_time).build(), None)

    @property
    def process(self) -> NoiseProcess:
        """The noising, on the device and in the precision that the buffers have now."""
        return view_process(self, self.schedule, self.training_times)

    @property
    def num_timesteps(self) -> int | None:
        """Number of entries of the table of betas; None on a continuous schedule."""
        return self.process.timesteps

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma [B, 1, 1, 1] at times t [B], to multiply states `like` [B, C, H, W]."""
        return self.process.levels(t, like)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_t = alpha x_0 + sigma noise [B, C, H, W] at times t [B]; the model's own draws where None."""
        if noise is None:
            noise = self.sampling_draws.take(len(x_start), x_start.device)(0, x_start.shape).to(x_start)
        return self.process.q_sample(x_start, t, noise)

    def network_input(self, x_noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_in x_t [B, C, H, W], and what the network takes as time [B]."""
        process = self.process
        scale = self.target.coefficients(*process.levels(t, x_noisy))[2]
        return scale * x_noisy, process.network_time(t, x_noisy)

    def sampling_times(self, steps: int | str, spacing: str = "auto", **levels: float | None) -> Tensor:
        """Return the times of a sampler of so many steps, see `ldm.diffusion.times.make_times` for all of it."""
        return make_times(self.schedule, steps, spacing, **levels)

    # Network

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of the states that are noised."""
        return (self.channels, *read_image_size(self.image_size))

    @property
    def network(self) -> ConditionedNetwork:
        """The network of (x, t, condition), sharing this model's parameters under the same names."""
        return ConditionedNetwork(self.model)

    @property
    def parts(self) -> Parts:
        """Where the network keeps its parts, by names in this model's state dict."""
        return find_model_parts(self.model, None)

    @property
    def class_tables(self) -> ClassTables:
        """Which parameters hold something for each class: those of the network, in a model without an embedder."""
        return ClassTables.from_axes(self.parts.class_tables, None, 0.0)

    @property
    def head_patterns(self) -> Mapping[str, Sequence[str]]:
        """State-dict patterns of the heads that this model has by name."""
        return name_heads(self.parts, self.class_tables)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Return the network's output for an embedded condition.

        Args:
            x_noisy: states [B, C, H, W], scaled by `network_input`.
            t: the network's times [B].
            cond: a tensor [B, L, D], a list of such, or DiffusionWrapper's dict.
        """
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: list(cond) if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    # Weights

    def init_from_ckpt(
        self,
        path: str,
        ignore_keys: Sequence[str] = (),
        only_model: bool = False,
        use_averaged: bool = False,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint strictly.

        Averages are read where the model keeps them and the file has them. Those that the file does not hold start
        from the weights it does hold. A published file of a network alone is read too, see `network_alone`.

        Args:
            path, content: of the file; what it holds, where it was read already.
            ignore_keys: beginnings of names that are left out.
            only_model: read the network, `model.*`, and nothing else.
            use_averaged: take the averages as the weights, where the file has them.

        Raises:
            ValueError: if tensors are missing, unknown or of another shape, a part of the model has no weights in the
                file, or the file is of another noise schedule, scale factor or parameterization.
        """
        found = load_checkpoint(path) if content is None else content
        check_preconditioner(found, self.target.name)
        weights = read_weights(self, found, str(path), ignore_keys, only_model, use_averaged)
        if weights.network_alone:
            load_into(self.model, weights.of_network, file=path)
        else:
            optional = self._optional_keys(weights.state, weights.has_averages)
            load_into(self, weights.state, (*ignore_keys, *optional), path)
        if self.use_ema and (weights.network_alone or not weights.has_averages):
            self.model_ema.reset(self.model)

    @property
    def weights_elsewhere(self) -> tuple[str, ...]:
        """Beginnings of the names of parts that have read their weights from files of their own."""
        return ()

    def rename_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a released state dict under the names that its tensors have here."""
        return dict(state)

    def _optional_keys(self, state: Mapping[str, Tensor], has_averages: bool) -> list[str]:
        """Patterns of names that may be missing from the file or from the model."""
        optional = [] if self.use_ema and has_averages else [*EMA_KEYS]
        factors = (self.class_tables.low_rank or ())[:2]
        optional += [] if any(name in state for name in factors) else factors
        return optional + ([] if self._modules.get("time_importance") else [*IMPORTANCE_KEYS]) + [*WEIGHT_KEYS]

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Use the averaged weights inside the block, where the model keeps them (`context` is latent-diffusion's)."""
        return self.model_ema.scope(self.model) if self.use_ema else nullcontext()

    def drop_averages(self) -> None:
        """Keep no averages of the weights from now on."""
        if self.use_ema:
            self.use_ema = False
            del self.model_ema
