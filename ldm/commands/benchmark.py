"""`decu benchmark`: every method against an oracle, one table, one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ldm.commands.study_step import StudyStep
from ldm.commands.words import refuse_options
from ldm.options import option

_SECTIONS = {"benchmark", "benchmark_methods", "benchmark_data", "benchmark_rows"}

if TYPE_CHECKING:
    from ldm.benchmark.plan import BenchmarkPlan, PlannedCell
    from ldm.records import Row


@dataclass(frozen=True)
class BenchmarkMethods:
    """Compare ways to say what a diffusion model does not know, on equal terms and against a known truth.

    The truth is the variance, over networks trained from scratch on bootstrapped images, of a picture at fixed noise.
    Every method of the config is asked about the same pictures of the same networks; beside it stand controls that
    know nothing of weights, and the same question where all classes have all images. What is missing is trained; what
    exists is kept, so the same command again continues. Cells are named by --only, for the jobs of a cluster.

    Examples:
      decu benchmark --config configs/uncertainty/digits.yaml --out results/benchmark
      decu benchmark --config configs/uncertainty/digits.yaml --out results/benchmark --dry_run
      decu benchmark --config configs/uncertainty/digits.yaml --out results/quick benchmark.seeds=2 benchmark.steps=200
      decu benchmark --config mine.yaml --out results/mine --only few_0/deep-ensemble

    Words a.b=c change the config. Writes {out}/: networks/ and cells/ (a file each, with command, seed and cost),
    benchmark.csv and .json (a row for each method and benchmark, losers too), overview.csv, costs.csv, plane.csv,
    levels.csv, averaging.csv, pictures, record.json and page.html.
    """

    config: Annotated[str, option(metavar="YAML")]
    """The config: its sections benchmark, benchmark_methods, benchmark_rows and benchmark_data say what is compared."""
    out: str
    """The folder of networks, cells, tables and page."""
    only: Annotated[tuple[str, ...], option(metavar="CELL ...", default="all")] = ()
    """Make these cells alone, WORLD/NAME as --dry_run prints them, and no table."""
    dry_run: bool = False
    """Print what is missing and the estimated time, and run nothing."""
    changes: Annotated[tuple[str, ...], option(metavar="a.b=c ...", default="none")] = ()
    """Changes of the config; the words do without the option's name."""

    def add_words(self, words: Sequence[str]) -> BenchmarkMethods:
        """Return the command with words a.b=c over the config.

        Raises:
            ValueError: for any other word.
        """
        refuse_options(words, "a.b=c, which changes the config")
        return replace(self, changes=(*self.changes, *words))

    def run(self) -> Path:
        """Make the cells that are missing, then the tables; return the folder."""
        from ldm.jobs import shard_from_environment

        pending = self.choose_cells()
        if self.dry_run:
            self._print_plan(pending)
            return Path(self.out)
        self.plan.check_folder()
        rank, count = shard_from_environment()
        worlds = list(dict.fromkeys(cell.world for cell in self.plan.cells))  # a process trains a world's networks
        own = [cell for cell in pending if worlds.index(cell.world) % count == rank]
        began = time.monotonic()
        for number, cell in enumerate(own, 1):
            step = self.make_step(cell)
            minutes = (time.monotonic() - began) / 60
            print(f"[cell {number} of {len(own)}, after {minutes:.0f} minutes] {step.title}", flush=True)
            self.plan.make(cell, {"command": step.command})
        if not self.only:
            self._write_tables()
        return Path(self.out)

    def choose_cells(self) -> list[PlannedCell]:
        """Return the cells that are missing, of those asked for.

        Raises:
            ValueError: for a cell that is not in the plan.
        """
        cells = self.plan.cells
        known = {cell.key for cell in cells}
        wrong = [key for key in self.only if key not in known]
        if wrong:
            raise ValueError(f"there is no cell '{wrong[0]}'; --dry_run lists them, {cells[0].key} for example")
        return [cell for cell in cells if not cell.done and (not self.only or cell.key in self.only)]

    def make_step(self, cell: PlannedCell) -> StudyStep:
        """Return a cell as a step, with the command that makes it alone."""
        words = ["--config", self.config, "--out", self.out, "--only", cell.key, *self.changes]
        return StudyStep(f"{cell.name}, {cell.world.name}", "benchmark", words, cell.done)

    def _print_plan(self, pending: Sequence[PlannedCell]) -> None:
        """Print the commands of what is missing and how long they will take."""
        print("\n".join(self.make_step(cell).command for cell in pending))
        if not pending:
            print("nothing is missing but the tables")
            return
        for name, reason in self.plan.gaps.items():
            print(f"{name}: {reason}")
        minutes = self.plan.estimate(pending) / 60
        missing = f"{len(pending)} of {len(self.plan.cells)} cells are missing"
        print(f"{missing}; estimated: {minutes:.0f} minutes of one core")

    def _write_tables(self) -> None:
        """Write the tables and pictures of the seeds that are whole."""
        from ldm.benchmark.outcome import make_outcome
        from ldm.records import write_record
        from ldm.report.benchmark_page import write_outcome

        outcome = make_outcome(self.plan)
        write_outcome(outcome, Path(self.out))
        write_record(Path(self.out) / "record.json", self, overwrite=True, settings=self.plan.settings.as_dict())
        print("\n".join(outcome.sentences))

    @cached_property
    def plan(self) -> BenchmarkPlan:
        """What is compared, by the config."""
        from ldm.arguments import suggest_key
        from ldm.benchmark.images import read_benchmark_images
        from ldm.benchmark.method import UncertaintyMethod
        from ldm.benchmark.plan import BenchmarkPlan
        from ldm.benchmark.settings import read_settings
        from ldm.training.config import load_config, to_plain
        from ldm.util import instantiate_as

        read = to_plain(load_config([self.config], list(self.changes), needs=("benchmark", "benchmark_methods")))
        wrong = sorted(set(read) - _SECTIONS)
        if wrong:
            raise ValueError(f"a benchmark's config has no section '{wrong[0]}': {suggest_key(wrong[0], _SECTIONS)}")
        named: list[Row] = read["benchmark_methods"]
        methods: list[Any] = [
            instantiate_as(UncertaintyMethod, one, f"benchmark_methods[{number}]") for number, one in enumerate(named)
        ]
        rows = read.get("benchmark_rows") or []
        images = read_benchmark_images(read.get("benchmark_data"))
        return BenchmarkPlan(read_settings(read["benchmark"]), methods, Path(self.out), rows, images)
