"""Methods that ask whether a picture is like those that were trained on: its path to noise, snapshots of activations.

Both compare with training images, by the protocol of `decu uncertainty ood` (`ldm.evaluation.ood`): ten noise levels
sigma / alpha from 0.1 to 5. They are controls: what they say of a picture knows nothing of other weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.benchmark.artefacts import Tensors
from ldm.benchmark.method import MethodKind, Scored
from ldm.benchmark.problem import Problem
from ldm.benchmark.trained import REGRESSED
from ldm.diffusion.denoiser import Target
from ldm.evaluation.ood import Corruption, NetworkReader, path_distances, snapshot_distances
from ldm.util import generator

FAMILIAR_LEVELS = Corruption.make(0.1, 5.0, 10)
# Training images that pictures are compared with.
FAMILIAR = 400
# Places inside of the small network whose activations are snapshots.
TAPS = {"first block": "blocks.0", "second block": "blocks.1"}


@dataclass(frozen=True)
class PathCurvature:
    """Curvature of the deterministic way from the picture to noise: its distance from training images' (DiffPath)."""

    name: str = "path curvature"
    kind: ClassVar[MethodKind] = "control"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return a distance of each picture."""
        asked = make_reader(problem).follow(problem.pictures, problem.labels, FAMILIAR_LEVELS.ratios)
        return Scored(
            value=torch.from_numpy(path_distances("path curvature", read_known(problem, "path"), asked.numpy()))
        )


@dataclass(frozen=True)
class Snapshots:
    """Activations inside of the network at ten levels: their Mahalanobis distance from training images'."""

    name: str = "snapshots"
    kind: ClassVar[MethodKind] = "control"

    @torch.no_grad()
    def score(self, problem: Problem) -> Scored:
        """Return the mean logarithm of the distances of each picture."""
        reader, pictures = make_reader(problem), problem.pictures
        found = []
        for number, ratio in enumerate(FAMILIAR_LEVELS.ratios):
            u = float(problem.schedule.time_at(ratio))
            x = problem.schedule.noised(pictures, problem.noise(number, pictures.shape), u)
            found.append(reader.snapshot(x, u, problem.labels))
        distances = snapshot_distances(read_known(problem, "snapshots"), torch.stack(found, 1).numpy())
        return Scored(value=torch.from_numpy(np.log(distances).mean(1)))


def make_reader(problem: Problem) -> NetworkReader:
    """Return a reader of the base network."""
    return NetworkReader(problem.base, problem.schedule, Target(REGRESSED), taps=TAPS)


def read_known(problem: Problem, name: str) -> np.ndarray:
    """Return what was read of training images, `path` [K, 6] or `snapshots` [K, T, F], once a world."""

    def read() -> Tensors:
        images, labels = problem.data
        chosen = torch.randperm(len(images), generator=generator("familiar", problem.world.seed))[:FAMILIAR]
        square: Tensor = problem.trained.source.square(images[chosen])
        found = make_reader(problem).read(square, labels[chosen], range(len(chosen)), FAMILIAR_LEVELS)
        return {"path": torch.from_numpy(found.path), "snapshots": torch.from_numpy(found.snapshots)}

    return problem.trained.artefacts.get("familiar", read)[name].numpy()
