"""A promise with a rejection: a threshold below which at most a stated share of samples is bad, with confidence.

A sample is accepted where its score lies below a threshold t, and a judge says which samples are bad. The risk is

    R(t) = P(bad | score < t)

Learn-then-test (Angelopoulos et al. 2021, arXiv 2110.01052) tests at every threshold of a grid that R(t) exceeds the
promised risk, and keeps the largest threshold at which this is refused. The grid is made of order statistics: given
the score at rank m + 1, the m scores below it are independent draws of the law below it, so their bad ones are
binomial with R(t), whatever the score is worth, and

    p(t) = P(Binomial(accepted, risk) <= bad)

is exact for every threshold. All thresholds share the error 1 - confidence alike (Bonferroni), so the promise holds
for whichever is taken. It is about further samples of the same law: same model, sampler, steps and classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

from ldm.stats import check_vectors

# Shares of the calibration set at whose ranks thresholds are tried. More of them need more judged samples.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Judged samples beyond which `count_needed` looks no further.
MOST_JUDGED = 10**7


@dataclass(frozen=True)
class RiskLevel:
    """What is promised: at most a share `risk` of bad samples, with an `error` in each of all tests together.

    Attributes:
        risk: the largest share of bad samples among the accepted ones, in (0, 1).
        confidence: of all promises together, in (0, 1).
        tests: how many thresholds are tried in all: thresholds of a grid x scores x classes.
    """

    risk: float
    confidence: float
    tests: int = len(SHARES)

    @property
    def error(self) -> float:
        """Probability of a wrong promise that each test may have (Bonferroni)."""
        return (1 - self.confidence) / self.tests

    @property
    def fewest(self) -> int:
        """Accepted samples that a promise needs even where none of them is bad: (1 - risk)^n <= error."""
        return math.ceil(math.log(self.error) / math.log1p(-self.risk) - 1e-9)

    def p_value(self, bad: ArrayLike, accepted: ArrayLike) -> NDArray[np.float64]:
        """Exact p value that the risk is exceeded: P(Binomial(accepted, risk) <= bad); 1 where none is accepted."""
        return np.asarray(binom.cdf(bad, accepted, self.risk), dtype=np.float64)

    def bound(self, bad: int, accepted: int) -> float:
        """Upper end of the share of bad samples, Clopper and Pearson's at this error, one-sided."""
        return 1.0 if bad >= accepted else float(beta.ppf(1 - self.error, bad + 1, accepted - bad))


@dataclass(frozen=True)
class Promise:
    """The largest threshold under which the risk is promised.

    Attributes:
        threshold: a sample is accepted where its score lies below; infinite where all are, NaN without a promise.
        accepted: judged samples below the threshold, and `bad` those of them that are bad.
        judged: judged samples in all, and `all_bad` those of them that are bad.
        tried: accepted and bad samples at the threshold, or where nothing is promised at the one that came nearest.
        level: what was to be promised.
    """

    threshold: float
    accepted: int
    bad: int
    judged: int
    all_bad: int
    tried: tuple[int, int]
    level: RiskLevel

    @property
    def holds(self) -> bool:
        """Whether anything is promised."""
        return not math.isnan(self.threshold)

    @property
    def share(self) -> float:
        """Accepted share of the judged samples."""
        return self.accepted / self.judged

    @property
    def bound(self) -> float:
        """Upper end of the risk below the threshold that was tried, Clopper and Pearson's at the error of one test."""
        accepted, bad = self.tried
        return self.level.bound(bad, accepted)

    @property
    def needed(self) -> int | None:
        """Judged samples that a promise takes, if the bad share at the tried threshold is what it is here.

        None where that share is no smaller than the risk, so that more samples would not help.
        """
        accepted, bad = self.tried
        found = count_needed(bad / max(accepted, 1), self.level)
        return None if found is None or not accepted else math.ceil(found * self.judged / accepted)

    def accepts(self, scores: NDArray) -> NDArray[np.bool_]:
        """Whether samples are accepted by their scores [N]: [N], none where nothing is promised."""
        return np.asarray(scores) < self.threshold


def count_needed(share: float, level: RiskLevel) -> int | None:
    """Return how many accepted samples make a promise where a `share` of them is bad; None where no number does."""
    if share >= level.risk:
        return None
    low = level.fewest - 1
    high = level.fewest
    while level.p_value(math.ceil(share * high), high) > level.error:
        low = high
        high *= 2
        if high > MOST_JUDGED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        passes = level.p_value(math.ceil(share * middle), middle) <= level.error
        low, high = (low, middle) if passes else (middle, high)
    return high


def promise_risk(scores: ArrayLike, bad: ArrayLike, level: RiskLevel, shares: Sequence[float] = SHARES) -> Promise:
    """Find the largest threshold of a grid under which the risk is promised.

    Args:
        scores: of the judged samples [N], smaller is surer.
        bad: the judge's verdicts [N], 0 or 1.
        level: what is promised. Its `tests` count all thresholds of all scores and classes among which one chooses.
        shares: ranks of the thresholds as shares of N, in (0, 1].

    Raises:
        ValueError: if the vectors do not fit or are not finite, verdicts are no 0 and 1, or N is below `level.fewest`.
    """
    scores, bad = check_vectors(1, scores=scores, bad=bad)
    if not np.isin(bad, (0, 1)).all():
        raise ValueError(f"verdicts must be 0 or 1, got values {np.unique(bad)[:5].tolist()}")
    count = len(scores)
    if count < level.fewest:
        raise ValueError(describe_shortage(count, level))
    ordered = np.sort(scores)
    ranks = [math.ceil(share * count - 1e-9) for share in shares]
    thresholds = np.array([math.inf if rank >= count else ordered[rank] for rank in ranks])
    below = scores < thresholds[:, None]  # [thresholds, N]
    accepted = below.sum(1)
    wrong = (below & (bad == 1)).sum(1)
    p = np.where(accepted > 0, level.p_value(wrong, accepted), 1.0)
    holding = np.flatnonzero(p <= level.error)
    best = int(holding[np.argmax(thresholds[holding])]) if len(holding) else int(np.argmin(p))
    own = int(accepted[best])
    own_bad = int(wrong[best])
    return Promise(
        threshold=float(thresholds[best]) if len(holding) else math.nan,
        accepted=own if len(holding) else 0,
        bad=own_bad if len(holding) else 0,
        judged=count,
        all_bad=int(bad.sum()),
        tried=(own, own_bad),
        level=level,
    )


def describe_shortage(count: int, level: RiskLevel) -> str:
    """Say that a calibration set is too small for any promise, and how many judged samples one needs."""
    fewer = "name fewer --scores, " if level.tests > len(SHARES) else ""
    return (
        f"{count} judged samples promise nothing: a risk of {level.risk:g} at confidence {level.confidence:g} over "
        f"{level.tests} thresholds needs at least {level.fewest}, even if none of them is bad; judge "
        f"{level.fewest - count} more, {fewer}or ask for a larger risk"
    )
