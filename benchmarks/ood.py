"""Which score tells pictures of a law that a model does not know, on data sets that nothing was tuned on?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import stack_module_state
from torch.nn import functional as F

from ldm.benchmark.images import cut_photographs
from ldm.commands.line import run_file
from ldm.commands.uncertainty_ood import compare_sets
from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Target
from ldm.ensembles.members import MemberNetwork, Members
from ldm.evaluation.ood import Corruption, KnownPictures, NetworkReader, Readings
from ldm.evaluation.recognition import nearest_images
from ldm.experiments.small_networks import SmallTraining, draw_noised, read_digits
from ldm.laplace import LastLayerLaplace
from ldm.options import option
from ldm.records import Row, write_record
from ldm.report.ood import draw_aurocs
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import mean_interval
from ldm.util import generator

# Noise draws of a training image in the posterior's fit.
DRAWS = 4
Folder = Annotated[str | None, option(metavar="DIR", default="left out")]


@dataclass(frozen=True)
class OodStudy:
    """Score pictures that small networks do not know, under the protocol of `decu uncertainty ood`.

    A world is a seed and a digit that is held out: --members networks are trained from scratch on the training
    images of the other nine, the first is the backbone. Known are the nine digits' test images. Unknown are the digit
    that was held out, and at 8x8: test digits turned by 90 degrees, with contrast inverted, and with pixels shuffled;
    grey patches of scikit-learn's two photographs; and, where folders are given, MNIST, Omniglot (ink bright, as in the
    digits) and CIFAR-10. Ten levels 0.1 to 5, one level 0.5; the condition is the class of the nearest training image.
    Intervals are Student's over worlds.

    Examples:
      python -m benchmarks.ood --out results/ood_study
      python -m benchmarks.ood --mnist data/mnist --omniglot data/omniglot --cifar data/cifar10 --out results/ood_study

    Writes {out}/ood.csv, worlds.csv, ood.png, record.json.
    """

    out: str
    """The folder of the tables and the figure."""
    seeds: int = 3
    """Seeds of trainings and noises."""
    digits: int = 3
    """Digits that are held out in each seed, one at a time, others in each seed."""
    members: int = 5
    """Networks of a world."""
    steps: int = SmallTraining.steps
    """Steps of each training."""
    n: int = 300
    """Pictures of each other data set."""
    mnist: Folder = None
    """The folder of MNIST's idx files."""
    omniglot: Folder = None
    """The folder of Omniglot's images_*.zip."""
    cifar: Folder = None
    """The folder of CIFAR-10, or a .zip of its pictures."""

    def run(self) -> list[Row]:
        """Train, score, print the table and write it."""
        begun = time.process_time()
        others = dict(self.read_others())
        worlds: list[Row] = []
        for seed in range(self.seeds):
            for number in range(self.digits):
                held = (seed + self.seeds * number) % 10
                rows = self.play(seed, held, others)
                worlds += [{"seed": seed, "held out": held, **row} for row in rows]
        table = summarise(worlds)
        seconds = time.process_time() - begun
        note = (
            f"{self.seeds} seeds x {self.digits} digits held out; backbone of 26,000 parameters, {self.members} "
            f"members; mean AUROC over worlds with Student's interval; {seconds:.0f} CPU s"
        )
        out = Path(self.out)
        print(markdown_table(table, 3), note, sep="\n")
        write_csv(out / "ood.csv", table, [note], overwrite=True)
        write_csv(out / "worlds.csv", worlds, overwrite=True)
        draw_aurocs(table, note, out / "ood.png")
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def play(self, seed: int, held: int, others: dict[str, Tensor]) -> list[Row]:
        """Return the AUROC of every score and set in the world of a seed without one digit."""
        images, labels = read_digits("train")
        kept = labels != held
        known_images, known_labels = images[kept], labels[kept]
        reader = self.make_reader(known_images, known_labels, seed, held)
        tests, test_labels = read_digits("test")
        whole = torch.cat([images, tests]), torch.cat([labels, test_labels])
        inside = tests[test_labels != held]
        sets = {"digit held out": whole[0][whole[1] == held], **change(inside, seed), **others}
        trained = known_images.reshape(-1, 1, 8, 8)
        corruption = Corruption.make(0.1, 5.0, 10, seed)

        def read(pictures: Tensor) -> Readings:
            places, _ = nearest_images(pictures.numpy(), trained.numpy())
            return reader.read(pictures, known_labels[torch.from_numpy(places)], range(len(pictures)), corruption)

        reference = KnownPictures(trained, read(trained), corruption.nearest(0.5), self.members)
        usual = inside.reshape(-1, 1, 8, 8)
        shaped = {name: own.reshape(-1, 1, 8, 8) for name, own in sets.items()}
        scored = {name: reference.score(own, read(own)) for name, own in shaped.items()}
        return compare_sets(reference.score(usual, read(usual)), scored, 0.05)

    def make_reader(self, images: Tensor, labels: Tensor, seed: int, held: int) -> NetworkReader:
        """Train the members on images [N, 64], and fit the posterior of the first one's last layer."""
        recipe = SmallTraining(self.steps, target="v")
        chosen = torch.arange(len(images)).repeat(self.members, 1)
        networks = recipe.train(images, labels, chosen, 100 * seed + held)
        rows = torch.arange(len(images)).repeat_interleave(DRAWS)
        source = generator("fit", seed, held)
        laplace = LastLayerLaplace(networks[0], visits=recipe.visits(len(images)), chunk=256)
        laplace.fit([draw_noised(images[rows], labels[rows], source, "v")], draws=DRAWS)
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        stacked = {name: value.detach() for name, value in stack_module_state(networks)[0].items()}
        members = MemberNetwork(networks[0], Members(stacked), 20_000)
        taps = {"first block": "blocks.0", "second block": "blocks.1"}
        return NetworkReader(networks[0], CosineSchedule(), Target("v"), False, members, laplace, taps)

    def read_others(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and pictures [n, 1, 8, 8] in [-1, 1] of sets that do not depend on the world."""
        yield "photographs", cut_photographs((1, 8, 8), self.n, 0)
        if self.mnist is not None:
            from ldm.data.idx import MNIST

            yield "MNIST", shrink(MNIST(self.mnist, "test"), self.n)
        if self.omniglot is not None:
            from ldm.data.omniglot import Omniglot

            yield "Omniglot", brighten(shrink(Omniglot(self.omniglot, split="all"), self.n))
        if self.cifar is not None:
            from ldm.data.cifar import CIFAR10

            yield "CIFAR-10", shrink(CIFAR10(self.cifar, "test"), self.n)


def change(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Return images [N, 64] turned, inverted, and with pixels shuffled in each by an order of its own."""
    turned = images.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    order = torch.rand(images.shape, generator=generator("shuffled", seed)).argsort(1)
    return {"turned": turned, "inverted": -images, "shuffled": images.gather(1, order)}


def shrink(data: Any, n: int) -> Tensor:
    """Return n random pictures of a data set, grey, 8x8, [n, 1, 8, 8] in [-1, 1]."""
    chosen = torch.randperm(len(data), generator=generator("shrunk", 0))[:n].tolist()
    pictures = torch.stack([torch.as_tensor(data[place]["image"]).float().mean(-1) for place in chosen])
    return F.interpolate(pictures[:, None], (8, 8), mode="area")


def brighten(images: Tensor) -> Tensor:
    """Return pictures whose ink is bright: inverted where most of them are bright."""
    return -images if float(images.mean()) > 0 else images


def summarise(worlds: list[Row]) -> list[Row]:
    """Return a row for each set and score: mean and Student's interval over the worlds."""
    found: dict[tuple[Any, Any], list[Row]] = {}
    for row in worlds:
        found.setdefault((row["pictures"], row["score"]), []).append(row)
    table: list[Row] = []
    for (pictures, score), rows in found.items():
        told = mean_interval([float(row["auroc"]) for row in rows])  # type: ignore[arg-type]
        table.append(
            {
                "pictures": pictures,
                "score": score,
                "evaluations": rows[0]["evaluations"],
                "auroc": told.estimate,
                "low": max(0.0, told.low),
                "high": min(1.0, told.high),
                "flagged": float(np.mean([row["flagged"] for row in rows])),  # type: ignore[arg-type]
            }
        )
    return table


if __name__ == "__main__":
    run_file(OodStudy)
