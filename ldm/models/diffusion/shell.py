"""latent-diffusion's sampler classes, `Sampler(model).sample(S, batch_size, shape, conditioning, ...)`, over our own.

What CompVis' classes ignore, or read from the global random state, is an error or an argument here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.denoiser import Denoiser, MappedDenoiser, NetworkDenoiser, Target, guided
from ldm.diffusion.embedded import check_condition
from ldm.diffusion.noise import CountedNoise, ImageNoise
from ldm.diffusion.samplers import Step, make_sampler, make_times
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import ddim_transition
from ldm.util import derive_seed

Intermediates = dict[str, list[Tensor]]


class TableModel(Protocol):
    """What CompVis' samplers ask of a model, which was trained on a table of betas."""

    @property
    def schedule(self) -> Schedule:
        """Of the noise."""

    @property
    def target(self) -> Target:
        """What the network regresses."""

    @property
    def num_timesteps(self) -> int | None:
        """Number of entries of the table."""

    @property
    def betas(self) -> Tensor:
        """The table [T], on the device of the model."""

    @property
    def first_stage_model(self) -> Any:
        """What quantises x_0 where that is asked for."""

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Return the network's output for an embedded condition."""


class SamplerShell:
    """One of our samplers behind CompVis' signature; subclasses name it.

    Randomness: draws come from (seed, image, step). The seed is this object's, and images are counted over its calls,
    so repeated calls give new samples and a new object repeats them; `seed=` in a call starts its count from 0.

    Args:
        model: LatentDiffusion: `apply_model`, `schedule`, `target`, the schedule buffers, `first_stage_model`.
        schedule: CompVis' argument, which names nothing; only "linear".
        seed: of the draws.

    After `make_schedule` or `sample`: `ddim_timesteps` (ascending network times, NumPy), `ddim_alphas`,
    `ddim_alphas_prev`, `ddim_sigmas`, `ddim_sqrt_one_minus_alphas` (float64 [S]) and `times`.
    """

    sampler_name = "DDIM"
    quantizes = False

    def __init__(self, model: TableModel, schedule: str = "linear", seed: int = 0):
        if schedule != "linear":
            raise ValueError(f"the schedule is the model's own; schedule must be 'linear', got '{schedule}'")
        if model.num_timesteps is None:
            raise ValueError(
                "this model has a continuous schedule, and CompVis' samplers a table of betas: use model.sample"
            )
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = model.num_timesteps
        self.draws = CountedNoise(seed)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the times and fill the attributes that CompVis' users read.

        Args:
            ddim_discretize: "uniform" (CompVis' times where S divides T, else evenly spaced ones: always S steps),
                "quad", or a spacing of `vp_times`; "published" is CompVis' times even where it has another length.
            verbose: CompVis prints here; nothing is printed.
        """
        schedule = self.model.schedule
        self.times = make_times(schedule, ddim_num_steps, "auto" if ddim_discretize == "uniform" else ddim_discretize)
        ascending, later = self.times[:-1].flip(0), self.times[1:].flip(0)
        self.ddim_timesteps = schedule.time_to_net(ascending).long().numpy()
        self.ddim_alphas = schedule.alpha(ascending) ** 2
        self.ddim_alphas_prev = schedule.alpha(later) ** 2
        self.ddim_sqrt_one_minus_alphas = schedule.sigma(ascending)
        pairs = zip(ascending.tolist(), later.tolist(), strict=True)
        self.ddim_sigmas = torch.stack([ddim_transition(schedule, u, s, ddim_eta).w.sqrt() for u, s in pairs])
        self.ddim_eta = ddim_eta
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev"):
            setattr(self, name, getattr(self.model, name))

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: None = None,
        corrector_kwargs: None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        *,
        ddim_discretize: str = "uniform",
        seed: int | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Latents [B, *shape] and intermediates `x_inter`, `pred_x0`: x_T, the first step, every log_every_t-th.

        Args: S, ddim_discretize: see `make_schedule`; seed: see the class; verbose: show progress.
            conditioning: embedded context [B, L, D] (`get_learned_conditioning`), a list of such, or a mapping of
                lists, {"c_crossattn": [c], "c_concat": [z]}; unconditional_conditioning has the same form.
            callback, img_callback: called with (step) and (x_0_hat, step).
            mask, x0: inpainting: where mask [B, 1, H, W] is 1 the state is x0 [B, *shape], noised, before every step.
            x_T: initial state [B, *shape]; drawn where None.

        Raises:
            ValueError: for what is not supported, and for shapes that do not fit.
        """
        self._refuse(
            normals_sequence=normals_sequence,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            noise_dropout=noise_dropout or None,
            quantize_x0=(quantize_x0 and not self.quantizes) or None,
        )
        sampler = make_sampler(self.sampler_name, eta=eta, temperature=temperature)
        self.make_schedule(S, ddim_discretize, eta, verbose)
        context = check_condition(conditioning, batch_size), check_condition(unconditional_conditioning, batch_size)
        denoiser = self._denoiser(*context, unconditional_guidance_scale, quantize_x0)
        noise = self._noise(batch_size, seed)
        x = noise.initial((batch_size, *shape)) if x_T is None else x_T.to(noise.device)
        if tuple(x.shape) != (batch_size, *shape):
            raise ValueError(f"x_T must be {(batch_size, *shape)}, got {tuple(x.shape)}")
        known = _inpainting(self, mask, x0, noise)
        start = x if known is None else known(x, 0)
        steps = keep_known(sampler(denoiser, self.model.schedule, start, self.times, noise=noise), known)
        bar = tqdm(steps, total=len(self.times) - 1, desc=self.sampler_name, disable=not verbose)
        return self._follow(bar, x, callback, img_callback, log_every_t)

    def _follow(
        self,
        steps: Iterable[Step],
        x: Tensor,
        callback: Callable[[int], object] | None,
        img_callback: Callable[[Tensor, int], object] | None,
        log_every_t: int,
    ) -> tuple[Tensor, Intermediates]:
        total = len(self.times) - 1
        intermediates: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        for step in steps:
            if callback is not None:
                callback(step.index)
            if img_callback is not None:
                img_callback(step.x0, step.index)
            if step.index == 0 or (total - 1 - step.index) % log_every_t == 0:
                intermediates["x_inter"].append(step.x_next)
                intermediates["pred_x0"].append(step.x0)
            x = step.x_next
        return x, intermediates

    def _refuse(self, **options: Any) -> None:
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{type(self).__name__} does not support {', '.join(given)}; leave it out")

    def _denoiser(self, cond: Any, null: Any, scale: float, quantize: bool) -> Denoiser:
        model = self.model
        learned = getattr(model, "learned_variance", None) is not None
        own = NetworkDenoiser(model.apply_model, model.schedule, model.target, cond, learned_range=learned)
        denoiser = guided(own, null, scale)
        if not quantize:
            return denoiser
        return MappedDenoiser(
            denoiser, model.schedule, lambda x0: model.first_stage_model.quantize(x0)[0], rederive=False
        )

    def _noise(self, batch_size: int, seed: int | None) -> ImageNoise:
        draws = self.draws if seed is None else CountedNoise(seed)
        return draws.take(batch_size, self.model.betas.device)


class Inpainting:
    """The known part of an image, noised to the time of each step, in place of the state's."""

    def __init__(self, shell: SamplerShell, mask: Tensor, x0: Tensor, noise: ImageNoise):
        self.schedule = shell.model.schedule
        self.times = shell.times
        self.mask = mask.to(noise.device)
        self.x0 = x0.to(noise.device)
        self.noise = ImageNoise(derive_seed("inpainting", noise.seed), noise.images, noise.device)

    def __call__(self, x: Tensor, index: int) -> Tensor:
        """mask x_known + (1 - mask) x [B, C, H, W] at step `index`."""
        eps = self.noise(index, self.x0.shape).to(self.x0)
        known = self.schedule.noised(self.x0, eps, float(self.times[index]))
        return self.mask * known + (1 - self.mask) * x


def _inpainting(shell: SamplerShell, mask: Tensor | None, x0: Tensor | None, noise: ImageNoise) -> Inpainting | None:
    if mask is not None and x0 is not None:
        return Inpainting(shell, mask, x0, noise)
    if mask is not None or x0 is not None:
        raise ValueError("inpainting takes both mask and x0")
    return None


def keep_known(steps: Any, known: Inpainting | None) -> Iterator[Step]:
    """Yield the steps of a sampler; between two of them the known part of the image is put back."""
    step = next(steps)
    while True:
        yield step
        try:
            step = steps.send(None if known is None else known(step.x_next, step.index + 1))
        except StopIteration:
            return
