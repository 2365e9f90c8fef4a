"""Exposure bias of a loaded model: norms and states of its chains from real data, in parts that processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.data.own import build_dataset, splits_of
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.epsilon_scaling import EpsilonScaling, ScaledDenoiser
from ldm.diffusion.noise import INITIAL
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise
from ldm.evaluation.exposure import EpsilonWatch, Norms, Residuals, StateMoments, StepMoments, each_step, observe
from ldm.jobs import WorkList
from ldm.pipelines.model import ModelPipeline
from ldm.settings import Guidance
from ldm.util import generator

MomentsByName = dict[str, StepMoments]
# Classes times elements of an image, above which the moments of the data are not kept apart by class.
LARGEST_BY_CLASS = 10_000_000


@dataclass(frozen=True)
class Chains:
    """What is measured of a model on images of a data set: `training`, every step from a true x_t, and for each named
    scaling a sampler's chain from x_T = alpha_T x_0 + sigma_T eps.

    Moments by name: `training`; `NAME` for the norms of the network's own eps in a chain (guidance without a classifier
    included, scaling not); `NAME/longer`, by how much they exceed training's, image by image; `NAME/states` and
    `NAME/residuals`; `data` for the clean images, by class where the model is conditioned on it; `.../later` for
    norms of a solver's later evaluations.
    """

    pipeline: ModelPipeline
    data: Dataset
    scalings: Mapping[str, EpsilonScaling]
    training: bool = True

    def measure(self, images: range) -> MomentsByName:
        """The moments of the images numbered `images`, in one pass."""
        batch = default_collate([self.data[place] for place in self._places(images)])
        model, noise = self.pipeline.model, self.pipeline.noise(images)
        labels = self._labels(batch, images)
        batch = {key: value.to(self.pipeline.device) for key, value in batch.items() if isinstance(value, Tensor)}
        x0 = model.get_input(batch, model.first_stage_key)
        plain, sampler = self._own(labels), self.pipeline.sampler_for(labels)
        found: MomentsByName = {"data": self._data(x0, labels)}
        own: dict[int, Tensor] = {}
        if self.training:
            watch = EpsilonWatch(plain)
            wrapped, norms = self._wrapped(watch, EpsilonScaling(), labels), Norms(watch, self.steps)
            steps = each_step(sampler, wrapped, model.schedule, x0, self.pipeline.times, _one_noise(noise))
            found |= self._observe("training", steps, [norms])
            own = norms.latest
        start = model.schedule.noised(x0, noise.initial(x0.shape).to(x0), float(self.pipeline.times[0]))
        for name, scaling in self.scalings.items():
            watch = EpsilonWatch(plain)
            states = StateMoments(self.steps, x0.shape[1:])
            residuals = Residuals(model.schedule, self.steps, x0.shape[1:])
            residuals.follow(x0)
            wrapped = self._wrapped(watch, scaling, labels)
            steps = sampler(wrapped, model.schedule, start, self.pipeline.times, noise=noise)
            norms = Norms(watch, self.steps)
            found |= self._observe(name, steps, [norms, states, residuals])
            if self.training:
                found[f"{name}/longer"] = StepMoments(self.steps)
                for step, training in own.items():
                    found[f"{name}/longer"].add(step, norms.latest[step] - training)
        return found

    def _labels(self, batch: Mapping[str, Any], images: range) -> Tensor | None:
        """The conditions of images: the prompts in turn, or what their items hold: classes [B], captions, pictures."""
        pipeline, model = self.pipeline, self.pipeline.model
        if model.choices is not None:
            return pipeline.labels([image % pipeline.n_classes for image in images])
        if model.reads_text or getattr(pipeline.base_network, "joins_picture", False):
            return model.read_conditions(batch)
        return batch[model.cond_stage_key].to(pipeline.device) if pipeline.n_classes else None

    def _data(self, x0: Tensor, labels: Tensor | None) -> StepMoments:
        """Moments of the clean images, a step for each class where the model is conditioned on it."""
        by_class = (
            labels is not None and labels.ndim == 1 and self.pipeline.n_classes * x0[0].numel() <= LARGEST_BY_CLASS
        )
        moments = StepMoments(self.pipeline.n_classes if by_class else 1, x0.shape[1:], x0.device)
        for label in labels.unique().tolist() if by_class else [0]:
            moments.add(label, x0[labels == label] if by_class else x0)
        return moments

    @property
    def steps(self) -> int:
        return len(self.pipeline.times) - 1

    def _places(self, images: range) -> list[int]:
        """Positions of images in the data: a seeded order without repetition, over and over."""
        order = torch.randperm(len(self.data), generator=generator("exposure", self.pipeline.sampling.seed))
        return [int(order[image % len(order)]) for image in images]

    def _own(self, labels: Tensor | None) -> Denoiser:
        if self.pipeline.sampling.guidance != Guidance():
            raise ValueError("exposure is measured under a scale of guidance alone: leave out --guidance_* and --guide")
        cond = labels if self.pipeline.conditional else None
        return self.pipeline.model.denoiser(cond, self.pipeline.scale)

    def _wrapped(self, denoiser: Denoiser, scaling: EpsilonScaling, labels: Tensor | None) -> Denoiser:
        wrappers = replace(self.pipeline.wrappers, scaling=scaling)
        return wrappers.wrap(denoiser, self.pipeline.times, self.pipeline.sampling.sampler, labels)

    def _observe(self, name: str, steps: Iterable, observers: list) -> MomentsByName:
        observe(steps, *observers)
        norms, *rest = observers
        found = {name: norms.moments}
        if bool(norms.corrections.count.any()):
            found[f"{name}/later"] = norms.corrections
        for kind, observer in zip(("states", "residuals"), rest, strict=False):
            found[f"{name}/{kind}"] = observer.moments
        return found


def _one_noise(noise: Noise) -> Noise:
    """Every time's x_t from the noise that x_T has, too: so norms in training and in sampling differ by less."""
    return lambda index, shape: noise(INITIAL if index < INITIAL else index, shape)


