"""Does a posterior have the width of networks that were trained again, and does it keep it whatever the fit's draws?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import stack_module_state

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.commands.line import run_file
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, draw_noised, read_digits
from ldm.laplace import LastLayerLaplace, Observation, bootstrap_refits
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.uncertainty.agreement import agreement
from ldm.util import generator


@dataclass(frozen=True)
class Retraining:
    """The network whose posterior is asked for, and those that were trained again beside it.

    Attributes:
        base: trained on all images.
        bootstraps: each on as many images, drawn with replacement.
        repeats: each on the images themselves, from another start, in another order, with other noises.
    """

    base: SmallNetwork
    bootstraps: list[SmallNetwork]
    repeats: list[SmallNetwork]


@dataclass(frozen=True)
class WidthStudy:
    """Hold a posterior's width against networks trained again from scratch, and against other draws of its fit.

    A small network is trained on scikit-learn's digits, and --bootstraps more on images drawn with replacement, from
    starts of their own. Table 1: mean variance of `full` and `sandwich` on held-out rows by the draws of the fit, at
    the visits of the training and (as before there were visits) at as many as there are draws. Table 2: ratio and
    ranks of variances of held-out rows, against the networks trained again and against refits of the last layer.

    Examples:
      python benchmarks/width.py --out results/width

    Writes {out}/networks.safetensors (kept for another call), draws.csv, retraining.csv, record.json.
    """

    out: str
    """The folder of the networks and tables."""
    bootstraps: int = 40
    """Networks trained from scratch on images drawn with replacement, as many as there are."""
    repeats: int = 10
    """Networks trained from scratch on the images themselves: what start, order and noises do alone."""
    draws: tuple[int, ...] = (1, 2, 8, 32)
    """Noise draws of the fits of table 1; one tells no sandwich apart. The last are those of table 2."""
    tests: int = 64
    """Test images on which variances are compared, one draw of noise each."""
    steps: int = SmallTraining.steps
    """Steps of each training."""
    seed: int = 0
    """The seed of all draws."""

    @torch.no_grad()
    def run(self) -> dict[str, list[Row]]:
        """Train what is missing, print both tables and write them."""
        networks = self.load_networks()
        images, labels = read_digits("test")
        chosen = torch.arange(self.tests) * len(images) // self.tests
        rows = draw_noised(images[chosen], labels[chosen], generator("held out", self.seed))
        visits = SmallTraining(self.steps).visits(len(read_digits("train")[0]))
        note = f"{visits:.1f} visits; {describe_errors(networks.base)}"
        tables = {
            "draws": self.compare_draws(networks.base, rows),
            "retraining": self.compare_retraining(networks, rows),
        }
        for name, table in tables.items():
            print(markdown_table(table, 3))
            write_csv(Path(self.out) / f"{name}.csv", table, [note], overwrite=True)
        print(note)
        write_record(Path(self.out) / "record.json", self, overwrite=True)
        return tables

    def load_networks(self) -> Retraining:
        """Return the networks, trained where their file is not there."""
        file = Path(self.out) / "networks.safetensors"
        images, labels = read_digits("train")
        count = 1 + self.bootstraps + self.repeats
        if not file.exists():
            chosen = torch.arange(len(images)).repeat(count, 1)
            size = (self.bootstraps, len(images))
            chosen[1 : 1 + self.bootstraps] = torch.randint(
                len(images), size, generator=generator("bootstrap", self.seed)
            )
            with torch.enable_grad():
                trained = SmallTraining(self.steps).train(images, labels, chosen, self.seed)
            save_tensors(stack_module_state(trained)[0], file, {}, overwrite=True)
        stacked = load_state_dict(file)
        networks = [SmallNetwork().eval().requires_grad_(False) for _ in range(count)]
        for number, network in enumerate(networks):
            network.load_state_dict({name: value[number] for name, value in stacked.items()})
        return Retraining(networks[0], networks[1 : 1 + self.bootstraps], networks[1 + self.bootstraps :])

    def fit(self, network: SmallNetwork, draws: int) -> LastLayerLaplace:
        """Fit the sandwich's sums; sigma is that of the residuals, the prior precision that of the evidence."""
        visits = SmallTraining(self.steps).visits(len(read_digits("train")[0]))
        laplace = LastLayerLaplace(network, visits=visits, chunk=256)
        laplace.fit(self.observe(draws), draws=draws, also=["sandwich"])
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        return laplace

    def observe(self, draws: int) -> Iterator[Observation]:
        """Yield rows of the training images, `draws` to an image, other noises for other numbers of draws."""
        images, labels = read_digits("train")
        source = generator("fit", self.seed, draws)
        for part in torch.arange(len(images)).split(128):
            each = part.repeat_interleave(draws)
            yield draw_noised(images[each], labels[each], source)

    def compare_draws(self, network: SmallNetwork, rows: Observation) -> list[Row]:
        """Return table 1: mean variances over those of the last number of draws."""
        found: list[Row] = []
        for draws in self.draws:
            laplace = self.fit(network, draws)
            asked = {"": laplace.visits, ", 1 visit": 1.0, ", visits = draws": float(draws)}
            row: Row = {"draws": draws}
            for name in ("full", "sandwich"):
                for words, visits in asked.items():
                    if name == "full" or draws > 1 or visits == 1:  # one draw tells no sandwich apart
                        row[name + words] = self.mean_variance(laplace, name, visits, rows)
            found.append(row)
        last = dict(found[-1])
        over = [{name: row[name] / value if name in row else "" for name, value in last.items()} for row in found]
        return [{**row, "draws": draws} for draws, row in zip(self.draws, over, strict=True)]

    def mean_variance(self, laplace: LastLayerLaplace, curvature: str, visits: float, rows: Observation) -> float:
        """Return the mean variance of the outputs at rows."""
        own = laplace.with_curvature(curvature)
        own.visits = visits
        return float(own.predict(features_of(own, rows)).variance.mean())

    def compare_retraining(self, networks: Retraining, rows: Observation) -> list[Row]:
        """Return table 2: for each way to a variance, how it compares with networks trained again and with refits."""
        laplace = self.fit(networks.base, self.draws[-1])
        features = features_of(laplace, rows)
        images = len(read_digits("train")[0])
        source = generator("refits", self.seed)
        given = {"images": images, "draws": laplace.repeats, "count": self.bootstraps, "source": source}
        refits = bootstrap_refits(laplace, self.observe(laplace.repeats), **given).variance(features)
        again = spread(networks.bootstraps, rows)
        tempered = laplace.with_curvature("full")
        tempered.optimize_temperature()
        at_draws = laplace.with_curvature("sandwich")
        at_draws.visits = laplace.repeats
        ways = {
            "sandwich": laplace.with_curvature("sandwich").predict(features).variance,
            f"sandwich at {laplace.repeats} visits": at_draws.predict(features).variance,
            "full": laplace.predict(features).variance,
            f"full at temperature {tempered.temperature:.3g}": tempered.predict(features).variance,
            f"refits of the last layer, {self.bootstraps} bootstraps": refits,
            f"{self.repeats} trainings on the same images": spread(networks.repeats, rows),
            "half of the bootstraps trained again": spread(networks.bootstraps[::2], rows),
        }
        half = spread(networks.bootstraps[1::2], rows)
        found: list[Row] = []
        for name, variance in ways.items():
            trained = agreement(variance, half if name.startswith("half") else again)
            refitted = agreement(variance, refits)
            row: Row = {"variance": name, "over trained again": trained.total, "rank": trained.overall}
            row |= {"rank of rows": trained.image, "over refits": refitted.total, "rank, refits": refitted.overall}
            found.append(row)
        return found


def features_of(laplace: LastLayerLaplace, rows: Observation) -> Tensor:
    """Return what the last layer takes of rows."""
    return laplace.features(rows.x, rows.t, rows.cond)


def spread(networks: list[SmallNetwork], rows: Observation) -> Tensor:
    """Return the variance of the outputs of networks at the same rows [B, 64]."""
    return torch.stack([network(rows.x, rows.t, rows.cond) for network in networks]).double().var(0)


def describe_errors(network: SmallNetwork) -> str:
    """Say the mean squared error on training and test images, eight draws each."""
    said = []
    for split in ("train", "test"):
        images, labels = read_digits(split)
        rows = draw_noised(images.repeat(8, 1), labels.repeat(8), generator("errors"))
        said.append(f"{split} {float((network(rows.x, rows.t, rows.cond) - rows.target).square().mean()):.3f}")
    return f"squared error {', '.join(said)}"


if __name__ == "__main__":
    run_file(WidthStudy)
