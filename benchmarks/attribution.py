"""Do attributions by the last layer's posterior foretell what trainings without the images do?"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from ldm.experiments.head_removals import Effects, HeadRemovals
from ldm.experiments.kronecker import gather_factors, influence, layer_gradients
from ldm.experiments.small_networks import (
    SmallNetwork,
    SmallTraining,
    draw_noised,
    read_digits,
    unstack_networks,
)
from ldm.laplace import LastLayerLaplace, Observation
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import mean_interval, rank_correlation
from ldm.util import generator

# Noise draws of each training image and of each query.
DRAWS = 4
QUERY_DRAWS = 16
# Removals that are held against refits: single images, and groups of images drawn at random.
SINGLE, GROUPS, GROUP_SIZE = 40, 20, 50
LAST = "out.1"
NEAREST = "nearest neighbour"
FIRST_ORDER = "last layer: K-FAC influence"


@dataclass(frozen=True)
class Foretold:
    """What a seed's attributions foretell of the halves, what came of them, and how exact removals are.

    Attributes:
        foretold: {attribution: of each base network [halves, Q]}.
        losses: of the queries after each training [halves, starts, Q].
        removals: {(what is removed, quantity, attribution): Spearman's correlation over removals of each query, and the
            relative error, of each base network}.
    """

    foretold: Mapping[str, list[NDArray]]
    losses: NDArray
    removals: Mapping[tuple[str, str, str], list[tuple[NDArray, float]]]

    def scores(self) -> dict[str, float]:
        """Return the linear datamodelling score of each attribution, mean over queries and base networks."""
        found = {name: _score(own, self.losses.mean(1)) for name, own in self.foretold.items()}
        if self.losses.shape[1] > 1:
            found["one start's losses, of the other's"] = _score([self.losses[:, 0]], self.losses[:, 1:].mean(1))
        return found


@dataclass(frozen=True)
class AttributionStudy:
    """Hold attributions against networks that were trained from scratch on random halves of the images.

    A linear datamodelling score (Ilyas et al. 2022; Zheng et al. 2024 for diffusion) is Spearman's correlation over
    halves of what an attribution adds up to over the images that a half leaves out, with the loss of a query after
    training on the half; here its mean over queries. Attributions are made from --bases networks trained on all images,
    one after the other. Each seed has its own halves, networks and noises; intervals are Student's over seeds. The
    network is that of `benchmarks/width.py`.

    Removals of 40 images, of the ten classes, and of 20 random groups of 50 images from the last layer's regression are
    held against regressions fitted from nothing without them: Spearman's correlation over removals for each query.

    Examples:
      python -m benchmarks.attribution --out results/attribution

    Writes {out}/networks_{seed}.safetensors (kept for another call), scores.csv, removals.csv, record.json.
    """

    out: str
    """The folder of the networks and the tables."""
    halves: int = 24
    """Random halves of the training images."""
    starts: int = 2
    """Networks trained on each half, from other starts and noises."""
    bases: int = 2
    """Networks trained on all images, from which attributions are made."""
    queries: int = 32
    """Test images whose loss is foretold."""
    steps: int = 300
    """Steps of each training."""
    seeds: int = 3
    """Seeds of halves, trainings and noises."""
    seed: int = 0
    """The first seed."""

    def run(self) -> list[Row]:
        """Train what is missing, print the tables and write them; return the rows of scores.csv."""
        begun = time.process_time()
        played = [self.play(self.seed + number) for number in range(self.seeds)]
        table = summarise_scores([each.scores() for each in played])
        removals = summarise_removals(played)
        seconds = time.process_time() - begun
        note = (
            f"{self.seeds} seeds x {self.halves} halves x {self.starts} starts of {self.steps} steps, {self.bases} "
            f"bases, {self.queries} queries of {QUERY_DRAWS} draws; Student's intervals over seeds; {seconds:.0f} CPU s"
        )
        out = Path(self.out)
        for name, rows in {"scores": table, "removals": removals}.items():
            print(markdown_table(rows, 3))
            write_csv(out / f"{name}.csv", rows, [note], overwrite=True)
        print(note)
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def play(self, seed: int) -> Foretold:
        """Return what a seed's attributions foretell, and what came of it."""
        networks, kept = self.load_networks(seed)
        losses = torch.stack([self.query_losses(network, seed) for network in networks[self.bases :]]).double()
        foretold: dict[str, list[NDArray]] = {}
        removals: dict[tuple[str, str, str], list[tuple[NDArray, float]]] = {}
        for number in range(self.bases):
            head = self.fit_head(networks[number], number, seed)
            found = self.attribute(networks[number], head, number, seed)
            for name, values in found.items():
                foretold.setdefault(name, []).append((~kept).double().numpy() @ values)  # [halves, Q]
            for name, agreement in hold_removals(head, found, seed).items():
                removals.setdefault(name, []).append(agreement)
        return Foretold(foretold, losses.unflatten(0, (self.halves, self.starts)).numpy(), removals)

    def load_networks(self, seed: int) -> tuple[list[SmallNetwork], Tensor]:
        """Return base networks, then those of the halves; and which images each half keeps [halves, N]."""
        file = Path(self.out) / f"networks_{seed}.safetensors"
        images, labels = read_digits("train")
        size = len(images)
        source = generator("halves of the images", seed)
        orders = torch.stack([torch.randperm(size, generator=source) for _ in range(self.halves)])
        chosen = orders[:, : size // 2]
        kept = torch.zeros(self.halves, size, dtype=torch.bool).scatter_(1, chosen, True)
        if not file.exists():
            whole = torch.arange(size).repeat(self.bases, 1)
            recipe = SmallTraining(self.steps)
            trained = recipe.train(images, labels, whole, 2 * seed)
            trained += recipe.train(images, labels, chosen.repeat_interleave(self.starts, 0), 2 * seed + 1)
            save_tensors(stack_module_state(trained)[0], file, {}, overwrite=True)
        return unstack_networks(load_state_dict(file)), kept

    def query_rows(self, seed: int) -> Observation:
        """Return the rows of the queries, QUERY_DRAWS to each test image."""
        images, labels = read_digits("test")
        chosen = (torch.arange(self.queries) * len(images) // self.queries).repeat_interleave(QUERY_DRAWS)
        return draw_noised(images[chosen], labels[chosen], generator("queries", seed))

    @torch.no_grad()
    def query_losses(self, network: SmallNetwork, seed: int) -> Tensor:
        """Return the mean squared error of each query [Q]."""
        rows = self.query_rows(seed)
        errors = (network(rows.x, rows.t, rows.cond) - rows.target).square().mean(1)
        return errors.unflatten(0, (self.queries, QUERY_DRAWS)).mean(1)

    @torch.no_grad()
    def fit_head(self, network: SmallNetwork, number: int, seed: int) -> HeadRemovals:
        """Fit the last layer's posterior of a base network to all images."""
        visits = max(1.0, SmallTraining(self.steps).visits(len(read_digits("train")[0])))
        laplace = LastLayerLaplace(network, visits=visits, chunk=256)
        seen = observe(number, seed)
        laplace.fit([seen], draws=DRAWS)
        laplace.optimize_sigma_noise()
        laplace.optimize_prior_precision()
        return HeadRemovals.of(laplace, seen, self.query_rows(seed), QUERY_DRAWS)

    def attribute(self, network: SmallNetwork, head: HeadRemovals, number: int, seed: int) -> dict[str, NDArray]:
        """Return, by each way, how much a query's loss rises without a training image [N, Q], larger: rises more."""
        images, _ = read_digits("train")
        tests, _ = read_digits("test")
        asked = tests[torch.arange(self.queries) * len(tests) // self.queries]
        effects = Effects(*map(torch.stack, zip(*(head.remove([place]) for place in range(len(images))), strict=True)))
        seen = observe(number, seed)
        own, queries = gradients(network, seen, DRAWS), gradients(network, self.query_rows(seed), QUERY_DRAWS)
        flat, flat_queries = (torch.cat([each.flatten(1) for each in part.values()], 1) for part in (own, queries))
        kernel = flat @ flat.T
        damped = kernel + kernel.diagonal().mean() * torch.eye(len(kernel))
        factors = gather_factors(network, [seen])
        by_layer = layer_gradients(network, own), layer_gradients(network, queries)
        product = flat @ flat_queries.T
        found = {
            "last layer: change of the loss": effects.loss,
            "last layer: certainty": effects.certainty,
            "last layer: mean": effects.mean,
            FIRST_ORDER: influence(factors, *by_layer, [LAST]),
            "whole network: K-FAC influence": influence(factors, *by_layer),
            "whole network: empirical Fisher": torch.linalg.solve(damped, product),
            "whole network: gradients' cosine": product / (flat.norm(dim=1)[:, None] * flat_queries.norm(dim=1)),
            NEAREST: -torch.cdist(images, asked),
            "chance": torch.rand(product.shape, generator=generator("chance", seed, number)),
        }
        return {name: value.double().numpy() for name, value in found.items()}


def observe(number: int, seed: int) -> Observation:
    """Return rows of the training images, DRAWS to an image, for base network `number`."""
    images, labels = read_digits("train")
    each = torch.arange(len(images)).repeat_interleave(DRAWS)
    return draw_noised(images[each], labels[each], generator("fit", seed, number))


def gradients(network: SmallNetwork, rows: Observation, draws: int) -> dict[str, Tensor]:
    """Return gradients of the loss of each image, mean over its draws, {parameter: [N, ...]}."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor, t: Tensor, label: Any, target: Tensor) -> Tensor:
        return (functional_call(network, own, (x, t, label)) - target).square().mean()

    one = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=256)
    return one(parameters, *(part.unflatten(0, (-1, draws)) for part in rows if part is not None))


@torch.no_grad()
def hold_removals(
    head: HeadRemovals, attributed: Mapping[str, NDArray], seed: int
) -> dict[tuple[str, str, str], tuple[NDArray, float]]:
    """Hold removals against fits from nothing: {(removed, quantity, attribution): (correlations [Q], error)}."""
    _, labels = read_digits("train")
    size = len(labels)
    drawn = [torch.randperm(size, generator=generator("groups", seed, k))[:GROUP_SIZE].tolist() for k in range(GROUPS)]
    removed = {
        "an image": [[place * size // SINGLE] for place in range(SINGLE)],
        "a class": [(labels == label).nonzero().flatten().tolist() for label in range(10)],
        f"{GROUP_SIZE} images at random": drawn,
    }
    found = {}
    for kind, groups in removed.items():
        exact, closed = ([way(group) for group in groups] for way in (head.fit_without, head.remove))
        summed = {name: np.stack([values[group].sum(0) for group in groups]) for name, values in attributed.items()}
        summed[NEAREST] = np.stack([attributed[NEAREST][group].mean(0) for group in groups])
        for quantity in ("loss", "certainty"):
            wanted, own = (
                torch.stack([getattr(effects, quantity) for effects in each]).numpy() for each in (exact, closed)
            )
            ways = {"closed form": own, NEAREST: summed[NEAREST]}
            ways |= {FIRST_ORDER: summed[FIRST_ORDER]} if quantity == "loss" else {}
            for name, values in ways.items():
                error = float(np.linalg.norm(values - wanted) / np.linalg.norm(wanted))
                found[kind, quantity, name] = (rank_correlation(values.T, wanted.T), error)
    return found


def summarise_scores(each: list[dict[str, float]]) -> list[Row]:
    """Return a row for each attribution: its score, and what it is above the nearest neighbour's, over seeds."""
    rows: list[Row] = []
    for name in each[0]:
        score = mean_interval([own[name] for own in each])
        above = mean_interval([own[name] - own[NEAREST] for own in each])
        row: Row = {"attribution": name, "score": score.estimate, "low": score.low, "high": score.high}
        rows.append(row | {"over nearest": above.estimate, "its low": above.low, "its high": above.high})
    return sorted(rows, key=lambda row: -float(row["score"]))  # type: ignore[arg-type]


def summarise_removals(played: list[Foretold]) -> list[Row]:
    """Return a row for each kind of removal, quantity and attribution: correlations and errors over seeds."""
    rows: list[Row] = []
    for removed, quantity, name in played[0].removals:
        own = [each.removals[removed, quantity, name] for each in played]
        agreement = mean_interval([np.mean([values for values, _ in each]) for each in own])
        rows.append(
            {
                "removed": removed,
                "of": quantity,
                "by": name,
                "rank correlation": agreement.estimate,
                "low": agreement.low,
                "high": agreement.high,
                "least of a query": float(min(values.min() for each in own for values, _ in each)),
                "relative error": None if name == NEAREST else max(error for each in own for _, error in each),
            }
        )
    return rows


def _score(foretold: list[NDArray], actual: NDArray) -> float:
    """Return Spearman's correlation over halves, averaged over queries and base networks."""
    return float(np.mean([rank_correlation(own.T, actual.T).mean() for own in foretold]))


if __name__ == "__main__":
    run_file(AttributionStudy)
