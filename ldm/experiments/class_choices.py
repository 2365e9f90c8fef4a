"""Choices of a class of which more images are collected: what they bring, and what rules would have gained.

A gain is how much lower the loss after a rule's choice is than the mean over all choices, as a share of that mean; a
regret is the gain of the best choice minus that of the rule's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.records import Row
from ldm.stats import mean_interval, rank_correlation

CEILING = "the best choice"
LAST_LAYER = "last layer refitted"
SCRATCH = "trained from scratch"


@dataclass(frozen=True)
class Round:
    """One choice among ten classes.

    Attributes:
        head: test loss of the last layer refitted with more images of each class, over that without [10].
        losses: test loss of each training from scratch with them [10, starts]; None: nothing was trained.
        scores: what each rule says of each class [10], the largest is chosen.
    """

    head: NDArray[np.float64]
    losses: NDArray[np.float64] | None
    scores: Mapping[str, NDArray[np.float64]]

    def gain(self, name: str, oracle: str) -> float:
        """Return the mean loss of all choices minus that of a rule's, as a share of the mean."""
        values = self.head if oracle == LAST_LAYER else self.trained.mean(1)
        if name == CEILING:
            return 1 - values.min() / values.mean() if oracle == LAST_LAYER else _cross(self.trained)
        return _gain(np.zeros(10) if name == "random" else self.scores[name], values)

    def agreement(self, name: str, oracle: str) -> float:
        """Return the rank correlation of a rule's scores with what the choices bring."""
        values = self.head if oracle == LAST_LAYER else self.trained.mean(1)
        if name == CEILING:
            return 1.0 if oracle == LAST_LAYER else _agree(self.trained[:, ::2].mean(1), self.trained[:, 1::2].mean(1))
        return _agree(np.zeros(10) if name == "random" else self.scores[name], -values)

    @property
    def trained(self) -> NDArray[np.float64]:
        """Losses of the trainings from scratch."""
        assert self.losses is not None
        return self.losses


def compare_rules(by_seed: Sequence[Sequence[Round]]) -> list[Row]:
    """Return a row for each oracle and rule: gain, regret, and rank correlation with what choices bring.

    Args:
        by_seed: the rounds of each seed.
    """
    table: list[Row] = []
    for oracle in (LAST_LAYER, SCRATCH):
        asked = [[each for each in rounds if oracle == LAST_LAYER or each.losses is not None] for rounds in by_seed]
        if not all(asked):
            continue
        best = np.array([np.mean([each.gain(CEILING, oracle) for each in rounds]) for rounds in asked])
        for name in ["random", *by_seed[0][0].scores, CEILING]:
            own = np.array([np.mean([each.gain(name, oracle) for each in rounds]) for rounds in asked])
            agreed = [np.mean([each.agreement(name, oracle) for each in rounds]) for rounds in asked]
            gain, regret = mean_interval(100 * own), mean_interval(100 * (best - own))
            table.append(
                {
                    "oracle": oracle,
                    "rule": name,
                    "gain": gain.estimate,
                    "low": gain.low,
                    "high": gain.high,
                    "regret": regret.estimate,
                    "regret low": regret.low,
                    "regret high": regret.high,
                    "rank correlation": float(np.mean(agreed)),
                }
            )
    return table


def list_rounds(by_seed: Sequence[Sequence[Round]], first: int) -> list[Row]:
    """Return a row for each seed, round and class, with all that was scored and measured; `first` is the first seed."""
    return [
        {
            "seed": first + seed,
            "round": number,
            "class": label,
            "refitted": float(each.head[label]),
            "trained": None if each.losses is None else float(each.losses[label].mean()),
            **{name: float(score[label]) for name, score in each.scores.items()},
        }
        for seed, rounds in enumerate(by_seed)
        for number, each in enumerate(rounds)
        for label in range(10)
    ]


def _gain(score: NDArray, losses: NDArray) -> float:
    """Return the mean loss minus that of the class of the largest score, over the mean; ties are shared."""
    best = score == score.max()
    return float(1 - losses[best].mean() / losses.mean())


def _agree(score: NDArray, value: NDArray) -> float:
    return float(rank_correlation(score[None], value[None])[0])


def _cross(losses: NDArray) -> float:
    """Return the gain of the class that is best in one half of the trainings, measured on the other half."""
    halves = losses[:, ::2].mean(1), losses[:, 1::2].mean(1)
    return (_gain(-halves[0], halves[1]) + _gain(-halves[1], halves[0])) / 2
