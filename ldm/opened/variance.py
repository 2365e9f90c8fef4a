"""Variances of an opened model's samples under a posterior of its last layer, by every method, one call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.denoiser import Denoiser, Network, NetworkDenoiser
from ldm.models.diffusion.epsilon_scaling import scaled
from ldm.models.diffusion.noise import ImageNoise
from ldm.models.diffusion.sampler import Step
from ldm.models.diffusion.sampler.registry import Sampler
from ldm.opened.laplace import open_posterior
from ldm.opened.model import OpenModel, open_model
from ldm.uncertainty.laplace import LastLayerLaplace
from ldm.uncertainty.posterior import Members
from ldm.uncertainty.propagation import (
    PredictiveDenoiser,
    VarianceStep,
    bayesdiff,
    beginning,
    decoded_draws,
    decoded_members,
    decoded_tangents,
    path_steps,
    sampled_steps,
    tangent_steps,
)
from ldm.util import derive_seed, generator

METHODS = {
    "persistent": "sampled weights, each held for the whole walk: the truth within its sampling error",
    "tangents": "its first-order limit: derivatives in the directions of the draws",
    "bayesdiff": "weights drawn anew at every step, total variance",
    "bayesdiff_skip": "the same with states drawn at every few steps, slopes held between",
    "published": "BayesDiff as published, with its defects; samplers of one evaluation a step",
    "published_skip": "BayesDiff-Skip as published",
    "path": "integral of the predictive variance along the plain walk, no further evaluations",
}
SAMPLED = ("persistent", "tangents")  # weights held for the whole walk, through whatever acts on predictions
HYPERPARAMETERS = ("prior_precision", "sigma_noise", "temperature")
ONE_EVALUATION = ("DDIM", "DDPM", "Euler")  # samplers whose step is affine in one evaluation


@dataclass(frozen=True)
class OpenPosterior:
    """An opened model with a posterior of its last layer.

    Args:
        draws: members of `persistent`, directions of `tangents`; the same weights for every image.
        particles: states that `bayesdiff` draws around the sampler's.
        every: steps between two draws of the `_skip` forms.
    """

    opened: OpenModel
    laplace: LastLayerLaplace
    draws: int = 16
    particles: int = 10
    every: int = 5
    _members: list[Members] = field(default_factory=list)

    @property
    def chunk(self) -> int:
        """States in one pass of the trunk."""
        return self.opened.passes.limit or 64

    @property
    def members(self) -> Members:
        """Draws of the weights, one set for all images."""
        if not self._members:
            source = generator("laplace members", self.opened.options.seed)
            self._members.append(self.laplace.sample(self.draws, source).to(self.opened.device))
        return self._members[0]

    def noise(self, images: Sequence[int]) -> ImageNoise:
        return self.opened.noise(images)

    def initial(self, images: Sequence[int]) -> Tensor:
        """States at the grid's first time."""
        model = self.opened.model
        return self.noise(images).initial((len(images), *model.latent_shape)) * model.path.prior_std

    def conditions(self, labels: Sequence[int] | None) -> tuple[Tensor | None, Tensor | None]:
        """Classes and null classes [B], or None for each that the model does not have."""
        if labels is None:
            return None, None
        cond, null = self.opened.labels(labels, null=True), self.opened.model.null_class
        return cond, None if null is None else torch.full_like(cond, null)

    def build(self, labels: Sequence[int] | None) -> Callable[[Network], Denoiser]:
        """network -> the denoiser that samples with it."""
        cond, _ = self.conditions(labels)

        def denoiser(network: Network) -> Denoiser:
            return self.opened.denoiser(cond, network)

        return denoiser

    def predictive(self, labels: Sequence[int] | None) -> PredictiveDenoiser:
        """The denoiser that knows the variance of its output, epsilon scaling included; no clipping, no classifier."""
        opened, (cond, null) = self.opened, self.conditions(labels)
        model, wrappers = opened.model, opened.wrappers
        around = scaled(
            NetworkDenoiser(model.network, model.path, model.target), model.path, wrappers.scaling, opened.grid
        )
        factor = None if wrappers.scaling.off else around.factor
        return PredictiveDenoiser(
            self.laplace, model.path, model.target, cond, null, opened.scale, chunk=self.chunk, factor=factor
        )

    def plain(self, labels: Sequence[int] | None, images: Sequence[int]) -> Iterator[Step]:
        """The plain sampler's walk."""
        opened = self.opened
        denoiser = self.build(labels)(opened.model.network)
        where = (opened.model.path, self.initial(images), opened.grid)
        return self.sampler(labels)(denoiser, *where, noise=self.noise(images))

    def sampler(self, labels: Sequence[int] | None) -> Sampler:
        """The chosen sampler for these classes."""
        return self.opened.sampler_for(self.conditions(labels)[0])

    def check(self, method: str) -> None:
        """Raise a ValueError unless there is such a method and it knows this sampler and what acts on predictions."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got '{method}'")
        wrappers, sampler = self.opened.wrappers, self.opened.options.sampler
        if method not in SAMPLED and (wrappers.clip or wrappers.classifier is not None):
            raise ValueError(f"{method} knows neither clipping nor a classifier: use {' or '.join(SAMPLED)}")
        if method.startswith("bayesdiff") and sampler == "Dopri5":
            raise ValueError(
                f"Dopri5 chooses its steps by the state, so {method} cannot draw states around one: use path, "
                f"{' or '.join(SAMPLED)}"
            )
        if method.startswith("published") and sampler not in ONE_EVALUATION:
            raise ValueError(
                f"{sampler} is not first order, and {method} takes {', '.join(ONE_EVALUATION)} only: use bayesdiff"
            )

    def steps(self, method: str, labels: Sequence[int] | None, images: Sequence[int]) -> Iterator[VarianceStep]:
        """The plain sampler's steps with the variance of each state, by one of `METHODS`.

        Args:
            labels: [B], None for an unconditional model; images: numbers [B], which name the noise.

        Raises:
            ValueError: as `check`.
        """
        self.check(method)
        opened, model = self.opened, self.opened.model
        if method in SAMPLED:
            walk = sampled_steps if method == "persistent" else tangent_steps
            chunk = self.chunk if method == "persistent" else max(1, self.chunk // len(images))
            where = (model.network, self.members, model.path, self.initial(images), opened.grid)
            return walk(self.sampler(labels), self.build(labels), *where, chunk=chunk, noise=self.noise(images))
        denoiser = self.predictive(labels)
        if method == "path":
            where = (model.path, self.initial(images), opened.grid)
            return path_steps(self.sampler(labels)(denoiser, *where, noise=self.noise(images)), denoiser)
        published = method.startswith("published")
        begin = None
        if opened.options.sampler not in ONE_EVALUATION and not published:
            begin = beginning(self.sampler(labels), model.path, opened.grid)
        source = ImageNoise(derive_seed("particles", opened.options.seed), tuple(images), device=opened.device)
        return bayesdiff(
            self.plain(labels, images),
            denoiser,
            particles=self.particles,
            source=source,
            form="published" if published else "total",
            every=self.every if method.endswith("_skip") else 1,
            begin=begin,
        )

    @property
    def latent(self) -> bool:
        """Whether the sampler walks in a first stage's latents."""
        return not isinstance(self.opened.model.first_stage_model, IdentityFirstStage)

    def pixel_variance(self, last: VarianceStep, images: Sequence[int]) -> Tensor:
        """Variance of the pixels [B, C, H, W] at the end of a walk.

        Members are decoded, tangents pushed through the decoder (without quantisation, which has no derivative); a
        recursion, which knows neither, is decoded from independent draws of its latents.
        """
        model, z = self.opened.model, last.step.x_next
        if not self.latent:
            return last.var
        plain = {"force_not_quantize": True} if hasattr(model.first_stage_model, "quantize") else {}
        if last.members is None:
            noise = ImageNoise(derive_seed("latents", self.opened.options.seed), tuple(images))
            return decoded_draws(lambda z: model.decode_first_stage(z, **plain), z, last.var, noise)
        if last.tangent:
            chunk = max(1, self.chunk // len(z))
            return decoded_tangents(lambda z: model.decode_first_stage(z, **plain), z, last.members, chunk)
        return decoded_members(model.decode_first_stage, last.members, self.chunk)


def open_walks(options: argparse.Namespace) -> OpenPosterior:
    """The model and posterior that the options of `add_model_arguments` and `add_posterior_arguments` name.

    Raises:
        ValueError: if the posterior is of other weights, or its fit did not gather for --curvature.
    """
    opened = open_model(options)
    laplace = open_posterior(opened, options.posterior)
    if options.curvature is not None:
        laplace = laplace.with_curvature(options.curvature)
    for name in HYPERPARAMETERS:
        if getattr(options, name) is not None:
            setattr(laplace, name, getattr(options, name))
    laplace.covariance()
    return OpenPosterior(opened, laplace, options.draws, options.particles, options.every)


def describe_walks(walks: OpenPosterior) -> dict[str, Any]:
    """What the variances depend on besides the samples."""
    laplace, options = walks.laplace, walks.opened.options
    return {
        "posterior": options.posterior,
        "curvature": laplace.curvature,
        "prior_precision": laplace.prior_precision,
        "sigma_noise": laplace.sigma_noise.tolist(),
        "temperature": laplace.temperature,
        **{name: getattr(walks, name) for name in ("draws", "particles", "every")},
    }
