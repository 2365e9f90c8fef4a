"""The images that a training shows of a model: what it was given, what the first stage keeps, what it samples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.models.diffusion import pictures
from ldm.models.diffusion.pictures import PictureModel
from ldm.models.diffusion.training import read_images
from ldm.modules.conditioned import JOINING


class LoggedModel(PictureModel, Protocol):
    """What is asked of a LatentDiffusion to show its images."""

    first_stage_key: str
    guidance_scale: float

    @property
    def n_classes(self) -> int | None: ...

    @property
    def reads_text(self) -> bool: ...

    def read_conditions(self, batch: Mapping[str, Any]) -> Tensor | None: ...

    @property
    def num_timesteps(self) -> int | None: ...

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor: ...

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]: ...

    def sampling_times(self, steps: int | str, spacing: str = "auto") -> Tensor: ...

    def sample(
        self, cond: Tensor | None, noise: ImageNoise, times: Tensor, scale: float = 1.0, **options: Any
    ) -> Tensor: ...


def make_log_images(
    model: LoggedModel, batch: Mapping[str, Any], steps: int, eta: float, seed: int
) -> dict[str, Tensor]:
    """Make images [B, C, H, W] in [-1, 1]: the inputs of a batch, their reconstructions, samples of their conditions.

    Args:
        steps: of the sampler; as many as a table of betas has entries, if these are fewer.
        eta: of DDIM.
        seed: of the noise.
    """
    z = model.get_input(batch, model.first_stage_key)
    if "encoded" in batch:
        images = model.decode_first_stage(z)
    else:
        images = read_images(batch[model.first_stage_key])
    joins = model.model.conditioning_key in JOINING
    conditional = joins or model.n_classes is not None or model.reads_text
    labels = model.read_conditions(batch) if conditional else None
    noise = ImageNoise(seed, tuple(range(len(images))), device=images.device)
    with model.ema_scope("samples"):
        scale = model.guidance_scale if labels is not None and model.choices is None else 1.0
        taken = steps if model.num_timesteps is None else min(steps, model.num_timesteps)
        samples = model.sample(labels, noise, model.sampling_times(taken), scale, eta=eta)
    shown = {"inputs": images, "reconstruction": model.decode_first_stage(z)}
    if joins:
        picture = read_images(batch[pictures.picture_condition(model).key])
        shown |= {"conditioning": picture} if picture.shape[1] in (1, 3) else {}
    return {**shown, "samples": model.decode_first_stage(samples)}
