"""Do averaged members draw better pictures than one of them does? The mean of their outputs at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.benchmark.problem import Problem
from ldm.benchmark.quality import PICTURE_METRICS, PictureJudge
from ldm.benchmark.table import LEVEL, paired_p
from ldm.benchmark.trained import REGRESSED
from ldm.checkpoint import save_tensors
from ldm.ensembles.members import MemberNetwork, Members
from ldm.experiments.small_networks import draw_noised
from ldm.records import Row
from ldm.stats import holm, mean_interval
from ldm.util import generator

# Noises of every held-back image in the loss.
LOSS_DRAWS = 4
LOSS_NAME, _RECOGNISED = "loss on held-back images", "recognised"
# What is compared, and whether large or small values are good.
AVERAGED_METRICS = {_RECOGNISED: 1, **PICTURE_METRICS, LOSS_NAME: -1}


@dataclass(frozen=True)
class AverageNetwork:
    """The mean of the members' outputs, which of v or eps is that of their scores.

    Attributes:
        members: all of them at once.
    """

    members: MemberNetwork

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.members(x, t, cond).mean(0)


@torch.no_grad()
def measure_averaging(problem: Problem, file: Path) -> None:
    """Write, of three ensembles, pictures of single members [M, B, D] and of averaged scores [B, D], and losses."""
    trained = problem.trained
    sets: dict[str, tuple[Members, nn.Module]] = {
        "deep ensemble": (trained.ensemble, trained.base),
        "DECU class table, perturbed": (trained.heads("classes", "perturbed"), trained.base),
        "DECU LoRA": (trained.low_rank(), trained.low_rank_network),
    }
    found = {}
    for name, (members, network) in sets.items():
        together = AverageNetwork(MemberNetwork(network, members))
        *_, last = problem.walk(problem.build()(together))
        found[f"{name}/single"] = problem.sample(members, network).flatten(2)
        found[f"{name}/together"] = last.x_next.flatten(1)
        found[f"{name}/losses"] = find_losses(problem, MemberNetwork(network, members))
    save_tensors(found, file, {"name": "averaging"}, overwrite=True)


def find_losses(problem: Problem, network: MemberNetwork) -> Tensor:
    """Return the squared error on held-back images [M + 1]: of each member, and of their mean."""
    images = problem.trained.source
    rows = draw_noised(
        images.tests.repeat(LOSS_DRAWS, 1),
        images.test_labels.repeat(LOSS_DRAWS),
        generator("held-back loss", problem.world.seed),
        REGRESSED,
    )
    outputs = network(images.square(rows.x), rows.t, rows.cond).flatten(2)
    every = torch.cat([outputs, outputs.mean(0, keepdim=True)])
    return (every - rows.target).square().mean((1, 2))


def compare_averaging(
    worlds: Mapping[str, Sequence[Mapping[str, Tensor]]], judge: PictureJudge, labels: Tensor
) -> list[Row]:
    """Return a row for each ensemble, world and metric: one member, all averaged, and the gain over seeds.

    Args:
        worlds: {world's data: what each seed's file holds}.
        judge: of the pictures.
        labels: classes of the pictures [B].

    Returns:
        rows whose `gain` is positive where the averaged members are better, with Student's interval over seeds and
        Holm's p among all rows.
    """
    rows: list[Row] = []
    tests: list[float] = []
    for data, seeds in worlds.items():
        names = list(dict.fromkeys(key.split("/")[0] for key in seeds[0]))
        for name in names:
            pairs = [_measure_pair(seed, name, judge, labels) for seed in seeds]
            for metric, sign in AVERAGED_METRICS.items():
                single, together = (np.array([pair[place][metric] for pair in pairs]) for place in (0, 1))
                gains = sign * (together - single)
                gain = mean_interval(gains)
                tests.append(paired_p(gains))
                rows.append(
                    {
                        "ensemble": name,
                        "images": data,
                        "metric": metric,
                        "one member": float(single.mean()),
                        "averaged": float(together.mean()),
                        "gain": gain.estimate,
                        "gain, low": gain.low,
                        "gain, high": gain.high,
                    }
                )
    adjusted = holm(tests).tolist()
    return [
        {**row, "p_holm": p, "better": p < LEVEL and row["gain"] > 0} for row, p in zip(rows, adjusted, strict=True)
    ]


def _measure_pair(
    seed: Mapping[str, Tensor], name: str, judge: PictureJudge, labels: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of single members, mean over them, and of all averaged."""
    losses = seed[f"{name}/losses"]

    def measure(pictures: Tensor, loss: float) -> dict[str, float]:
        recognised = float(judge.recognised(pictures, labels).mean())
        return {_RECOGNISED: recognised, LOSS_NAME: loss, **judge.measure(judge.features(pictures))}

    singles = [
        measure(pictures, float(loss)) for pictures, loss in zip(seed[f"{name}/single"], losses[:-1], strict=True)
    ]
    mean = {metric: float(np.mean([one[metric] for one in singles])) for metric in AVERAGED_METRICS}
    return mean, measure(seed[f"{name}/together"], float(losses[-1]))
