"""What a shortcut does to mutual information: half precision, deep features that are kept, on the same noises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.experiments.ranking_draws import Values
from ldm.experiments.timing import write_numbers
from ldm.experiments.ways import Answer, Way, measure_answer
from ldm.options import option
from ldm.pipelines import load_ensemble
from ldm.report.tables import markdown_table
from ldm.settings import SamplerName, Speed
from ldm.stats import rank_correlation
from ldm.util import generator


def resample_ranks(found: Values, exact: Values, resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the rank correlation of the class means of values [classes, noises], and percentiles 2.5 and 97.5 of it
    over noises that are drawn again, the same ones for both."""
    source = generator("shortcuts", seed)
    count = exact.shape[1]
    drawn = [torch.randint(count, (count,), generator=source).numpy() for _ in range(resamples)]
    every = [np.arange(count), *drawn]
    pairs = [np.stack([values[:, some].mean(1) for some in every]) for values in (found, exact)]
    ranks = rank_correlation(*pairs)
    return float(ranks[0]), float(np.quantile(ranks[1:], 0.025)), float(np.quantile(ranks[1:], 0.975))


@dataclass(frozen=True)
class Shortcuts:
    """Measure what shortcuts of the network do to mutual information, and to the ranks of classes by it.

    Every class is measured on the same noises exactly and under each shortcut, at each branch point: bf16; bf16 with a
    row in each pass, where members cannot be rounded together; and deep features that are kept between steps. Beside
    them stands the exact answer on other noises, which says what noises alone do. An error is relative to the exact
    value: of the mean of a class its bias over all classes and its root mean square, and the root mean square of a
    single noise.

    Examples:
      python benchmarks/shortcuts.py --path logs/bootstrapped_digits_5 --steps 50 --branch_ats 0 0.5 0.9
      python benchmarks/shortcuts.py --path logs/bootstrapped_digits_5 --steps 20 --deep_everys 2 3 --shallow_blocks 1 3
    """

    path: str
    """The folder that save_ensemble.py (decu gather) wrote."""
    sampler: SamplerName = "DDIM"
    """The sampler."""
    steps: int = 50
    """Its steps."""
    branch_ats: tuple[float, ...] = (0.5,)
    """Where members branch, as fractions of the steps."""
    bf16: bool = True
    """Measure bf16."""
    deep_everys: tuple[int, ...] = (2, 4)
    """How seldom deep features of the network are computed, see --deep_every of commands."""
    shallow_blocks: tuple[int, ...] = (1, 3)
    """With these, the blocks at either end that are always computed."""
    n: int = 16
    """Noises of a class."""
    resamples: int = 400
    """Draws of the noises for intervals."""
    seed: int = 42
    """The seed of the noises; other noises are those of the next."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a shortcut and branch point, and return its numbers."""
        pipeline = load_ensemble(self.path, device=self.place.device, speed=Speed())
        rows: list[dict[str, str | int | float | None]] = []
        numbers: list[dict[str, Any]] = []
        for at in self.branch_ats:
            plain = Way(self.sampler, self.steps, at)
            exact = measure_answer(plain.of(pipeline, self.seed), self.n)
            answers = {"other noises": (plain, measure_answer(plain.of(pipeline, self.seed + 1), self.n))}
            for name, way, chunk in self.shortcuts(plain):
                speed = pipeline.speed if chunk is None else replace(pipeline.speed, chunk=chunk)
                answers[name] = way, measure_answer(way.of(pipeline.with_(speed=speed), self.seed), self.n)
            for name, (way, answer) in answers.items():
                found = self.compare(answer, exact)
                numbers.append({"shortcut": name, "way": asdict(way), **found})
                rows.append(_row(at, name, found))
        print(f"{self.path}: {self.sampler}, {self.steps} steps, {self.n} noises of {pipeline.n_classes} classes")
        print(markdown_table(rows))
        write_numbers(self.json, self, rows, numbers, pipeline.device)
        return numbers

    def shortcuts(self, plain: Way) -> Iterator[tuple[str, Way, int | None]]:
        """Yield every shortcut by name, and the rows of its passes where they are told."""
        if self.bf16:
            half = replace(plain, precision="bf16")
            yield "bf16", half, None
            yield "bf16, a row a pass", half, 1
        for every in self.deep_everys:
            for shallow in self.shallow_blocks:
                kept = replace(plain, deep_every=every, shallow_blocks=shallow)
                yield f"deep every {every}, {shallow} shallow", kept, None

    def compare(self, answer: Answer, exact: Answer) -> dict[str, float]:
        """Return what is off in an answer."""
        means = answer.mi.mean(1) / exact.mi.mean(1) - 1
        singles = answer.mi / exact.mi - 1
        rank, low, high = resample_ranks(answer.mi, exact.mi, self.resamples, self.seed)
        return {
            "mi": float(exact.mi.mean()),
            "bias": float(means.mean()),
            "of_class": float(np.sqrt((means**2).mean())),
            "of_noise": float(np.sqrt((singles**2).mean())),
            "rank": rank,
            "low": low,
            "high": high,
            "evaluations": answer.evaluations / exact.evaluations,
            "seconds": answer.seconds / exact.seconds,
        }


def _row(at: float, name: str, found: dict[str, float]) -> dict[str, str | int | float | None]:
    return {
        "branch": at,
        "MI (nats)": f"{found['mi']:.3g}",
        "shortcut": name,
        "bias": f"{found['bias']:+.2%}",
        "of a class": f"{found['of_class']:.2%}",
        "of a noise": f"{found['of_noise']:.2%}",
        "rank correlation": f"{found['rank']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
        "evaluations": f"{found['evaluations']:.2f}",
        "CPU seconds": f"{found['seconds']:.2f}",
    }


if __name__ == "__main__":
    run_file(Shortcuts)
