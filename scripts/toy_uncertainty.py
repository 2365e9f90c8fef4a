"""Epistemic uncertainty where it is known: Gaussian classes in the plane, exact posteriors, no training.

Every class is seen at 0 to 1,000 observations. At states that the sampler visits, the true mutual information of the
branched step is compared with what ensembles say: PaiDE with KL, Bhattacharyya and squared W2 distances.

Examples:
  python scripts/toy_uncertainty.py --out results/toy
  python scripts/toy_uncertainty.py --out results/toy_m10 --members 10 --branch_t 500 --seed 1

Writes toy.png, toy.csv (a row a state) and record.json, and prints rank correlations.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step, ddim, vp_times
from ldm.diffusion.schedule import VPSchedule, make_betas
from ldm.experiments.toy_posterior import (
    GaussianMembers,
    NormalInverseGamma,
    as_states,
    bootstrap_members,
    step_information,
)
from ldm.records import write_record
from ldm.report.plots import Curve
from ldm.report.tables import write_csv
from ldm.report.toy import Growth, PlaneMap, Scatter, toy_figure
from ldm.stats import spearman
from ldm.uncertainty.branch import branch, branch_index
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.util import generator

# Columns of the table that estimate the truth, and how they are named in words.
ESTIMATES = {
    "kl": "PaiDE, KL",
    "monte_carlo": "the members' own (Monte Carlo)",
    "bhattacharyya": "PaiDE, Bhattacharyya",
    "wasserstein": "PaiDE, squared W2, eta = 0",
    "plain_kl": "PaiDE, KL, bootstrap without prior",
    "exact_kl": "PaiDE, KL, exact posterior draws",
}
DRAWN = ("kl", "bhattacharyya", "wasserstein", "plain_kl")
# The disc of a plane's Gaussian that holds 95 %: chi-squared with two degrees of freedom.
RADIUS_95 = math.sqrt(-2 * math.log(0.05))


class Toy(NamedTuple):
    """What all measurements share: schedule, times, branch step, the prior that classes are drawn from, the options."""

    schedule: VPSchedule
    times: Tensor
    at: int
    prior: NormalInverseGamma
    options: argparse.Namespace


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the picture, the table and the record")
    parser.add_argument("--members", type=int, default=5, help="members of the practical ensemble")
    parser.add_argument("--classes", type=int, default=12, help="classes, drawn from the prior")
    counts = {"type": int, "nargs": "+"}
    default = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    parser.add_argument("--observations", **counts, default=default, help="observations at which each class is seen")
    parser.add_argument("--states", type=int, default=8, help="branch states for each class and number of observations")
    parser.add_argument("--sizes", **counts, default=[2, 5, 10, 20, 50], help="ensemble sizes of the middle panel")
    parser.add_argument("--size_observations", **counts, default=[0, 1, 10, 100], help="observations of the same")
    parser.add_argument("--map_class", type=int, default=0, help="class of the maps")
    parser.add_argument("--map_observations", **counts, default=[2, 20, 200], help="observations of the maps")
    parser.add_argument("--map_size", type=int, default=81, help="pixels along a side of the maps")
    parser.add_argument("--map_distance", choices=("kl", "bhattacharyya"), default="kl", help="PaiDE of the maps")
    parser.add_argument("--draws", type=int, default=200, help="Monte-Carlo pairs of draws of each member")
    parser.add_argument("--steps", type=int, default=10, help="steps of the sampler")
    parser.add_argument("--eta", type=float, default=1.0, help="DDIM's noise, above 0 .. 1 the ancestral variance")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--unc_branch", type=int, help="step at which members part, 0 = noisiest")
    place.add_argument("--branch_at", type=float, help="the same as a fraction of the steps, 0 .. 1")
    place.add_argument("--branch_t", type=float, help="the same as a time: the first step with t <= this (200)")
    words = "points the prior's mean is worth", "shape of the precision's Gamma", "rate of the precision's Gamma"
    for name, value, text in zip(("kappa", "shape", "rate"), (0.05, 4.0, 1.0), words, strict=True):
        parser.add_argument(f"--prior_{name}", type=float, default=value, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of classes, observations, members, noise")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def open_toy(options: argparse.Namespace) -> Toy:
    """Build what the measurements share, and refuse options they cannot work with."""
    if options.members < 2 or min(options.sizes) < 2 or not 0 < options.eta <= 1:
        raise ValueError(
            f"expected --members and --sizes of at least 2 and 0 < --eta <= 1, got {options.members}, {options.sizes}, "
            f"{options.eta:g}: one member cannot disagree, and KL needs noise"
        )
    if options.states < 1 or not 0 <= options.map_class < options.classes:
        raise ValueError(f"expected --states of at least 1, --map_class from 0 to {options.classes - 1}")
    schedule = VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))
    times = vp_times(schedule, options.steps, "trailing")
    places = {"unc_branch": options.unc_branch, "branch_at": options.branch_at, "branch_t": options.branch_t}
    places = places if any(value is not None for value in places.values()) else {"branch_t": 200.0}
    at = branch_index(times, **places)
    if at == len(times) - 2:
        raise ValueError(f"step {at} of {options.steps} ends in clean data without noise: branch at an earlier one")
    mean = torch.zeros(2, dtype=torch.float64)
    prior = NormalInverseGamma(mean, options.prior_kappa, options.prior_shape, options.prior_rate)
    return Toy(schedule, times, at, prior, options)


def points_of(toy: Toy, label: int, count: int) -> tuple[GaussianMembers, Tensor]:
    """The class's true Gaussian (an ensemble of one) and its first `count` points [N, 2], nested over counts."""
    source = generator("toy", toy.options.seed, label)
    truth = toy.prior.draw(1, source)
    total = max(*toy.options.observations, *toy.options.map_observations, *toy.options.size_observations)
    return truth, truth.mean + truth.var.sqrt() * torch.randn(total, 2, generator=source, dtype=torch.float64)[:count]


