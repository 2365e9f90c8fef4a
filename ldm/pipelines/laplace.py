"""Last-layer posteriors of a loaded model: what they are fitted to, and where they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ldm.checkpoint import load_checkpoint
from ldm.data.loading import Loader
from ldm.diffusion.noise import TrainingDraws
from ldm.laplace import LastLayerLaplace, Observation, split_network
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.model import ModelPipeline
from ldm.pipelines.speed import make_example
from ldm.util import generator


@torch.no_grad()
def observations(
    model: LatentDiffusion,
    data: Dataset,
    positions: Sequence[int] | None = None,
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    workers: int = 0,
) -> Iterator[Observation]:
    """What the network is trained on, of some images of a data set: `draws` rows of (x_t, t, cond) for each.

    Times, noises and label dropout are those of training (any path), drawn from (seed, position, draw): so they depend
    neither on the batch nor on who else is fitted, and fits of parts of the data merge into the fit of all.

    Args:
        data: items with the model's `first_stage_key` [H, W, C] and, if conditional, its `cond_stage_key`.
        positions: all where None; batch_size: images, `draws` rows each.

    Yields rows of one image one after the other, inputs scaled as the network takes them, targets as it regresses them.
    """
    if positions is None:
        assert isinstance(data, Sized)  # a map-style data set
        positions = range(len(data))
    sampled = TrainingDraws(seed, purpose="laplace")
    loader = Loader(Subset(data, list(positions)), batch_size, num_workers=workers)
    device, done = next(model.parameters()).device, 0
    for batch in loader:
        numbers = positions[done : done + batch_size]
        done += len(numbers)
        z = training_states(model, batch, numbers, sampled, draws)
        drawn = [sampled(number, range(draws), z.shape[1:], model.num_timesteps) for number in numbers]
        t, noise, uniform = (torch.cat(parts).to(device) for parts in zip(*drawn, strict=True))
        noise, t = noise.to(z), model.drawn_times(t)
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        cond = model.read_conditions({**batch, **tensors})
        if cond is not None:
            cond = cond.repeat_interleave(draws, 0)
            if model.label_dropout:
                null = model.null_condition(cond)
                assert null is not None  # what a dropped condition becomes
                dropped = uniform.reshape(-1, *[1] * (cond.ndim - 1)) < model.label_dropout
                cond = torch.where(dropped, null, cond)
        x, time = model.network_input(model.q_sample(z, t, noise), t)
        yield Observation(x, time, cond, model.target.of(z, noise, *model.levels(t, z)))


def training_states(
    model: LatentDiffusion, batch: Mapping[str, Any], numbers: Sequence[int], source: TrainingDraws, draws: int
) -> Tensor:
    """Return the clean states [B draws, C, H, W] of a batch, `draws` rows of an image one after the other.

    A KL first stage's posterior is sampled in every row, as in training.
    """
    device = next(model.parameters()).device
    tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    encoded = model.encoded(tensors)
    rows = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    told = {"encoded": True} if "encoded" in encoded else {}
    states = []
    for place, number in enumerate(numbers):
        same = {name: value[place : place + 1].repeat_interleave(draws, 0) for name, value in rows.items()}
        states.append(model.draw_input({**same, **told}, [source], number, range(draws)))
    return torch.cat(states)


def chosen_positions(size: int, count: int | None, seed: int, purpose: str = "laplace") -> list[int]:
    """`count` positions of a data set in random order, all where None; each purpose draws its own.

    Raises:
        ValueError: if there are not so many.
    """
    if count is not None and not 1 <= count <= size:
        raise ValueError(f"the data set holds {size} images, {count} were asked for")
    return torch.randperm(size, generator=generator(purpose, seed))[:count].tolist()


def new_posterior(pipeline: ModelPipeline, **options: Any) -> LastLayerLaplace:
    """An unfitted posterior of the loaded model's last layer; options of `LastLayerLaplace`.

    Of a network that learns its variance besides (ADM) only the regressed half has one. Where no `visits` are given,
    they are those of the model's training, or 1 if its checkpoint does not say.
    """
    if "visits" not in options:
        options["visits"] = find_visits(pipeline.checkpoint) or 1.0
    model = pipeline.model
    tried, example = make_example(model, next(model.parameters()).device)
    split = split_network(tried.network, options.pop("layer", None), example)
    return LastLayerLaplace(model.network, split.name, outputs=model.channels, example=split.arrangement, **options)


def find_visits(checkpoint: Path | None) -> float | None:
    """How often a checkpoint's training saw each of its images: passes over the data, with the share of the begun one.

    A training that ended inside its first pass gives 1: what it saw, it saw once. None: the file says nothing (released
    weights, exported ones, a network from memory).
    """
    content = {} if checkpoint is None else load_checkpoint(checkpoint)
    loops = content.get("loops")
    if not isinstance(loops, Mapping) or "epoch_progress" not in loops.get("fit_loop", {}):
        return None
    batches = loops["fit_loop"]["epoch_loop.batch_progress"]
    total = batches["total"]["completed"]
    begun = batches["current"]["completed"]
    passes = loops["fit_loop"]["epoch_progress"]["current"]["processed"]
    if total == begun or not passes:
        return 1.0
    return passes + begun * passes / (total - begun)


def adjust_posterior(
    laplace: LastLayerLaplace,
    curvature: str | None = None,
    temperature: float | Literal["sandwich"] | None = None,
    **values: float | None,
) -> LastLayerLaplace:
    """A fitted posterior seen through another curvature, with other values where they are given.

    Args:
        temperature: "sandwich" gives it that one's width, see `ldm.laplace.find_temperature`.
        values: prior_precision, sigma_noise, visits.
    """
    seen = laplace if curvature is None else laplace.with_curvature(curvature)
    for name, value in values.items():
        if value is not None:
            setattr(seen, name, value)
    if temperature == "sandwich":
        seen.optimize_temperature()
    elif temperature is not None:
        seen.temperature = temperature
    seen.covariance()
    return seen
