"""DDIM behind latent-diffusion's call signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.embedded import check_condition
from ldm.diffusion.transition import ddim, run
from ldm.models.diffusion.shell import SamplerShell


class DDIMSampler(SamplerShell):
    """`sample(...)` by DDIM at any eta (Song et al. 2021); see `SamplerShell`.

    After `make_schedule(S, ...)` single steps can be taken, images encoded to a step and decoded from it. Steps are
    counted from the data: 0 is the last one that is taken. With `use_original_steps` they are all times of the table,
    in place of the S of `make_schedule`.
    """

    sampler_name = "DDIM"
    quantizes = True

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: None = None,
        corrector_kwargs: None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Take step `index`; return the next state and the predicted x_0, [B, C, H, W] each.

        Args:
            x: the state [B, C, H, W] at this step's time.
            t: the network's time [B] of this step, which `index` says as well.
            repeat_noise: all images of the batch share one draw.

        Other arguments and errors are those of `sample`.
        """
        self._refuse(
            score_corrector=score_corrector, corrector_kwargs=corrector_kwargs, noise_dropout=noise_dropout or None
        )
        context = check_condition(c, len(x)), check_condition(unconditional_conditioning, len(x))
        denoiser = self._denoiser(*context, unconditional_guidance_scale, quantize_denoised)
        times = self._times(use_original_steps)
        drawn = self.draws.take(1 if repeat_noise else len(x), x.device)

        def noise(step: int, shape: Any) -> Tensor:
            return drawn(step, (len(drawn.images), *shape[1:])).expand(*shape)

        schedule, start, eta = self.model.schedule, len(times) - 2 - index, self.ddim_eta
        step = next(ddim(denoiser, schedule, x, times, eta=eta, temperature=temperature, noise=noise, start=start))
        return step.x_next, step.x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Return x0 [B, C, H, W] noised to the time of step t [B]; the sampler draws the noise where it is None."""
        ascending = self._times(use_original_steps)[:-1].flip(0)
        if noise is None:
            noise = self.draws.take(len(x0), x0.device)(0, x0.shape)
        return self.model.schedule.noised(x0, noise.to(x0), ascending[t.cpu().long()])

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """Take the last `t_start` steps from a state [B, C, H, W]; return the last state.

        The first of them is step t_start - 1. Scripts written for latent-diffusion hand over a state that is encoded
        to step t_start, which is a little noisier.
        """
        size = len(x_latent)
        context = check_condition(cond, size), check_condition(unconditional_conditioning, size)
        denoiser = self._denoiser(*context, unconditional_guidance_scale, False)
        times = self._times(use_original_steps)
        noise = self.draws.take(size, x_latent.device)
        schedule, start = self.model.schedule, len(times) - 1 - t_start
        return run(ddim(denoiser, schedule, x_latent, times, eta=self.ddim_eta, noise=noise, start=start))

    def _times(self, original: bool) -> Tensor:
        """Return the descending times of `make_schedule`, or all of the table."""
        if original:
            return torch.arange(self.ddpm_num_timesteps, -1, -1, dtype=torch.float64)
        if not hasattr(self, "times"):
            raise ValueError("single steps need their times: call make_schedule(S, ddim_eta=..., verbose=False) first")
        return self.times