def load_split(config: Mapping[str, Any], split: str) -> Dataset:
    """The data set of a run's config.

    Raises:
        ValueError: if the config has none.
    """
    return build_dataset(splits_of(config, split)[split])


def measure_chains(
    chains: Chains, work: WorkList, parts: Mapping[str, range], progress: Callable[[int], Any]
) -> MomentsByName | None:
    """Measure the parts of this process's share that have no file; the moments of all, or None while others work."""
    for key in work.pending(parts):
        tensors = {
            f"{name}|{kind}": value
            for name, moments in chains.measure(parts[key]).items()
            for kind, value in moments.tensors().items()
        }
        save_tensors(tensors, work.folder / f"{key}.safetensors", overwrite=True)
        work.save(key, {"images": len(parts[key])})
        progress(len(parts[key]))
    if not work.complete(parts):
        return None
    return merge_moments(work.folder / f"{key}.safetensors" for key in parts)


def merge_moments(files: Iterable) -> MomentsByName:
    """The moments that files of `measure_chains` hold, together."""
    together: MomentsByName = {}
    for file in files:
        tensors, names = load_state_dict(file), {}
        for key, value in tensors.items():
            name, kind = key.split("|")
            names.setdefault(name, {})[kind] = value
        for name, parts in names.items():
            moments = StepMoments.from_tensors(parts)
            together[name] = together[name].merge(moments) if name in together else moments
    return together


def compute_factors(schedule: Schedule, times: Tensor, scaling: EpsilonScaling) -> Tensor:
    """Return lambda of each step [S]; ones where the scaling is off."""
    if scaling.off:
        return torch.ones(len(times) - 1, dtype=torch.float64)
    return ScaledDenoiser(None, schedule, scaling, times).factor(times[:-1])
