"""Paths and snapshots of the benchmark, by hand."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from ldm.benchmark.familiar import FAMILIAR, FAMILIAR_LEVELS, PathCurvature, Snapshots
from ldm.util import generator


def known(problem):
    images, labels = problem.data
    chosen = torch.randperm(len(images), generator=generator("familiar", problem.world.seed))[:FAMILIAR]
    return images[chosen].reshape(-1, 1, 8, 8), labels[chosen]


def log_curvature(problem, z, labels):
    denoiser, step = problem.build(labels)(problem.base), np.log(50) / 9
    total, before = 0, None
    for ratio in np.geomspace(0.1, 5, 10):
        angle = np.arctan(ratio)
        x = np.cos(angle) * z if before is None else np.cos(angle) * before.x0 + np.sin(angle) * before.eps
        said = denoiser(x.float(), 2 * angle / np.pi)
        if before is not None:
            total = total + ((said.eps - before.eps) / step).double().square().flatten(1).mean(1)
        before = said
    return total.log().numpy()


@torch.no_grad()
def test_path_curvature_is_a_squared_z_score_of_the_path(problem):
    usual = log_curvature(problem, *known(problem))
    asked = log_curvature(problem, problem.pictures, problem.labels)
    expected = ((asked - usual.mean()) / usual.std()) ** 2
    assert PathCurvature().score(problem).values.numpy() == pytest.approx(expected, rel=2e-3, abs=1e-5)


def hooked(problem, z, labels, noises):
    """What the blocks put out at each level [T, N, 128]."""
    kept, rows = [], []
    handles = [block.register_forward_hook(lambda *call: kept.append(call[2])) for block in problem.base.blocks]
    for ratio, eps in zip(np.geomspace(0.1, 5, 10), noises, strict=True):
        angle = float(np.arctan(ratio))
        time = torch.full((len(z),), 2 * angle / np.pi)
        problem.base(np.cos(angle) * z + np.sin(angle) * eps, time, labels)
        rows.append(torch.cat(kept, 1).double())
        kept.clear()
    for handle in handles:
        handle.remove()
    return torch.stack(rows).numpy()


@torch.no_grad()
def test_snapshots_are_mahalanobis_distances_of_activations(problem):
    images, labels = known(problem)
    usual = hooked(problem, images, labels, FAMILIAR_LEVELS.noises(range(len(images)), (1, 8, 8)))
    pictures = problem.pictures
    noises = [problem.noise(number, pictures.shape) for number in range(10)]
    asked = hooked(problem, pictures, problem.labels, noises)
    logs = []
    for own, other in zip(usual, asked, strict=True):
        centred = (own - own.mean(0)) / own.std(0)
        precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centred).covariance_)
        row = (other - own.mean(0)) / own.std(0)
        logs.append(np.log((row @ precision * row).sum(1) / own.shape[1]))
    assert Snapshots().score(problem).values.numpy() == pytest.approx(np.mean(logs, 0), rel=1e-3)
