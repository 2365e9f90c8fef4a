"""What an answer costs: evaluations and seconds until classes are ranked as by 200 steps and many noises."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.samplers import run
from ldm.ensembles.members import SingleMember
from ldm.experiments.ranking_draws import DRAWS, compare_draws, count_noises_of_interval
from ldm.experiments.timing import write_numbers
from ldm.experiments.ways import Way, measure_answer
from ldm.options import option
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.report.tables import markdown_table
from ldm.settings import Precision, SamplerName, Speed

REFERENCE = ("DDIM", 200)
PUBLISHED_NOISES = 10


@dataclass(frozen=True)
class Cost:
    """The fewest noises with which a way ranks the classes as the reference does, and what they take together."""

    noises: float
    evaluations: float
    seconds: float
    correlation: float
    low: float
    high: float


@torch.no_grad()
def time_published(pipeline: EnsemblePipeline, n: int) -> float:
    """Return seconds of one noise of one class as published: member after member, a call each, class by class."""
    labels, images = [0] * n, list(range(n))
    chains = pipeline._chains(labels, images, pipeline.bases(0))
    alone = [SingleMember(pipeline.base_network, pipeline.network.members, one) for one in range(pipeline.members)]
    cond, at = pipeline.labels(labels), chains["at"]
    began = time.process_time()
    sampler, rest = chains["sampler"], (chains["schedule"], chains["x"], chains["times"])
    state = run(_first(sampler(chains["base"], *rest, noise=chains["noise"]), at)) if at else chains["x"]
    for one in alone:
        steps = sampler(pipeline.denoiser(cond, one), rest[0], state, rest[2], noise=chains["noise"], start=at)
        run(_first(steps, 1))
    return (time.process_time() - began) / n


def _first(steps: Iterator[Any], count: int) -> Iterator[Any]:
    for _, step in zip(range(count), steps, strict=False):
        yield step


@dataclass(frozen=True)
class AnswerStudy:
    """Ask what it costs to rank classes by mutual information as the slow reference does.

    The reference is DDIM at 200 steps on noises of its own. Of every way to ask (sampler, steps, branch point,
    precision) all classes are measured on `n` noises; then the rank correlation with the reference is found for fewer
    noises, by drawing them many times: equally for all classes, or more for classes whose ranks are close. The cost of
    a way is that of the fewest noises whose 2.5 percentile reaches `target`. Beside it stands what was published: 200
    steps, ten noises, a call a member, class by class. Seconds are of the CPU's time, so that other work beside does
    not count.

    Examples:
      python benchmarks/answer.py --path logs/bootstrapped_digits_5 --json results/answer.json
      python benchmarks/answer.py --path logs/bootstrapped_digits_5 --samplers DDIM --step_counts 5 --branch_ats 0 0.5
    """

    path: str
    """The folder that save_ensemble.py (decu gather) wrote."""
    samplers: tuple[SamplerName, ...] = ("DDIM", "DPM-Solver++", "Heun")
    """The samplers that are compared."""
    step_counts: tuple[int, ...] = (2, 5, 10, 20)
    """Their numbers of steps."""
    branch_ats: tuple[float, ...] = (0.5,)
    """Where members branch, as fractions of the steps; the reference branches at the first."""
    precisions: tuple[Precision, ...] = ("float32",)
    """The precisions of the network."""
    deep_everys: tuple[int, ...] = (1,)
    """How seldom deep features of the network are computed, see --deep_every of commands; 1 computes all."""
    shallow_blocks: tuple[int, ...] = (1,)
    """With these, the blocks at either end that are always computed."""
    n: int = 48
    """Noises of a class, from which fewer are drawn."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of noises that are tried."""
    target: float = 0.98
    """The rank correlation that the 2.5 percentile must reach; one exchange of neighbours among ten is 0.988."""
    resamples: int = 400
    """Draws of each number of noises."""
    seed: int = 42
    """The seed of the noises; the reference takes those of the next."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a way, and return its numbers.

        Raises:
            ValueError: if a number of noises is larger than `n`, or none of them can be allocated to classes.
        """
        if not 2 < max(self.counts) <= self.n:
            raise ValueError(
                f"--counts are drawn from --n {self.n} noises, and one of them is 3 or more, got {max(self.counts)}"
            )
        pipeline = load_ensemble(self.path, device=self.place.device, speed=Speed())
        slow = Way(*REFERENCE, self.branch_ats[0])
        reference = measure_answer(slow.of(pipeline, self.seed + 1), self.n)
        again = measure_answer(slow.of(pipeline, self.seed), self.n)
        published = replace(again, seconds=time_published(slow.of(pipeline, self.seed), PUBLISHED_NOISES))
        quality = compare_draws(published.mi, reference.mi, min(PUBLISHED_NOISES, self.n), "equal", self.resamples, 0)
        total = pipeline.n_classes * PUBLISHED_NOISES
        base = Cost(PUBLISHED_NOISES, total * again.evaluations, total * published.seconds, *quality)
        rows = [_row("as published: DDIM, 200, a call a member", slow, base, base, None)]
        numbers: list[dict[str, Any]] = [{"way": asdict(slow), "how": "published", **asdict(base)}]
        answers = {slow: again, **{way: measure_answer(way.of(pipeline, self.seed), self.n) for way in self.ways()}}
        for way, answer in answers.items():
            wide = count_noises_of_interval(answer.mi, 0.2)
            for how in DRAWS:
                tried = {n: compare_draws(answer.mi, reference.mi, n, how, self.resamples, n) for n in self.usable(how)}
                enough = next((n for n, found in tried.items() if found[1] >= self.target), None)
                kept = {"way": asdict(way), "how": how, "tried": tried, "noises_of_interval": wide}
                chosen = enough or max(tried)
                images = chosen * pipeline.n_classes
                cost = Cost(chosen, images * answer.evaluations, images * answer.seconds, *tried[chosen])
                numbers.append({**kept, "reached": enough is not None, **asdict(cost)})
                rows.append(_row(how, way, cost, base, wide, enough is not None))
        print(f"{self.path}: {pipeline.n_classes} classes, {pipeline.members} members, target {self.target:g}")
        print(markdown_table(rows))
        write_numbers(self.json, self, rows, {"ways": numbers}, pipeline.device)
        return numbers

    def ways(self) -> Sequence[Way]:
        """Return every way to ask but the reference's."""
        return [
            Way(sampler, steps, at, precision, every, shallow)
            for sampler in self.samplers
            for steps in self.step_counts
            for at in self.branch_ats
            for precision in self.precisions
            for every in self.deep_everys
            for shallow in (self.shallow_blocks if every > 1 else (None,))
        ]

    def usable(self, how: str) -> list[int]:
        """Return the numbers of noises that can be drawn: with one or two nothing is left to allocate."""
        return [n for n in sorted(self.counts) if how == "equal" or n > 2]


def _row(
    how: str, way: Way, cost: Cost, base: Cost, wide: float | None, reached: bool = True
) -> dict[str, str | int | float | None]:
    return {
        "noises": how,
        "sampler": way.sampler,
        "steps": way.steps,
        "branch": way.at,
        "precision": way.precision,
        "deep": "always" if way.deep_every == 1 else f"every {way.deep_every}, {way.shallow_blocks} shallow",
        "noises a class": f"{cost.noises:g}" if reached else f"more than {cost.noises:g}",
        "rank correlation": f"{cost.correlation:.3f} [{cost.low:.3f}, {cost.high:.3f}]",
        "evaluations": f"{cost.evaluations:g}",
        "fewer": f"{base.evaluations / cost.evaluations:.3g}",
        "CPU seconds": f"{cost.seconds:.3g}",
        "less": f"{base.seconds / cost.seconds:.3g}",
        "noises to +-10 %": None if wide is None else f"{wide:.3g}",
    }


if __name__ == "__main__":
    run_file(AnswerStudy)
