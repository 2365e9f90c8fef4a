"""latent-diffusion's ancestral sampling under its names: one time after the other, each by q(x_{t-1} | x_t, x_0).

The functions are methods of `LatentDiffusion`, whose first argument is the model. Times t count the entries of a table
of betas from 0. What latent-diffusion draws from the global random state comes from the model's `sampling_draws`, which
counts images over the calls. `ldm.diffusion.samplers.ancestral` is the same rule with guidance, any times and branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.denoiser import NetworkDenoiser
from ldm.diffusion.noise import ImageNoise
from ldm.models.diffusion import entries
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.entries import AncestralModel, q_posterior
from ldm.modules.diffusionmodules.tables import extract_into_tensor
from ldm.util import derive_seed

LOG_EVERY = 100  # times between two intermediates, unless told otherwise


def p_mean_variance(
    model: AncestralModel,
    x: Tensor,
    c: Any,
    t: Tensor,
    clip_denoised: bool,
    return_codebook_ids: bool = False,
    quantize_denoised: bool = False,
    return_x0: bool = False,
    score_corrector: None = None,
    corrector_kwargs: None = None,
) -> tuple[Tensor, ...]:
    """Return mean, variance and log-variance of p(x_{t-1} | x_t), with `return_x0` also the predicted x_0.

    Args:
        x: states [B, C, H, W].
        c: an embedded condition, see `apply_model`.
        t: entries of the table of betas [B].
        clip_denoised: clamp the predicted x_0 to [-1, 1].
        quantize_denoised: replace it by its nearest codes.
        return_codebook_ids, score_corrector, corrector_kwargs: not supported.

    Raises:
        ValueError: for what is not supported.
    """
    refuse_unsupported(
        return_codebook_ids=return_codebook_ids, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs
    )
    learned = getattr(model, "learned_variance", None) is not None
    denoiser = NetworkDenoiser(model.apply_model, model.schedule, model.target, c, learned_range=learned)
    prediction = denoiser(x, t.double() + 1)
    x0 = prediction.x0.clamp(-1, 1) if clip_denoised else prediction.x0
    if quantize_denoised:
        x0 = model.first_stage_model.quantize(x0)[0]
    mean, variance, log_variance = q_posterior(model, x0, x, t)
    if prediction.var_fraction is not None:
        largest = extract_into_tensor(model.betas.log(), t, x.shape)
        log_variance = torch.lerp(log_variance.expand_as(x0), largest.expand_as(x0), prediction.var_fraction)
        variance = log_variance.exp()
    return (mean, variance, log_variance, x0) if return_x0 else (mean, variance, log_variance)


@torch.no_grad()
def p_sample(
    model: AncestralModel,
    x: Tensor,
    c: Any,
    t: Tensor,
    clip_denoised: bool = False,
    repeat_noise: bool = False,
    return_codebook_ids: bool = False,
    quantize_denoised: bool = False,
    return_x0: bool = False,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    score_corrector: None = None,
    corrector_kwargs: None = None,
    *,
    noise: Tensor | None = None,
) -> Any:
    """Draw x_{t-1} [B, C, H, W] given x_t, with `return_x0` beside the predicted x_0; no noise is added at t = 0.

    Args:
        repeat_noise: all images of the batch share one draw.
        temperature: multiplies the noise.
        noise_dropout: not supported.
        noise: standard normal draws like x; the model's own where None.

    Other arguments and errors are those of `p_mean_variance`.
    """
    refuse_unsupported(noise_dropout=noise_dropout)
    mean, _, log_variance, x0 = p_mean_variance(
        model, x, c, t, clip_denoised, return_codebook_ids, quantize_denoised, True, score_corrector, corrector_kwargs
    )
    if noise is None:
        noise = model.sampling_draws.take(len(x), x.device)(0, x.shape)
    noise = noise[:1] if repeat_noise else noise
    moves = (t != 0).reshape(-1, *(1 for _ in x.shape[1:])).to(x)
    x_previous = mean + moves * (0.5 * log_variance).exp() * temperature * noise.to(x)
    return (x_previous, x0) if return_x0 else x_previous


@torch.no_grad()
def progressive_denoising(
    model: AncestralModel,
    cond: Any,
    shape: Sequence[int],
    verbose: bool = True,
    callback: Callable[[int], object] | None = None,
    quantize_denoised: bool = False,
    img_callback: Callable[[Tensor, int], object] | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    temperature: float | Sequence[float] = 1.0,
    noise_dropout: float = 0.0,
    score_corrector: None = None,
    corrector_kwargs: None = None,
    batch_size: int | None = None,
    x_T: Tensor | None = None,
    start_T: int | None = None,
    log_every_t: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Sample by every time of the table; return the states [B, C, H, W] and the predicted x_0 on the way.

    Args:
        cond: an embedded condition, see `apply_model`; None where there is none.
        shape: [B, C, H, W], or [C, H, W] with a `batch_size`.
        callback, img_callback: called with (t) and (state, t) after each time.
        mask, x0: where mask [B, 1, H, W] is 1 the state is x0 [B, C, H, W], noised, before every time.
        temperature: multiplies the noise; one number, or one for each time.
        x_T: the state to start from; drawn where None.
        start_T: the number of times, where not all.
        log_every_t: times between two predictions that are returned, beside the first.

    Other arguments are those of `p_sample`.
    """
    refuse_unsupported(noise_dropout=noise_dropout, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs)
    full = [*([] if batch_size is None else [batch_size]), *shape]
    calls, inpainted = (callback, img_callback), _known(mask, x0)
    state, _, predictions = _descend(
        model, cond, full, x_T, start_T, inpainted, calls, verbose, quantize_denoised, temperature, log_every_t
    )
    return state, predictions


