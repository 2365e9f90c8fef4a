"""What loss weights, averages, guidance, alignment and recipes for few images are worth, on digits that anyone has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from ldm.commands.line import run_file
from ldm.experiments.aligned_digits import AlignmentTrainings
from ldm.experiments.judged_digits import Judge
from ldm.experiments.recipe_samples import Measured, SampleStudy, list_ways
from ldm.experiments.recipes import LAST, WIDTH, DigitBank, RecipeResult, RecipeTraining, SmallRecipe
from ldm.experiments.small_networks import read_mnist
from ldm.options import option
from ldm.records import Row, write_record
from ldm.report.recipes import draw_recipes
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import Interval, mean_interval

PARTS = ("small_data", "averages", "weights", "guidance", "alignment")
PLAIN = SmallRecipe()
PLAIN_NAME = "plain"
# What may help where there are few images.
SMALL_DATA = {
    PLAIN_NAME: PLAIN,
    "a quarter of the rate": replace(PLAIN, rate=PLAIN.rate / 4),
    "dropout 0.2": replace(PLAIN, dropout=0.2),
    "augmented": replace(PLAIN, augmented=True),
}
WEIGHTS = ("simple", "min_snr", "soft_min_snr", "p2", "edm", "sigmoid")
WIDTHS = (0.02, 0.05, 0.1, 0.15, 0.25)
MNIST_SIDE = 16


@dataclass(frozen=True)
class RecipeStudy:
    """Train small digits networks that differ in one thing, and measure their samples and their held-out loss.

    The networks are perceptrons that regress v, of 27,000 parameters at the width 64 on scikit-learn's digits, all
    trained in one pass; alignment is of a small DiT, trained by `decu train`. FD is the Frechet distance to all
    digits, or to MNIST's 10,000 test images, in the features of a classifier of them (of MNIST's training images);
    precision and recall are taken there too; "recognised" is the share of samples that it takes for their class. The
    held-out loss is the mean squared error of v on the test split. Where nothing else is said, weights are averages of
    width 0.1, and samples are drawn without guidance by DDIM. A seed draws the weights, the order, the noises, and
    which images a small number of them is. Intervals are Student's over seeds; differences are paired, seed by seed.

    Examples:
      python -m benchmarks.recipes --out results/recipes
      python -m benchmarks.recipes --out results/mnist --mnist data/mnist --width 256 --parts weights averages guidance

    Writes {out}/: small_data.csv, averages.csv, weights.csv, guidance.csv, alignment.csv, pictures, record.json.
    """

    out: str
    """The folder of everything."""
    seeds: int = 3
    """Seeds of the perceptrons."""
    steps: int = 1000
    """Steps of their trainings, of 64 images."""
    width: int = 64
    """Width of the perceptrons."""
    mnist: Annotated[str | None, option(metavar="DIR", default="scikit-learn's digits, 8x8")] = None
    """The folder of MNIST, which is taken at 16x16 in place of the digits."""
    per_class: tuple[int, ...] = (5, 20, 0)
    """Images of each class in the sets of images; 0: all, about 144 of the digits."""
    parts: tuple[str, ...] = PARTS
    """The tables that are made: small_data, averages, weights, guidance, alignment."""
    recipes: tuple[str, ...] = tuple(SMALL_DATA)
    """What is tried on few images, beside stopping early."""
    n: int = 400
    """Samples of a measurement."""
    sampler_steps: int = 20
    """Steps of DDIM."""
    transformer_seeds: int = 3
    """Seeds of the transformers."""
    transformer_steps: int = 600
    """Steps of their trainings, of 32 images."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.transformer_seeds) < 2:
            raise ValueError(f"an interval takes 2 seeds or more, got {self.seeds} and {self.transformer_seeds}")
        wrong = sorted({*self.parts} - {*PARTS} | {*self.recipes} - {*SMALL_DATA})
        if wrong or PLAIN_NAME not in self.recipes:
            raise ValueError(
                f"--parts takes {', '.join(PARTS)}, and --recipes {', '.join(SMALL_DATA)}, {PLAIN_NAME} among them; "
                f"got {wrong or list(self.recipes)}"
            )
        if self.mnist and "small_data" in self.parts and "augmented" in self.recipes:
            raise ValueError("--mnist has no augmented versions: leave augmented out of --recipes")

    def run(self) -> dict[str, list[Row]]:
        """Train, measure, print and write; return the tables."""
        begun = time.process_time()
        real = self.over_seeds(lambda seed: self.study.measure_real(seed)["frechet"])
        note = (
            f"{self.seeds} seeds, {self.steps} steps of 64 images, {self.n} samples; as many real digits have an FD of "
            f"{real.estimate:.3g} [{real.low:.3g}, {real.high:.3g}]"
        )
        made: dict[str, Callable[[], list[Row]]] = {
            "small_data": self.compare_small_data,
            "averages": self.compare_averages,
            "weights": self.compare_weights,
            "guidance": self.compare_guidance,
            "alignment": self.compare_alignment,
        }
        tables = {}
        for name in self.parts:
            tables[name] = made[name]()
            print(name, markdown_table(tables[name], 3), sep="\n", flush=True)
            write_csv(self.folder / f"{name}.csv", tables[name], [note], overwrite=True)
            print(f"{time.process_time() - begun:.0f} CPU s", flush=True)
        draw_recipes(tables, self.folder, note)
        seconds = time.process_time() - begun
        print(note, f"{seconds:.0f} CPU s", sep="; ")
        write_record(self.folder / "record.json", self, overwrite=True, note=note, cpu_seconds=seconds)
        return tables

    # What is shared

    @property
    def folder(self) -> Path:
        """The folder of everything."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def study(self) -> SampleStudy:
        """What draws samples and measures them."""
        if self.mnist is None:
            return SampleStudy(Judge.make(), self.n, self.sampler_steps)
        images, labels = read_mnist(self.mnist, "train", MNIST_SIDE)
        judge = Judge.train(images, labels, read_mnist(self.mnist, "test", MNIST_SIDE)[0], epochs=2)
        return SampleStudy(judge, self.n, self.sampler_steps, (images, labels))

    @cached_property
    def measured(self) -> dict[tuple[SmallRecipe, object, int], Measured]:
        """What was measured of a recipe, of the state that was taken, and of a seed."""
        return {}

    @cached_property
    def trained(self) -> dict[float, RecipeResult]:
        """The networks of all recipes and seeds, by their rate."""
        tried = [SMALL_DATA[name] for name in self.recipes] if "small_data" in self.parts else [PLAIN]
        recipes = [replace(one, per_class=count) for count in self.sizes.values() for one in tried]
        recipes += [PLAIN] if "guidance" in self.parts else []
        recipes += [replace(PLAIN, weight=name) for name in WEIGHTS] if "weights" in self.parts else []
        bank = DigitBank.read_mnist(self.mnist, MNIST_SIDE) if self.mnist else DigitBank.make()
        results = {}
        for rate in dict.fromkeys(recipe.rate for recipe in recipes):
            own = list(dict.fromkeys(recipe for recipe in recipes if recipe.rate == rate))
            pairs = [(recipe, seed) for recipe in own for seed in range(self.seeds)]
            results[rate] = RecipeTraining(bank, pairs, WIDTHS, self.steps, width=self.width).run(0, rate)
        return results

    @property
    def sizes(self) -> dict[str, int | None]:
        """The numbers of images of a class by the number of all images."""
        return {str(10 * count or len(self.study.real[1])): count or None for count in self.per_class}

    def over_seeds(self, value: Callable[[int], float]) -> Interval:
        """Return the mean of a value of each seed."""
        return mean_interval([value(seed) for seed in range(self.seeds)])

    def collect(self, recipe: SmallRecipe, which: object = WIDTH) -> list[Measured]:
        """Return what is measured of each seed's samples."""
        found = []
        for seed in range(self.seeds):
            key = (recipe, which, seed)
            if key not in self.measured:
                network = self.trained[recipe.rate].network(recipe, seed, which)
                self.measured[key] = self.study.measure(seed, network)
            found.append(self.measured[key])
        return found

    # Tables

    def compare_small_data(self) -> list[Row]:
        """Return a row for each number of images and recipe."""
        rows = []
        for images, count in self.sizes.items():
            recipes = {name: replace(SMALL_DATA[name], per_class=count) for name in self.recipes}
            cases = {name: (recipe, WIDTH) for name, recipe in recipes.items()}
            cases["plain, stopped early"] = (recipes["plain"], "best")
            found = {name: self.collect(*case) for name, case in cases.items()}
            losses = {name: self.collect_losses(*case) for name, case in cases.items()}
            for name, (recipe, _) in cases.items():
                result = self.trained[recipe.rate]
                steps = [float(result.best_step(recipe, seed)) for seed in range(self.seeds)]
                row: Row = {"images": images, "recipe": name, **describe("FD", pick(found[name], "frechet"))}
                row |= contrast("FD", pick(found[name], "frechet"), pick(found["plain"], "frechet"))
                row |= describe("held-out loss", losses[name])
                row |= contrast("held-out loss", losses[name], losses["plain"])
                for column in ("precision", "recall", "recognised"):
                    row[column] = mean_interval(pick(found[name], column)).estimate
                rows.append({**row, "best step": mean_interval(steps).estimate})
        return rows

    def collect_losses(self, recipe: SmallRecipe, which: object) -> list[float]:
        """Return the held-out loss of each seed, at the end or the least."""
        result = self.trained[recipe.rate]
        return [result.loss(recipe, seed, best=which == "best") for seed in range(self.seeds)]

    def compare_averages(self) -> list[Row]:
        """Return a row for each number of images and width of the average; 0 stands for the last weights."""
        rows = []
        for images, count in self.sizes.items():
            recipe = replace(PLAIN, per_class=count)
            found = {width: pick(self.collect(recipe, width or LAST), "frechet") for width in (0.0, *WIDTHS)}
            for width, values in found.items():
                row = {"images": images, "width": width, **describe("FD", values)}
                rows.append(row | contrast("FD", values, found[0.0]))
        return rows

    def compare_weights(self) -> list[Row]:
        """Return a row for each loss weight, half-way and at the end."""
        rows = []
        for part in (2, 4):
            step = part * max(1, self.steps // 4)
            found = {name: self.collect(replace(PLAIN, weight=name), (step, WIDTH)) for name in WEIGHTS}
            for name, values in found.items():
                row: Row = {"step": step, "loss weight": name, **describe("FD", pick(values, "frechet"))}
                row |= contrast("FD", pick(values, "frechet"), pick(found["simple"], "frechet"))
                row["recognised"] = mean_interval(pick(values, "recognised")).estimate
                rows.append(row)
        return rows

    def compare_guidance(self) -> list[Row]:
        """Return a row for each way of guidance and scale; the networks of all seeds are the members of MI."""
        result = self.trained[PLAIN.rate]
        networks = [result.network(PLAIN, seed) for seed in range(self.seeds)]
        early = [result.network(PLAIN, seed, (self.steps // 4, WIDTH)) for seed in range(self.seeds)]
        rows = []
        base: list[Measured] = []
        for way in (None, *list_ways()):
            values = [self.study.measure(seed, networks[seed], way, early[seed]) for seed in range(self.seeds)]
            base = base or values
            row: Row = {"guidance": way.name if way else "none", "scale": float(way.rule.scale) if way else 1.0}
            row |= describe("FD", pick(values, "frechet"))
            row |= contrast("FD", pick(values, "frechet"), pick(base, "frechet"))
            row |= describe("recall", pick(values, "recall")) | describe("precision", pick(values, "precision"))
            row["recognised"] = mean_interval(pick(values, "recognised")).estimate
            rows.append(row | describe("MI", self.study.information(networks, way, early[0]).tolist()))
        return rows

    def compare_alignment(self) -> list[Row]:
        """Return a row for the transformer with and without alignment, at equal steps."""
        side = MNIST_SIDE if self.mnist else 8
        trainings = AlignmentTrainings(self.folder, self.transformer_steps, 32, self.mnist, side)
        found = {}
        for name, aligned in {"plain": False, "aligned": True}.items():
            seeds = range(self.transformer_seeds)
            found[name] = [trainings.measure(aligned, seed, self.study.judge, self.n) for seed in seeds]
        rows = []
        for name, values in found.items():
            row: Row = {"training": name}
            for column, key in {"FD": "frechet", "recognised": "recognised", "recall": "recall"}.items():
                own, plain = pick(values, key), pick(found["plain"], key)
                row |= describe(column, own) | contrast(column, own, plain)
            rows.append(row)
        return rows


def pick(values: Iterable[Measured], key: str) -> list[float]:
    """Return one value of each seed."""
    return [one[key] for one in values]


def describe(name: str, values: Sequence[float]) -> Row:
    """Return the mean and its interval as columns."""
    found = mean_interval(values)
    return {name: found.estimate, f"{name} low": found.low, f"{name} high": found.high}


def contrast(name: str, own: Sequence[float], other: Sequence[float]) -> Row:
    """Return the mean paired difference and its interval as columns; empty of a row and itself."""
    columns = (f"{name} difference", f"{name} difference low", f"{name} difference high")
    if own == other:
        return dict.fromkeys(columns)
    found = mean_interval([one - two for one, two in zip(own, other, strict=True)])
    return dict(zip(columns, (found.estimate, found.low, found.high), strict=True))


if __name__ == "__main__":
    run_file(RecipeStudy)
