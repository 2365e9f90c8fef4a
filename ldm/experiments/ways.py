"""Ways to ask an ensemble where it does not know, and what an answer costs: passes of the network, CPU seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ldm.experiments.ranking_draws import Values
from ldm.experiments.timing import count_operations
from ldm.pipelines import EnsemblePipeline
from ldm.pipelines.information import measure_classes
from ldm.settings import Branching, Precision, SamplerName, Sampling
from ldm.uncertainty.branch import branch


@dataclass(frozen=True)
class Way:
    """One way to ask: a sampler, its steps, where members branch, the precision of the network, what it keeps.

    Attributes:
        deep_every, shallow_blocks: see `ldm.settings.Speed`.
    """

    sampler: SamplerName
    steps: int
    at: float
    precision: Precision = "float32"
    deep_every: int = 1
    shallow_blocks: int | None = None

    def of(self, pipeline: EnsemblePipeline, seed: int) -> EnsemblePipeline:
        """Return the ensemble asked in this way, on the noises of a seed."""
        speed = replace(
            pipeline.speed,
            precision=self.precision,
            deep_every=self.deep_every,
            shallow_blocks=self.shallow_blocks,
        )
        sampling = Sampling(self.sampler, self.steps, seed=seed)
        return pipeline.with_(sampling=sampling, branching=Branching(at=self.at), speed=speed)


@dataclass(frozen=True)
class Answer:
    """Mutual information of every class and noise, and what one noise of one class costs.

    Attributes:
        mi: [classes, noises], nats.
        evaluations: passes of the network for one image: those before the branch, and one a member there; parts of
            passes count by their operations.
        seconds: of one noise of one class.
    """

    mi: Values
    evaluations: float
    seconds: float


class CountedDenoiser:
    """A denoiser that counts its calls."""

    def __init__(self, denoiser: Any):
        self.denoiser = denoiser
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.denoiser(*args)


def count_evaluations(pipeline: EnsemblePipeline) -> float:
    """Count passes of the network for one image up to the branched step: one a member there, one before.

    Of a network that keeps deep features they are as many as have its operations.
    """
    chains = pipeline._chains([0], [0], pipeline.bases(0))
    counted = {name: CountedDenoiser(chains[name]) for name in ("base", "members")}
    branch(**{**chains, **counted}, only_first=True)
    passes = counted["base"].calls + pipeline.members * counted["members"].calls
    if pipeline.speed.deep_every == 1:
        return passes
    plain = pipeline.with_(speed=replace(pipeline.speed, deep_every=1, shallow_blocks=None))
    exact = plain._chains([0], [0], pipeline.bases(0))
    made = count_operations(lambda: branch(**chains, only_first=True))
    return passes * made / count_operations(lambda: branch(**exact, only_first=True))


def measure_answer(pipeline: EnsemblePipeline, n: int) -> Answer:
    """Measure every class on n noises."""
    labels = range(pipeline.n_classes)
    began = time.process_time()
    found = {one.label: one.mi.numpy() for one in measure_classes(pipeline, labels, pipeline.make_plan(n))}
    taken = time.process_time() - began
    mi = np.stack([found[label] for label in labels]).astype(np.float64)
    return Answer(mi, count_evaluations(pipeline), taken / mi.size)