@torch.no_grad()
def p_sample_loop(
    model: AncestralModel,
    cond: Any,
    shape: Sequence[int],
    return_intermediates: bool = False,
    x_T: Tensor | None = None,
    verbose: bool = True,
    callback: Callable[[int], object] | None = None,
    timesteps: int | None = None,
    quantize_denoised: bool = False,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    img_callback: Callable[[Tensor, int], object] | None = None,
    start_T: int | None = None,
    log_every_t: int | None = None,
) -> Any:
    """Sample by every time of the table; return the states [B, C, H, W], with `return_intermediates` beside a list.

    The list holds x_T, the state after the first time, and after every `log_every_t`-th. `timesteps` and `start_T` say
    how many times there are, where not all; other arguments are those of `progressive_denoising`.
    """
    counts = [count for count in (timesteps, start_T) if count is not None]
    begin = min(counts, default=None)
    calls, inpainted = (callback, img_callback), _known(mask, x0)
    state, states, _ = _descend(
        model, cond, shape, x_T, begin, inpainted, calls, verbose, quantize_denoised, log_every=log_every_t
    )
    return (state, states) if return_intermediates else state


def sample_log(
    model: AncestralModel, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **options: Any
) -> tuple[Tensor, Any]:
    """Sample states of the model's own shape and return them with their intermediates, by DDIM or by every time.

    `options` are those of `DDIMSampler.sample`, or of `p_sample_loop`.
    """
    if not ddim:
        return p_sample_loop(model, cond, (batch_size, *model.latent_shape), return_intermediates=True, **options)
    sampler = DDIMSampler(model)
    sampler.draws = model.sampling_draws
    return sampler.sample(ddim_steps, batch_size, model.latent_shape, cond, verbose=False, **options)


def refuse_unsupported(**options: Any) -> None:
    """Check options of latent-diffusion's that nothing here acts on.

    Raises:
        ValueError: naming those that are set.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"ancestral sampling does not support {', '.join(given)}; leave it out")


Calls = tuple[Callable[[int], object] | None, Callable[[Tensor, int], object] | None]


def _descend(
    model: AncestralModel,
    cond: Any,
    shape: Sequence[int],
    x_T: Tensor | None,
    count: int | None,
    known: tuple[Tensor, Tensor] | None,
    calls: Calls,
    verbose: bool,
    quantize_denoised: bool = False,
    temperature: float | Sequence[float] = 1.0,
    log_every: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the last state, the states and the predicted x_0 that are kept on the way from entry count - 1 to 0."""
    noise = model.sampling_draws.take(shape[0], model.betas.device)
    known_noise = ImageNoise(derive_seed("inpainting", noise.seed), noise.images, noise.device)
    last = min(count or model.betas.numel(), model.betas.numel())
    heats = [temperature] * last if isinstance(temperature, (int, float)) else list(temperature)
    state = noise.initial(shape) if x_T is None else x_T.to(noise.device)
    cond = first_images(cond, shape[0])
    states: list[Tensor] = [state]
    predictions: list[Tensor] = []
    for index, t in enumerate(tqdm(range(last - 1, -1, -1), desc="DDPM", disable=not verbose)):
        times = torch.full((shape[0],), t, device=noise.device)
        if known is not None:
            mask, x0 = (part.to(noise.device) for part in known)
            state = mask * model.q_sample(x0, times, known_noise(index, x0.shape)) + (1 - mask) * state
        options = {"quantize_denoised": quantize_denoised, "temperature": heats[t], "return_x0": True}
        drawn = noise(index, state.shape)
        state, prediction = p_sample(model, state, cond, times, bool(model.clip_denoised), noise=drawn, **options)
        if index == 0 or t % (log_every or LOG_EVERY) == 0:
            states.append(state)
            predictions.append(prediction)
        callback, img_callback = calls
        if callback is not None:
            callback(t)
        if img_callback is not None:
            img_callback(state, t)
    return state, states, predictions


def _known(mask: Tensor | None, x0: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the mask and the image of inpainting, None where neither is given."""
    if mask is not None and x0 is not None:
        return mask, x0
    if mask is not None or x0 is not None:
        raise ValueError("inpainting takes both mask and x0")
    return None


def first_images(cond: Any, count: int) -> Any:
    """Return the first images' share of an embedded condition, of each of its tensors where it has several."""
    if isinstance(cond, Mapping):
        return {name: first_images(value, count) for name, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [first_images(value, count) for value in cond]
    return cond if cond is None else cond[:count]


class SamplingMethods:
    """The names of latent-diffusion's methods, which its scripts and samplers written for it call on a model."""

    q_mean_variance = entries.q_mean_variance
    predict_start_from_noise = entries.predict_start_from_noise
    predict_start_from_z_and_v = entries.predict_start_from_z_and_v
    predict_eps_from_z_and_v = entries.predict_eps_from_z_and_v
    q_posterior = entries.q_posterior
    p_mean_variance = p_mean_variance
    p_sample = p_sample
    p_sample_loop = p_sample_loop
    progressive_denoising = progressive_denoising
    sample_log = sample_log
