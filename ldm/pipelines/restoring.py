"""Clean pictures as a model expects them given noisy ones, with maps of how far off that may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ldm.data.loading import Loader
from ldm.diffusion.noise import TrainingDraws
from ldm.laplace import LastLayerLaplace
from ldm.models.autoencoder import IdentityFirstStage
from ldm.pipelines.laplace import training_states
from ldm.pipelines.model import ModelPipeline
from ldm.uncertainty.aleatoric import data_posterior
from ldm.uncertainty.propagation import PredictiveDenoiser
from ldm.util import generator

# Of states with more elements, the variance of the data is estimated by probes.
MOST_EXACT = 256
PROBES = 32
# States that derivatives are carried through at once, of all pictures together: more take memory, and no less time.
ROWS = 512
# What is added to a variance, as a share of its mean, so that no pixel's map is 0.
VARIANCE_FLOOR = 0.01


@dataclass(frozen=True)
class RestoredPictures:
    """Pictures restored from noise.

    Attributes:
        clean, noisy, mean: [N, C, H, W] in [-1, 1] (the noisy ones go beyond): what it was, what was given, E[x_0 | x].
        variances: {name: [N, C, H, W]} of maps, `data` and with a posterior `weights` and `both`.
        trained_on: whether they are the data that the model was trained on.
    """

    clean: NDArray[np.float64]
    noisy: NDArray[np.float64]
    mean: NDArray[np.float64]
    variances: Mapping[str, NDArray[np.float64]]
    trained_on: bool = False

    def scales(self, calibration: int) -> dict[str, NDArray[np.float64]]:
        """Return {name: maps [N, P]} of deviations above 0; `unscaled` is 1 everywhere.

        Args:
            calibration: the first so many pictures say how much is added to small variances.
        """
        found = {"unscaled": np.ones((len(self.mean), self.mean[0].size))}
        for name, var in self.variances.items():
            flat = var.reshape(len(var), -1)
            found[name] = np.sqrt(flat + VARIANCE_FLOOR * flat[:calibration].mean())
        return found

    @property
    def errors(self) -> NDArray[np.float64]:
        """clean - mean [N, P]."""
        return (self.clean - self.mean).reshape(len(self.mean), -1)


@torch.no_grad()
def restore_pictures(
    pipeline: ModelPipeline,
    data: Dataset,
    positions: Sequence[int],
    noise: float,
    *,
    laplace: LastLayerLaplace | None = None,
    seed: int = 0,
    batch_size: int = 50,
    progress: Callable[[int], Any] = lambda count: None,
) -> RestoredPictures:
    """Make pictures noisy, and restore each by one evaluation of the network.

    Conditions are the data's own, so that a model of inpainting is told the picture with its hole as well.

    Args:
        data: items with the model's `first_stage_key` and, if conditional, its `cond_stage_key`.
        noise: deviation of the noise that is added, in units of the pictures (-1 .. 1); above 0.
        laplace: a posterior of the last layer, for the maps `weights` and `both`.
        seed: of the noise, with the picture's position.
        progress: called with the pictures that were restored.

    Raises:
        ValueError: for a latent model, whose intervals would be of latents.
    """
    model = pipeline.model
    if not isinstance(model.first_stage_model, IdentityFirstStage):
        raise ValueError("intervals of pixels need a model of pixels, and this one has a first stage")
    u = model.schedule.reach(noise)
    parts: dict[str, list[Tensor]] = {}
    done = 0
    for batch in Loader(Subset(data, list(positions)), batch_size):
        numbers = list(positions[done : done + batch_size])
        done += len(numbers)
        z = training_states(model, batch, numbers, TrainingDraws(seed, purpose="restore"), 1)
        drawn = [torch.randn(z.shape[1:], generator=generator("restore", seed, number)) for number in numbers]
        tensors = {name: value.to(z.device) for name, value in batch.items() if isinstance(value, Tensor)}
        cond = model.read_conditions({**batch, **tensors})
        x = model.schedule.noised(z, torch.stack(drawn).to(z), u)
        found = _restore(model, x, u, cond, laplace, derive=generator("restore probes", seed, numbers[0]))
        alpha = model.schedule.coefficients(u, x)[0]
        for name, value in {"clean": z, "noisy": x / alpha, **found}.items():
            parts.setdefault(name, []).append(value.double().cpu())
        progress(len(numbers))
    whole = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return RestoredPictures(whole.pop("clean"), whole.pop("noisy"), whole.pop("mean"), whole)


def _restore(
    model: Any, x: Tensor, u: float, cond: Tensor | None, laplace: LastLayerLaplace | None, derive: torch.Generator
) -> dict[str, Tensor]:
    """Return the mean and the variances of clean pictures given states x [B, C, H, W] at time u."""
    exact = x[0].numel() <= MOST_EXACT
    probes: dict[str, Any] = {} if exact else {"probes": PROBES, "generator": derive}
    chunk = max(1, ROWS // len(x))
    found = data_posterior(model.denoiser(cond), model.schedule, x, u, chunk=chunk, **probes)
    result = {"mean": found.mean, "data": found.var}
    if laplace is None:
        return result
    denoiser = PredictiveDenoiser(laplace, model.schedule, model.target, cond, chunk=len(x))
    variance = denoiser.law(x, u)[1]
    alpha, sigma = model.schedule.coefficients(u, x)
    x0_of_output = model.target.solve(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)[0]
    weights = x0_of_output**2 * variance
    return {**result, "weights": weights, "both": found.var + weights}