def source_of(toy: Toy, purpose: str, label: int, count: int) -> torch.Generator:
    """Draws for one purpose, class and number of observations, whatever else is measured."""
    return generator("toy", toy.options.seed, purpose, label, count)


def branch_states(toy: Toy, members: GaussianMembers, label: int) -> Tensor:
    """States [B, 2, 1, 1] at which members part: member 0 walks there from noise."""
    noise = ImageNoise(toy.options.seed, tuple(label * toy.options.states + n for n in range(toy.options.states)))
    start = noise.initial((toy.options.states, 2, 1, 1)).double()
    base, together = members.single(toy.schedule, 0), members.denoiser(toy.schedule)
    walk = {"only_first": True, "eta": toy.options.eta, "noise": noise}
    return branch(ddim, base, together, toy.schedule, start, toy.times, toy.at, **walk).state


def first_step(toy: Toy, members: GaussianMembers, state: Tensor, eta: float) -> Step:
    """The branched step of all members from one state."""

    def silent(index: int, shape: Any) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)

    return next(
        ddim(members.denoiser(toy.schedule), toy.schedule, state, toy.times, eta=eta, noise=silent, start=toy.at)
    )


def measure(toy: Toy, label: int, count: int) -> list[dict[str, Any]]:
    """One row a state: the truth and what each ensemble says of it."""
    options = toy.options
    _, points = points_of(toy, label, count)
    belief = toy.prior.posterior(points)
    members = bootstrap_members(points, toy.prior, options.members, source_of(toy, "bootstrap", label, count))
    states = branch_states(toy, members, label)
    step = first_step(toy, members, states, options.eta)
    sampled = monte_carlo_information(step.distribution, options.draws, source_of(toy, "draws", label, count))
    exact = belief.draw(options.members, source_of(toy, "exact", label, count))
    columns = {
        "truth": step_information(belief, toy.schedule, step.transition, states),
        "kl": mutual_information(step.distribution, "kl"),
        "monte_carlo": sampled.estimate,
        "monte_carlo_se": sampled.error,
        "bhattacharyya": mutual_information(step.distribution, "bhattacharyya"),
        "wasserstein": mutual_information(first_step(toy, members, states, 0.0).distribution, "wasserstein"),
        "exact_kl": mutual_information(first_step(toy, exact, states, options.eta).distribution, "kl"),
    }
    if count:
        source = source_of(toy, "plain", label, count)
        plain = bootstrap_members(points, toy.prior, options.members, source, anchored=False)
        columns["plain_kl"] = mutual_information(first_step(toy, plain, states, options.eta).distribution, "kl")
    values = {name: value.tolist() for name, value in columns.items()}
    values.setdefault("plain_kl", [None] * options.states)
    places = states.flatten(1).tolist()
    return [
        {"class": label, "observations": count, "state": n, "z1": z1, "z2": z2} | {k: v[n] for k, v in values.items()}
        for n, (z1, z2) in enumerate(places)
    ]


