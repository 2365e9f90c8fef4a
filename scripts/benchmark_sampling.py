"""Which sampler and how many steps an uncertainty needs: rank correlation with the 200-step answer, and the cost.

Examples:
  python scripts/benchmark_sampling.py --path logs/bootstrapped_digits_5 --json results/sampling.json
  python scripts/benchmark_sampling.py --path logs/bootstrapped_digits_5 --samplers DDIM --step_counts 5 --branch_at 0

For each sampler and number of steps: Spearman correlation over classes of the mutual information at the branch with
that of DDIM at 200 steps on the same noises, evaluations of the network (each is of all members, guided), seconds. The
last line is the 200-step answer on other noises: what cannot be told from chance lies above it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.experiments import timing
from ldm.experiments.classes import measure_classes
from ldm.pipelines import open_ensemble
from ldm.stats import spearman
from ldm.uncertainty.branch import branch

REFERENCE = ("DDIM", 200)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="folder that save_ensemble.py wrote")
    add("--samplers", nargs="+", default=["DPM-Solver++", "Heun", "DDIM"], choices=sorted(SAMPLERS), help="samplers")
    add("--step_counts", type=int, nargs="+", default=[5, 10, 20, 50], help="numbers of steps")
    add("--branch_at", type=float, default=0.5, help="where members part, as a fraction of the steps")
    add("--n", type=int, default=16, help="noises a class")
    add("--seed", type=int, default=42, help="seed of the noises")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--json", metavar="FILE", help="also write the numbers here")
    return parser


class Counted:
    """A denoiser that counts its evaluations."""

    def __init__(self, denoiser: Any, calls: list[int]):
        self.denoiser, self.calls = denoiser, calls

    def __call__(self, *args: Any) -> Prediction:
        self.calls[0] += 1
        return self.denoiser(*args)


def measure(options: argparse.Namespace, sampler: str, steps: int, seed: int) -> tuple[list[float], float]:
    """(mutual information of every class, seconds)."""
    import get_unc_synsets

    words = ["--path", options.path, "--sampler", sampler, "--steps", str(steps), "--branch_at", str(options.branch_at)]
    words += ["--n", str(options.n), "--seed", str(seed), "--device", options.device]
    pipeline = open_ensemble(get_unc_synsets.get_parser().parse_args(words))
    plan = get_unc_synsets.plan_of(pipeline.options, pipeline)
    began = time.perf_counter()
    found = dict(measure_classes(pipeline, range(pipeline.n_classes), plan))
    taken = time.perf_counter() - began
    return [float(found[label]["mi"].mean()) for label in range(pipeline.n_classes)], taken


def evaluations(options: argparse.Namespace, sampler: str, steps: int) -> int:
    """Evaluations of the network up to the branched step, counted on one image."""
    import get_unc_synsets

    words = ["--path", options.path, "--sampler", sampler, "--steps", str(steps), "--branch_at", str(options.branch_at)]
    pipeline = open_ensemble(get_unc_synsets.get_parser().parse_args([*words, "--device", options.device]))
    calls, chains = [0], pipeline._chains([0], [0], pipeline.bases(0))
    counted = {name: Counted(chains.pop(name), calls) for name in ("base", "members")}
    branch(**counted, **chains, only_first=True)
    return calls[0]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = get_parser().parse_args(argv)
    reference, slow = measure(options, *REFERENCE, options.seed)
    other, _ = measure(options, *REFERENCE, options.seed + 1)
    runs = [(sampler, steps) for sampler in options.samplers for steps in options.step_counts] + [REFERENCE]
    rows, numbers = [], []
    for sampler, steps in runs:
        mi, taken = (
            (reference, slow) if (sampler, steps) == REFERENCE else measure(options, sampler, steps, options.seed)
        )
        number = {"sampler": sampler, "steps": steps, "evaluations": evaluations(options, sampler, steps)}
        number |= {"spearman": spearman(mi, reference), "seconds": taken, "mi": mi}
        numbers.append(number)
        rows.append({**number, "spearman": f"{number['spearman']:.3f}", "seconds": f"{taken:.2f}"})
        del rows[-1]["mi"]
    rows.append({"sampler": "DDIM, other noises", "steps": 200, "evaluations": "", "spearman": "", "seconds": ""})
    rows[-1]["spearman"] = f"{spearman(other, reference):.3f}"
    print(f"{options.path}: branch at {options.branch_at:g}, {options.n} noises a class")
    print(timing.table(rows))
    timing.report(options, rows, {"runs": numbers, "other_noises": spearman(other, reference)})
    return numbers


if __name__ == "__main__":
    run_script(main)
