"""Variances of a loaded model's samples under a posterior of its last layer, by every method, one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Network, NetworkDenoiser
from ldm.diffusion.epsilon_scaling import ScaledDenoiser, scaled
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step
from ldm.diffusion.samplers.registry import Sampler
from ldm.ensembles.members import Members
from ldm.laplace import LastLayerLaplace
from ldm.models.autoencoder import IdentityFirstStage
from ldm.pipelines.model import ModelPipeline
from ldm.settings import Guidance
from ldm.settings.names import ADAPTIVE
from ldm.uncertainty.propagation import (
    PredictiveDenoiser,
    VarianceStep,
    bayesdiff,
    beginning,
    decoded_draws,
    decoded_members,
    decoded_tangents,
    redrawn_steps,
    sampled_steps,
    tangent_steps,
    trajectory_steps,
)
from ldm.util import derive_seed, generator

METHODS = {
    "persistent": "sampled weights, each held for the whole trajectory: the truth within its sampling error",
    "tangents": "its first-order limit: derivatives in the directions of the draws",
    "redrawn": "weights drawn again at every evaluation, as many states as draws: the process behind bayesdiff",
    "bayesdiff": "its variances, pixel by pixel, from few states; the scale falls like 1 / steps",
    "bayesdiff_skip": "the same with states drawn at every few steps, slopes held between",
    "published": "BayesDiff as published, with its defects; samplers of one evaluation a step",
    "published_skip": "BayesDiff-Skip as published",
    "path": "integral of the predictive variance along the plain trajectory, no further evaluations",
}
SAMPLED = ("persistent", "tangents")  # weights held for the whole trajectory
WRAPPED = (*SAMPLED, "redrawn")  # methods that pass through whatever acts on predictions
ONE_EVALUATION = ("DDIM", "DDPM", "Euler", "Euler-ancestral")  # samplers whose step is affine in one evaluation


@dataclass(frozen=True)
class PosteriorPipeline:
    """A loaded model with a posterior of its last layer.

    Args:
        draws: members of `persistent`, directions of `tangents`, states of `redrawn`; the same weights for every image.
        particles: states that `bayesdiff` draws around the sampler's.
        every: steps between two draws of the `_skip` forms.
        source: the folder that the posterior was read from, for records.
    """

    pipeline: ModelPipeline
    laplace: LastLayerLaplace
    draws: int = 16
    particles: int = 32
    every: int = 5
    source: str = ""
    _members: list[Members] = field(default_factory=list)

    @property
    def chunk(self) -> int:
        """States in one pass of the backbone."""
        return self.pipeline.passes.limit or 64

    @property
    def members(self) -> Members:
        """Draws of the weights, one set for all images."""
        if not self._members:
            source = generator("laplace members", self.pipeline.sampling.seed)
            self._members.append(self.laplace.sample(self.draws, source).to(self.pipeline.device))
        return self._members[0]

    def redraw(self) -> Callable[[], Members]:
        """Return what gives other draws of the weights at every call, the same calls the same weights."""
        source = generator("redrawn weights", self.pipeline.sampling.seed)
        return lambda: self.laplace.sample(self.draws, source).to(self.pipeline.device)

    def noise(self, images: Sequence[int]) -> ImageNoise:
        return self.pipeline.noise(images)

    def initial(self, images: Sequence[int]) -> Tensor:
        """States at the times' first time."""
        shape = (len(images), *self.pipeline.model.latent_shape)
        return self.noise(images).initial(shape) * self.pipeline.initial_std

    def conditions(self, labels: Sequence[int] | None) -> tuple[Tensor | None, Tensor | None]:
        """Classes and null classes [B], or None for each that the model does not have."""
        if labels is None:
            return None, None
        cond = self.pipeline.labels(labels, null=True)
        return cond, self.pipeline.model.null_condition(cond)

    def build(self, labels: Sequence[int] | None) -> Callable[[Network], Denoiser]:
        """network -> the denoiser that samples with it."""
        cond, _ = self.conditions(labels)

        def denoiser(network: Network) -> Denoiser:
            return self.pipeline.denoiser(cond, network)

        return denoiser

    def predictive(self, labels: Sequence[int] | None) -> PredictiveDenoiser:
        """The denoiser that knows the variance of its output, epsilon scaling included; no clipping, no classifier."""
        pipeline, (cond, null) = self.pipeline, self.conditions(labels)
        model, wrappers = pipeline.model, pipeline.wrappers
        around = scaled(
            NetworkDenoiser(model.network, model.schedule, model.target),
            model.schedule,
            wrappers.scaling,
            pipeline.times,
        )
        factor = around.factor if isinstance(around, ScaledDenoiser) else None
        return PredictiveDenoiser(
            self.laplace, model.schedule, model.target, cond, null, pipeline.scale, chunk=self.chunk, factor=factor
        )

    def plain(self, labels: Sequence[int] | None, images: Sequence[int]) -> Iterator[Step]:
        """Yield the plain sampler's steps."""
        pipeline = self.pipeline
        denoiser = self.build(labels)(pipeline.model.network)
        where = (pipeline.model.schedule, self.initial(images), pipeline.times)
        return self.sampler(labels)(denoiser, *where, noise=self.noise(images))

    def sampler(self, labels: Sequence[int] | None) -> Sampler:
        """The chosen sampler for these classes."""
        return self.pipeline.sampler_for(self.conditions(labels)[0])

    def check(self, method: str) -> None:
        """Raise a ValueError unless there is such a method and it knows this sampler and what acts on predictions."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got '{method}'")
        if method in ("persistent", "redrawn") and self.draws < 2:
            raise ValueError(f"{method} is a variance over draws, and needs --draws of at least 2; got {self.draws}")
        wrappers, sampler = self.pipeline.wrappers, self.pipeline.sampling.sampler
        if method not in WRAPPED and (wrappers.clip or wrappers.classifier is not None):
            raise ValueError(f"{method} knows neither clipping nor a classifier: use {', '.join(WRAPPED)}")
        if method not in WRAPPED and self.pipeline.sampling.guidance != Guidance():
            raise ValueError(f"{method} knows guidance by its scale alone: use {', '.join(WRAPPED)}")
        if method not in WRAPPED and wrappers.scaling.direction == "x0_only" and not wrappers.scaling.off:
            raise ValueError(
                f"{method} follows the one output of a network, and x0_only scales it in x0 alone: "
                f"use {', '.join(WRAPPED)}"
            )
        if (method == "redrawn" or method.startswith("bayesdiff")) and sampler in ADAPTIVE:
            raise ValueError(
                f"{sampler} chooses its steps by the state, so {method} cannot draw anew along them: use path, "
                f"{' or '.join(SAMPLED)}"
            )
        recursive = method not in WRAPPED and method != "path"
        churned = self.pipeline.churns
        if recursive and (churned or sampler == "DPM-Solver++SDE"):
            why = "adds noise before its steps (churn)" if churned else "draws noise between its evaluations"
            raise ValueError(f"{sampler} {why}, which {method} does not follow: use path, {', '.join(WRAPPED)}")
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
        pipeline, model = self.pipeline, self.pipeline.model
        if method in SAMPLED:
            propagate = sampled_steps if method == "persistent" else tangent_steps
            chunk = self.chunk if method == "persistent" else max(1, self.chunk // len(images))
            where = (model.network, self.members, model.schedule, self.initial(images), pipeline.times)
            return propagate(self.sampler(labels), self.build(labels), *where, chunk=chunk, noise=self.noise(images))
        if method == "redrawn":
            states = (model.schedule, self.initial(images), pipeline.times)
            anew = (self.sampler(labels), self.build(labels), model.network, self.redraw())
            return redrawn_steps(*anew, *states, chunk=self.chunk, noise=self.noise(images))
        denoiser = self.predictive(labels)
        if method == "path":
            x = self.initial(images)
            plain = self.sampler(labels)(denoiser, model.schedule, x, pipeline.times, noise=self.noise(images))
            return trajectory_steps(plain, denoiser)
        published = method.startswith("published")
        begin = None
        if pipeline.sampling.sampler not in ONE_EVALUATION and not published:
            begin = beginning(self.sampler(labels), model.schedule, pipeline.times)
        source = ImageNoise(derive_seed("particles", pipeline.sampling.seed), tuple(images), device=pipeline.device)
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
        """Whether the states of the sampler are a first stage's latents."""
        return not isinstance(self.pipeline.model.first_stage_model, IdentityFirstStage)

    def pixel_variance(self, last: VarianceStep, images: Sequence[int]) -> Tensor:
        """Variance of the pixels [B, C, H, W] at the end of sampling.

        Members are decoded, tangents pushed through the decoder (without quantisation, which has no derivative); a
        recursion, which knows neither, is decoded from independent draws of its latents.
        """
        model, z = self.pipeline.model, last.step.x_next
        if not self.latent:
            return last.var
        plain = {"force_not_quantize": True} if hasattr(model.first_stage_model, "quantize") else {}
        if last.members is None:
            noise = ImageNoise(derive_seed("latents", self.pipeline.sampling.seed), tuple(images))
            return decoded_draws(lambda z: model.decode_first_stage(z, **plain), z, last.var, noise)
        if last.tangent:
            chunk = max(1, self.chunk // len(z))
            return decoded_tangents(lambda z: model.decode_first_stage(z, **plain), z, last.members, chunk)
        return decoded_members(model.decode_first_stage, last.members, self.chunk)

    def describe(self) -> dict[str, Any]:
        """Return what the variances depend on besides the samples, for records."""
        return {
            "posterior": self.source,
            "curvature": self.laplace.curvature,
            "prior_precision": self.laplace.prior_precision,
            "sigma_noise": self.laplace.sigma_noise.tolist(),
            "temperature": self.laplace.temperature,
            "visits": self.laplace.visits,
            "draws": self.draws,
            "particles": self.particles,
            "every": self.every,
        }