def growth(toy: Toy, count: int) -> Growth:
    """Information of ensembles of exact draws, mean over classes and states, and its truth."""
    informations, truths = [], []
    for label in range(toy.options.classes):
        belief = toy.prior.posterior(points_of(toy, label, count)[1])
        source = source_of(toy, "growth", label, count)
        members = belief.draw(max(toy.options.sizes), source)
        states = branch_states(toy, members, label)
        row = []
        for size in toy.options.sizes:
            step = first_step(toy, GaussianMembers(members.mean[:size], members.var[:size]), states, toy.options.eta)
            sampled = monte_carlo_information(step.distribution, max(8, 2 * toy.options.draws // size), source)
            row.append(sampled.estimate.mean().item())
        informations.append(row)
        truths.append(step_information(belief, toy.schedule, step.transition, states).mean().item())
    return Growth(toy.options.sizes, np.mean(informations, axis=0), float(np.mean(truths)))


def plane_map(toy: Toy, count: int) -> PlaneMap:
    """Truth and PaiDE of the practical ensemble over the plane around the class."""
    options, label, u = toy.options, toy.options.map_class, float(toy.times[toy.at])
    alpha, sigma = float(toy.schedule.alpha(u)), float(toy.schedule.sigma(u))
    truth, points = points_of(toy, label, count)
    centre = alpha * truth.mean[0]
    radius = RADIUS_95 * math.sqrt(alpha**2 * truth.var.item() + sigma**2)
    ramp = torch.linspace(-2, 2, options.map_size, dtype=torch.float64) * radius
    x, y = torch.meshgrid(ramp + centre[0], ramp + centre[1], indexing="xy")
    states = as_states(torch.stack([x, y], -1).flatten(0, 1))
    members = bootstrap_members(points, toy.prior, options.members, source_of(toy, "bootstrap", label, count))
    step = first_step(toy, members, states, options.eta)
    known = step_information(toy.prior.posterior(points), toy.schedule, step.transition, states, knots=60)
    guess = mutual_information(step.distribution, options.map_distance)
    maps = [values.reshape(options.map_size, -1).numpy() for values in (known, guess)]
    extent = (*(centre[0] + ramp[[0, -1]]).tolist(), *(centre[1] + ramp[[0, -1]]).tolist())
    title = f"{count} observation{'s' * (count != 1)}"
    return PlaneMap(title, *maps, extent, (alpha * points).numpy(), tuple(centre.tolist()), radius)


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each estimate: Spearman with the truth over all states, the mean of Spearman over states of classes with
    equal observations, and the mean ratio to the truth in logarithms."""
    result = {}
    for name, words in ESTIMATES.items():
        known = [row for row in rows if row[name] is not None]
        counts = sorted({row["observations"] for row in known})
        truth, values = (np.array([row[key] for row in known]) for key in ("truth", name))
        observed = np.array([row["observations"] for row in known])
        within = [spearman(truth[observed == n], values[observed == n]) for n in counts]
        positive = values > 0
        ratio = float(np.exp(np.mean(np.log(values[positive] / truth[positive]))))
        figures = {"spearman": spearman(truth, values), "spearman_within": float(np.nanmean(within)), "ratio": ratio}
        result[words] = {key: round(value, 4) for key, value in figures.items()}
    return result


def bracketed(rows: list[dict[str, Any]], errors: float = 4.0) -> float:
    """Share of states whose Monte-Carlo information lies between the closed forms, within standard errors."""
    names = ("bhattacharyya", "monte_carlo", "kl", "monte_carlo_se")
    low, middle, high, error = (np.array([row[name] for row in rows]) for name in names)
    return float(np.mean((low - errors * error <= middle) & (middle <= high + errors * error)))


def curves_of(rows: list[dict[str, Any]], counts: list[int]) -> dict[str, Curve]:
    """Means over classes and states against observations."""

    def mean(name: str, count: int) -> float:
        values = [row[name] for row in rows if row["observations"] == count]
        return math.nan if values[0] is None else float(np.mean(values))

    names = {"truth": "truth", **{name: ESTIMATES[name] for name in DRAWN}}
    return {words: Curve(counts, [mean(name, count) for count in counts]) for name, words in names.items()}


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    toy, out = open_toy(options), Path(options.out)
    taken = [name for name in ("toy.png", "toy.csv", "record.json") if (out / name).exists()]
    if taken and not options.overwrite:
        raise FileExistsError(f"{out} holds {', '.join(taken)}: choose another --out, or pass --overwrite")
    counts = sorted(set(options.observations))
    pairs = [(label, count) for count in counts for label in range(options.classes)]
    rows = [row for pair in tqdm(pairs, desc="classes x observations") for row in measure(toy, *pair)]
    growths = {f"{count} observations": growth(toy, count) for count in options.size_observations}
    figures, share = summarise(rows), bracketed(rows)

    u, s = float(toy.times[toy.at]), float(toy.times[toy.at + 1])
    comments = [
        f"step {toy.at} of {options.steps}, from t = {u:g} to {s:g}, eta {options.eta:g}; {options.members} members, "
        f"seed {options.seed}",
        "truth, kl, monte_carlo (and its standard error), bhattacharyya, plain_kl, exact_kl in nats; wasserstein is "
        "PaiDE of squared latent distances at eta 0; z in latent units",
        f"Monte Carlo between Bhattacharyya and KL (4 standard errors): {share:.2%} of {len(rows)} states",
    ]
    comments += [
        f"{name}: Spearman with the truth {part['spearman']:.3f}, among states of equal observations "
        f"{part['spearman_within']:.3f}; geometric mean ratio to it {part['ratio']:.2f}"
        for name, part in figures.items()
    ]
    write_csv(out / "toy.csv", rows, comments, options.overwrite)
    scatter = Scatter(
        *([row[key] for row in rows] for key in ("truth", options.map_distance, "observations")),
        title=f"every state: Spearman {figures[ESTIMATES[options.map_distance]]['spearman']:.2f}",
    )
    name = f"{ESTIMATES[options.map_distance]}\nbootstrap, {options.members} members"
    toy_figure(
        [plane_map(toy, count) for count in options.map_observations],
        curves_of(rows, counts),
        growths,
        scatter,
        out / "toy.png",
        options.members,
        name,
        options.overwrite,
    )
    sizes = {name: {"truth": part.truth, "information": part.information.tolist()} for name, part in growths.items()}
    write_record(out / "record.json", vars(options), options.overwrite, estimates=figures, bracketed=share, sizes=sizes)
    print("\n".join(comments[2:]))
    return out


if __name__ == "__main__":
    run_script(main)
