"""Is the last layer enough? Variances of the predicted clean data at single noise levels, beside the oracle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.benchmark.cells import LAYER_REFITTED, RETRAINED
from ldm.benchmark.epistemic import RENOISED_SHARES, draw_weights
from ldm.benchmark.measures import HALF
from ldm.benchmark.method import find_gap
from ldm.benchmark.problem import Problem
from ldm.benchmark.whole_network import KroneckerPosterior, RandomSubset
from ldm.checkpoint import save_tensors
from ldm.ensembles.members import MemberNetwork, Members
from ldm.experiments.controls import over_runs
from ldm.records import Row
from ldm.stats import rank_correlation

_OTHER_HALF = "other half of the oracle"


def list_sources(problem: Problem) -> dict[str, Members]:
    """Return {name: networks} whose variances are compared: the oracle, its halves, posteriors and refits."""
    trained = problem.trained
    every = range(trained.oracle_count)
    found = {
        RETRAINED: trained.retrained,
        HALF: trained.retrained.select(every[::2]),
        _OTHER_HALF: trained.retrained.select(every[1::2]),
        "deep ensemble": trained.ensemble,
        LAYER_REFITTED: trained.refits(),
    }
    for curvature in ("full", "diag", "sandwich"):
        found[f"Laplace {curvature}, last layer"] = draw_weights(problem, curvature)
    for method in (RandomSubset(), KroneckerPosterior()):
        if not find_gap(method):
            found[method.name] = method.draws(problem)
    return found


@torch.no_grad()
def measure_levels(problem: Problem, file: Path) -> None:
    """Write the variance over networks of x_0 predicted at the base's pictures, noised again: [levels, B, D] each."""
    found = {}
    for name, members in list_sources(problem).items():
        denoiser = problem.build()(MemberNetwork(problem.base, members))
        noised = problem.noised_pictures(RENOISED_SHARES)
        variances = [denoiser(x, u).x0.double().var(0).flatten(1) for u, x, _ in noised]
        found[name] = torch.stack(variances).float()
    save_tensors(found, file, {"name": "levels"}, overwrite=True)


def compare_levels(seeds: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    """Return a row for each source and level: ratio to the oracle, ranks of pixels and of pictures, over seeds.

    Args:
        seeds: what each seed's file holds.
    """
    rows = []
    for name in seeds[0]:
        if name in (RETRAINED, _OTHER_HALF) or not all(name in seed for seed in seeds):
            continue
        truth = _OTHER_HALF if name == HALF else RETRAINED
        for level, share in enumerate(RENOISED_SHARES):
            pairs = [(seed[name][level].double(), seed[truth][level].double()) for seed in seeds]
            measured = {
                "ratio": [float(own.sum() / true.sum()) for own, true in pairs],
                "pixel ranks": [float(rank_correlation(own.numpy(), true.numpy()).mean()) for own, true in pairs],
                "picture ranks": [
                    float(rank_correlation(own.sum(1).numpy(), true.sum(1).numpy())) for own, true in pairs
                ],
            }
            row: Row = {"weights": name, "share of noise": share}
            for column, values in measured.items():
                interval = over_runs(values)
                row |= {column: interval.estimate, f"{column}, low": interval.low, f"{column}, high": interval.high}
            rows.append(row)
    return rows
