"""Do attributions by the last layer's posterior foretell what trainings without the images do?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.commands.line import run_file
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, draw_noised, read_digits
from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.attribution import Refit, image_rows, remove_rows
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import rank_correlation
from ldm.util import generator

# Noise draws of each training image and of each query.
DRAWS = 4
QUERY_DRAWS = 16


@dataclass(frozen=True)
class AttributionStudy:
    """Hold attributions against networks that were trained from scratch on random halves of the images.

    A linear datamodelling score (Ilyas et al. 2022; Zheng et al. 2024 for diffusion) is Spearman's correlation over
    halves of what an attribution adds up to over the images that a half leaves out, with the loss of a query after
    training on the half; here its mean over queries, with a bootstrap interval over halves. Attributions are made from
    --bases networks trained on all images, one after the other. The network is that of `benchmarks/width.py`.

    Examples:
      python -m benchmarks.attribution --out results/attribution

    Writes {out}/networks.safetensors (kept for another call), scores.csv, record.json.
    """

    out: str
    """The folder of the networks and the table."""
    halves: int = 40
    """Random halves of the training images."""
    starts: int = 2
    """Networks trained on each half, from other starts and noises."""
    bases: int = 3
    """Networks trained on all images, from which attributions are made."""
    queries: int = 48
    """Test images whose loss is foretold."""
    steps: int = SmallTraining.steps
    """Steps of each training."""
    resamples: int = 200
    """Bootstrap resamples of the halves."""
    seed: int = 0
    """The seed of all draws."""

    def run(self) -> list[Row]:
        """Train what is missing, print the table and write it."""
        networks, kept = self.load_networks()
        begun = time.process_time()
        losses = torch.stack([self.query_losses(network) for network in networks[self.bases :]]).double()
        by_start = losses.unflatten(0, (self.halves, self.starts))
        scores: dict[str, list[NDArray]] = {}
        for number in range(self.bases):
            for name, values in self.attribute(networks[number], number).items():
                foretold = (~kept).double().numpy() @ values  # [halves, queries]
                scores.setdefault(name, []).append(foretold)
        actual = by_start.mean(1).numpy()
        table = [self.make_row(name, own, actual) for name, own in scores.items()]
        if self.starts > 1:
            table.append(self.make_row("one start's losses, of the other's", [by_start[:, 0].numpy()],
                                       by_start[:, 1:].mean(1).numpy()))  # fmt: skip
        seconds = time.process_time() - begun
        note = (
            f"{self.halves} halves x {self.starts} starts, {self.bases} bases, {self.queries} queries of {QUERY_DRAWS} "
            f"draws; {seconds:.0f} s of CPU time without the trainings"
        )
        print(markdown_table(table, 3), note, sep="\n")
        write_csv(Path(self.out) / "scores.csv", table, [note], overwrite=True)
        write_record(Path(self.out) / "record.json", self, overwrite=True)
        return table

    def make_row(self, name: str, foretold: list[NDArray], actual: NDArray) -> Row:
        """Return the score of an attribution: mean over queries and bases, with its interval over halves."""
        source = generator("halves", self.seed)
        count = len(actual)
        value = self.score(foretold, actual, np.arange(count))
        drawn = torch.randint(count, (self.resamples, count), generator=source).numpy()
        low, high = np.quantile([self.score(foretold, actual, rows) for rows in drawn], [0.025, 0.975])
        return {"attribution": name, "score": value, "low": float(low), "high": float(high)}

    def score(self, foretold: list[NDArray], actual: NDArray, rows: NDArray) -> float:
        """Return Spearman's correlation over halves, averaged over queries and base networks."""
        each = [rank_correlation(own[rows].T, actual[rows].T).mean() for own in foretold]
        return float(np.mean(each))

    def load_networks(self) -> tuple[list[SmallNetwork], Tensor]:
        """Return base networks, then those of the halves; and which images each half keeps [halves, N]."""
        file = Path(self.out) / "networks.safetensors"
        images, labels = read_digits("train")
        size = len(images)
        source = generator("halves of the images", self.seed)
        orders = torch.stack([torch.randperm(size, generator=source) for _ in range(self.halves)])
        chosen = orders[:, : size // 2]
        kept = torch.zeros(self.halves, size, dtype=torch.bool).scatter_(1, chosen, True)
        count = self.bases + self.halves * self.starts
        if not file.exists():
            whole = torch.arange(size).repeat(self.bases, 1)
            recipe = SmallTraining(self.steps)
            trained = recipe.train(images, labels, whole, self.seed)
            trained += recipe.train(images, labels, chosen.repeat_interleave(self.starts, 0), self.seed + 1)
            save_tensors(stack_module_state(trained)[0], file, {}, overwrite=True)
        stacked = load_state_dict(file)
        networks = [SmallNetwork().eval().requires_grad_(False) for _ in range(count)]
        for number, network in enumerate(networks):
            network.load_state_dict({name: value[number] for name, value in stacked.items()})
        return networks, kept

    def query_rows(self) -> Observation:
        """Return the rows of the queries, QUERY_DRAWS to each test image."""
        images, labels = read_digits("test")
        chosen = (torch.arange(self.queries) * len(images) // self.queries).repeat_interleave(QUERY_DRAWS)
        return draw_noised(images[chosen], labels[chosen], generator("queries", self.seed))

    @torch.no_grad()
    def query_losses(self, network: SmallNetwork) -> Tensor:
        """Return the mean squared error of each query [Q]."""
        rows = self.query_rows()
        errors = (network(rows.x, rows.t, rows.cond) - rows.target).square().mean(1)
        return errors.unflatten(0, (self.queries, QUERY_DRAWS)).mean(1)

    def observe(self, number: int) -> Iterator[Observation]:
        """Yield rows of the training images, DRAWS to an image."""
        images, labels = read_digits("train")
        source = generator("fit", self.seed, number)
        for part in torch.arange(len(images)).split(128):
            each = part.repeat_interleave(DRAWS)
            yield draw_noised(images[each], labels[each], source)

    def attribute(self, network: SmallNetwork, number: int) -> dict[str, NDArray]:
        """Return, by each way, how much a query's loss rises without a training image [N, Q], larger: rises more."""
        images, _ = read_digits("train")
        tests, _ = read_digits("test")
        asked = tests[torch.arange(self.queries) * len(tests) // self.queries]
        head = self.attribute_by_head(network, number)
        own, queries = self.gradients(network, number)
        norms = own.norm(dim=1)[:, None] * queries.norm(dim=1)
        kernel = own @ own.T
        damped = kernel + kernel.diagonal().mean() * torch.eye(len(kernel))
        shuffled = torch.rand(head["loss"].shape, generator=generator("chance", self.seed, number))
        return {
            "last layer: change of the loss": head["loss"].numpy(),
            "last layer: certainty": head["certainty"].numpy(),
            "last layer: mean": head["mean"].numpy(),
            "whole network: empirical Fisher": torch.linalg.solve(damped, own @ queries.T).double().numpy(),
            "gradients' cosine": (own @ queries.T / norms).double().numpy(),
            "nearest neighbour": -torch.cdist(images, asked).double().numpy(),
            "chance": shuffled.double().numpy(),
        }

    @torch.no_grad()
    def attribute_by_head(self, network: SmallNetwork, number: int) -> dict[str, Tensor]:
        """Return what removals from the last layer's regression do [N, Q]: to the loss, the mean, the variance."""
        visits = max(1.0, SmallTraining(self.steps).visits(len(read_digits("train")[0])))
        laplace = LastLayerLaplace(network, visits=visits, chunk=256)
        laplace.fit(self.observe(number), draws=DRAWS)
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        refit = Refit.of(laplace)
        rows = self.query_rows()
        q = (
            laplace.layer.patches(laplace.features(rows.x, rows.t, rows.cond)[:, None]).flatten(0, 1).double()
            @ refit.root
        )
        outputs = network(rows.x, rows.t, rows.cond).double()
        at_optimum = outputs + q @ torch.linalg.solve(refit.root, refit.change.T)
        errors = at_optimum - rows.target
        found: dict[str, list[Tensor]] = {"loss": [], "mean": [], "certainty": []}
        for each in image_rows(refit, self.observe(number)):
            removed = remove_rows(*each)
            moved = q @ removed.change
            risen = ((q @ removed.rise) * q).sum(1)
            loss = ((errors + moved).square() - errors.square()).mean(1)
            for name, value in (("loss", loss), ("mean", moved.square().mean(1)), ("certainty", risen)):
                found[name].append(value.unflatten(0, (self.queries, QUERY_DRAWS)).mean(1))
        return {name: torch.stack(values) for name, values in found.items()}

    def gradients(self, network: SmallNetwork, number: int) -> tuple[Tensor, Tensor]:
        """Return gradients of the loss in all parameters, of training images [N, D] and queries [Q, D]."""
        parameters = {name: value.detach() for name, value in network.named_parameters()}

        def loss(own: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor, target: Tensor) -> Tensor:
            return (functional_call(network, own, (x, t, label)) - target).square().mean()

        one = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))

        def of(rows: Any, draws: int) -> Tensor:
            shaped = [part.unflatten(0, (-1, draws)) for part in rows]
            found = one(parameters, *shaped)
            return torch.cat([value.flatten(1) for value in found.values()], 1)

        return torch.cat([of(rows, DRAWS) for rows in self.observe(number)]), of(self.query_rows(), QUERY_DRAWS)


if __name__ == "__main__":
    run_file(AttributionStudy)
