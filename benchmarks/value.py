"""Does the predicted value of more images choose the class that it pays to collect? Trainings with them say."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.commands.line import run_file
from ldm.experiments.class_choices import CEILING, LAST_LAYER, Round, compare_rules, list_rounds
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, draw_noised, read_digits
from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.attribution import Refit, image_rows
from ldm.laplace.value import value_images
from ldm.records import Row, write_record
from ldm.report.plots import Curve, curve_plot
from ldm.report.tables import markdown_table, write_csv
from ldm.util import atomic_write, generator

# Noise draws of an image in a fit, and of a test image.
DRAWS = 4
TEST_DRAWS = 8
# Held-out images of each class, which choices may look at.
HELD = 20
# Images of the ten classes when a seed begins, in an order that the seed draws.
FIRST = (2, 3, 4, 6, 9, 13, 20, 28, 40, 56)


@dataclass(frozen=True)
class ValueStudy:
    """Choose a class of which --k more images are collected, round by round, and learn with those of every class.

    A seed begins with 2 to 56 images of the ten digits. In each round --bases networks are trained on the images that
    there are; every rule scores the ten classes by them and by held-out images (20 a class). Then the k next images of
    each class are really added: to the regression of the last layer of each base network, and in --trained_rounds of
    the rounds to --starts trainings from scratch. Their loss on the test images is what a choice brings. One class,
    drawn at random of those that have as many left and the same for all rules, is added before the next round.

    gain: how much lower the loss after the rule's choice is than the mean over all choices, in percent of it; regret:
    the gain of the best choice, minus the rule's. Of trainings the best one is that of one half of them, measured on
    the other half. Intervals are Student's over seeds.

    Examples:
      python -m benchmarks.value --out results/value_study

    Writes {out}/rounds_{seed}.json (kept for another call), value.csv, rounds.csv (all scores and losses), value.png,
    record.json.
    """

    out: str
    """The folder of the tables and the figure."""
    rounds: int = 20
    """Choices of a seed."""
    seeds: int = 5
    """First data sets, each with its own classes that have few images."""
    k: int = 10
    """Images that are added."""
    trained_rounds: int = 20
    """Rounds of a seed in which networks are trained from scratch, spread evenly."""
    starts: int = 2
    """Networks trained from scratch for each choice, an even number."""
    bases: int = 2
    """Networks by which rules choose."""
    steps: int = 150
    """Steps of each training."""
    batch: int = 32
    """Images of a step."""
    seed: int = 0
    """The first seed."""

    def run(self) -> list[Row]:
        """Choose, train, print the table and write it."""
        begun = time.process_time()
        by_seed = [self.load_rounds(self.seed + number) for number in range(self.seeds)]
        table = compare_rules(by_seed)
        seconds = time.process_time() - begun
        note = (
            f"{self.seeds} seeds x {self.rounds} rounds, {self.trained_rounds} with trainings from scratch; {self.k} "
            f"more images of one of ten classes; {self.starts} trainings a choice, {self.bases} networks to choose by; "
            f"gain and regret in percent of the loss; {seconds:.0f} CPU s"
        )
        print(markdown_table(table, 3), note, sep="\n")
        out = Path(self.out)
        write_csv(out / "value.csv", table, [note], overwrite=True)
        write_csv(out / "rounds.csv", list_rounds(by_seed, self.seed), overwrite=True)
        self.draw(by_seed, note, out / "value.png")
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def load_rounds(self, seed: int) -> list[Round]:
        """Return the rounds of a seed, of an earlier call where its file lies in the folder."""
        file = Path(self.out) / f"rounds_{seed}.json"
        if not file.exists():
            played = [asdict(each) for each in self.play(seed)]
            with atomic_write(file) as part:
                Path(part).write_text(json.dumps(played, default=lambda array: array.tolist()))
        content = json.loads(file.read_text())
        return [
            Round(
                np.array(each["head"]),
                None if each["losses"] is None else np.array(each["losses"]),
                {name: np.array(score) for name, score in each["scores"].items()},
            )
            for each in content
        ]

    def play(self, seed: int) -> Iterator[Round]:
        """Yield the rounds of a seed."""
        images, labels = read_digits("train")
        orders = []
        for label in range(10):
            own = (labels == label).nonzero().flatten()
            orders.append(own[torch.randperm(len(own), generator=generator("images", seed, label))])
        held = torch.cat([order[:HELD] for order in orders])
        counts = torch.tensor(FIRST)[torch.randperm(10, generator=generator("counts", seed))].tolist()
        trained = set(np.linspace(0, self.rounds, self.trained_rounds, endpoint=False).astype(int).tolist())
        for number in range(self.rounds):
            chosen = _choose(orders, counts)
            more = torch.stack([_choose(orders, _add(counts, label, self.k)) for label in range(10)])
            key = 1000 * seed + number
            yield self.play_round(images, labels, held, chosen, more, counts, key, number in trained)
            open_ones = [label for label in range(10) if HELD + counts[label] + 2 * self.k <= len(orders[label])]
            place = int(torch.randint(len(open_ones), (), generator=generator("taken", seed, number)))
            counts = _add(counts, open_ones[place], self.k)

    def play_round(
        self,
        images: Tensor,
        labels: Tensor,
        held: Tensor,
        chosen: Tensor,
        more: Tensor,
        counts: list[int],
        key: int,
        train: bool,
    ) -> Round:
        """Train, and let every rule score the classes.

        Args:
            held, chosen: positions of held-out images and of those that there are [N].
            more: those with k more of each class [10, N + k].
            key: of the draws.
            train: whether networks are trained from scratch with more images.
        """
        recipe = SmallTraining(self.steps, self.batch)
        bases = recipe.train(images, labels, chosen.repeat(self.bases, 1), 2 * key)
        losses = None
        if train:
            networks = recipe.train(images, labels, more.repeat_interleave(self.starts, 0), 2 * key + 1)
            losses = np.array([self.test_loss(network) for network in networks]).reshape(10, self.starts)
        share = self.k / (np.array(counts) + self.k)
        before = draw_noised(*_repeat(images, labels, held, DRAWS), generator("held", key))
        own = draw_noised(*_repeat(images, labels, chosen, DRAWS), generator("fit", key))
        outputs = torch.stack([network(before.x, before.t, before.cond) for network in bases])
        trained = torch.stack([network(own.x, own.t, own.cond) for network in bases])
        held_loss = _by_class((outputs - before.target).square().mean((0, 2)), before.cond)
        gap = held_loss - _by_class((trained - own.target).square().mean((0, 2)), own.cond)
        apart = _by_class(outputs.var(0).mean(1), before.cond)
        heads = [self.value_heads(network, own, before, images, labels, chosen, more, key) for network in bases]
        mean = {name: np.mean([head[name] for head in heads], 0) for name in heads[0]}
        scores = {
            "fewest images": -np.array(counts, dtype=float),
            "highest loss": held_loss,
            "loss above that of training, x k / (n + k)": gap * share,
            "members apart, x k / (n + k)": apart * share,
            "last layer: fall of the loss": mean["fall"],
            "last layer: fall of the information": mean["learned"],
        }
        return Round(mean["actual"], losses, scores)

    def value_heads(
        self,
        network: SmallNetwork,
        own: Observation,
        before: Observation,
        images: Tensor,
        labels: Tensor,
        chosen: Tensor,
        more: Tensor,
        key: int,
    ) -> dict[str, NDArray[np.float64]]:
        """Return what the last layer says of each class [10], and its test loss refitted with more images."""
        visits = max(1.0, SmallTraining(self.steps, self.batch).visits(len(chosen)))
        laplace = LastLayerLaplace(network, visits=visits, chunk=256)
        laplace.fit([own], draws=DRAWS)
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        refit = Refit.of(laplace)
        (found,) = value_images(refit, lambda: [before], before.cond[::DRAWS], [self.k])
        tests, test_labels = read_digits("test")
        each = torch.arange(len(tests))
        asked = draw_noised(*_repeat(tests, test_labels, each, DRAWS), generator("asked", key))
        rows, errors = _stack(refit, asked)
        actual = []
        for label, positions in enumerate(more):
            start = int((labels[chosen] <= label).sum())  # classes lie one after the other, new images last
            new = positions[start : start + self.k]
            added = draw_noised(*_repeat(images, labels, new, DRAWS), generator("added", key, label))
            gram, pull = _products(*_stack(refit, added))
            move = torch.linalg.solve(torch.eye(len(gram), dtype=gram.dtype) + gram, pull)
            actual.append(float((errors - rows @ move).square().sum() / errors.square().sum()))
        return {
            "fall": found.fall.mean(1).numpy(),
            "learned": found.learned.mean(1).numpy(),
            "actual": np.array(actual),
        }

    def test_loss(self, network: SmallNetwork) -> float:
        """Return the mean squared error on the test images, the same noises for every network."""
        tests, labels = read_digits("test")
        rows = draw_noised(*_repeat(tests, labels, torch.arange(len(tests)), TEST_DRAWS), generator("test", self.seed))
        return float((network(rows.x, rows.t, rows.cond) - rows.target).square().mean())

    def draw(self, by_seed: list[list[Round]], note: str, path: Path) -> None:
        """Draw what each rule has gained over random choice after each round by the refitted last layers, mean."""
        x = np.arange(1, self.rounds + 1)
        curves = {}
        for name in [*by_seed[0][0].scores, CEILING]:
            gains = [[100 * each.gain(name, LAST_LAYER) for each in rounds] for rounds in by_seed]
            curves[name] = Curve(x, np.cumsum(gains, 1).mean(0))
        curve_plot(curves, path, "rounds", "gain over random choice, summed (percent of the loss)",
                   "What the choice of a class brings a refitted last layer", note, legend="chosen by",
                   overwrite=True)  # fmt: skip


def _add(counts: list[int], label: int, k: int) -> list[int]:
    return [count + k * (place == label) for place, count in enumerate(counts)]


def _choose(orders: list[Tensor], counts: list[int]) -> Tensor:
    """Return positions of the first images of each class after the held-out ones, class by class [N]."""
    parts = []
    for label, (order, count) in enumerate(zip(orders, counts, strict=True)):
        if HELD + count > len(order):
            raise ValueError(f"class {label} has {len(order) - HELD} images to add, {count} were asked for: fewer --k")
        parts.append(order[HELD : HELD + count])
    return torch.cat(parts)


def _repeat(images: Tensor, labels: Tensor, chosen: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    each = chosen.repeat_interleave(draws)
    return images[each], labels[each]


def _by_class(values: Tensor, labels: Tensor) -> NDArray[np.float64]:
    return np.array([float(values[labels == label].mean()) for label in range(10)])


def _stack(refit: Refit, rows: Observation) -> tuple[Tensor, Tensor]:
    """Return whitened rows [n, K] and errors [n, C] of all images."""
    parts = list(image_rows(refit, [rows]))
    return torch.cat([part for part, _ in parts]), torch.cat([errors for _, errors in parts])


def _products(rows: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    return rows.T @ rows, rows.T @ errors


if __name__ == "__main__":
    run_file(ValueStudy)
