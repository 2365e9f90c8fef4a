"""Benchmarks of variances along a flow (or a diffusion): each against a truth found another way, as table rows.

fidelity       maps of every method against many sampled weights, held for the trajectory
consistency    does the total depend on the number of steps more than the truth's does?
calibration    predictive variances against refits of the last layer to bootstraps over images
alignment      the closed-form aleatoric map against actual squared errors on held-out images
data_scaling   epistemic variance against the number of images
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.ensembles.members import Members
from ldm.laplace import LastLayerLaplace, Refits, bootstrap_refits
from ldm.pipelines import ModelPipeline, PosteriorPipeline, chosen_positions, new_posterior, observations
from ldm.records import Row
from ldm.stats import mean_interval, rank_correlation
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.aleatoric import data_posterior
from ldm.uncertainty.propagation import all_directions, bayesdiff, sampled, tangents, trajectory_integral
from ldm.uncertainty.propagation.bayesflow import bayesflow
from ldm.util import generator

AGAIN = "as many other bootstraps"


@dataclass(frozen=True)
class Method:
    """A way to a variance map.

    Attributes:
        run: (posterior, labels, images) -> variances [B, c, h, w].
        evaluations: evaluations of the network for one image and n steps.
        published: whether it is the published method.
    """

    run: Callable[[PosteriorPipeline, Sequence[int], Sequence[int]], Tensor]
    evaluations: Callable[[int], int]
    published: bool = False


def at_steps(posterior: PosteriorPipeline, steps: int) -> PosteriorPipeline:
    """The same model and posterior with another number of steps."""
    return replace(posterior, pipeline=posterior.pipeline.with_(steps=steps))


def held(
    posterior: PosteriorPipeline, members: Members, labels: Sequence[int], images: Sequence[int], derivative: bool
):
    """`sampled` or `tangents` with given members along the pipeline sampler."""
    pipeline, model = posterior.pipeline, posterior.pipeline.model
    where = (model.network, members, model.schedule, posterior.initial(images), pipeline.times)
    chunk = max(1, posterior.chunk // len(images)) if derivative else posterior.chunk
    propagate = tangents if derivative else sampled
    return propagate(pipeline.sampler, posterior.build(labels), *where, chunk=chunk, noise=posterior.noise(images))


def _drawn(count: int, derivative: bool) -> Callable[..., Tensor]:
    def run(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> Tensor:
        members = posterior.laplace.sample(count, generator("method", posterior.pipeline.sampling.seed, count))
        return held(posterior, members, labels, images, derivative).var

    return run


def _recursion(particles: int, form: str) -> Callable[..., Tensor]:
    def run(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> Tensor:
        denoiser, source = posterior.predictive(labels), generator("particles", posterior.pipeline.sampling.seed)
        *_, last = bayesdiff(posterior.plain(labels, images), denoiser, particles=particles, source=source, form=form)
        return last.var

    return run


def _bayesflow(particles: int, frozen: bool) -> Callable[..., Tensor]:
    def run(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> Tensor:
        source = generator("particles", posterior.pipeline.sampling.seed)
        start = (posterior.predictive(labels), posterior.initial(images), posterior.pipeline.times)
        *_, last = bayesflow(*start, particles=particles, source=source, frozen_time=frozen)
        return last.var

    return run


def _path(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> Tensor:
    denoiser, pipeline = posterior.predictive(labels), posterior.pipeline
    where = (pipeline.model.schedule, posterior.initial(images), pipeline.times)
    return trajectory_integral(pipeline.sampler(denoiser, *where, noise=posterior.noise(images)), denoiser)


def _every_direction(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> Tensor:
    return held(posterior, all_directions(posterior.laplace), labels, images, True).var


BENCHMARKED_METHODS = {
    "tangents, every direction": Method(_every_direction, lambda n: 0),
    "tangents, K = 32": Method(_drawn(32, True), lambda n: n * (2 + 32)),
    "tangents, K = 8": Method(_drawn(8, True), lambda n: n * (2 + 8)),
    "sampled weights, K = 32": Method(_drawn(32, False), lambda n: n * (1 + 32)),
    "fresh weights, total variance, S = 10": Method(_recursion(10, "total"), lambda n: n + 3 + 10 * (n - 1)),
    "BayesFlow as published, S = 100": Method(_bayesflow(100, False), lambda n: n + 100 * (n - 1), True),
    "BayesFlow as published, frozen time": Method(_bayesflow(100, True), lambda n: n + 100 * (n - 1), True),
    "gamma^2 along the path": Method(_path, lambda n: n),
}


def truth(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int], count: int) -> Tensor:
    """Variance over `count` sampled weights, drawn apart from those of the methods."""
    members = posterior.laplace.sample(count, generator("truth", posterior.pipeline.sampling.seed))
    return held(posterior, members, labels, images, False).var


def applicable(posterior: PosteriorPipeline) -> Iterator[tuple[str, Method]]:
    """The methods that the loaded model's schedule knows."""
    flow = posterior.pipeline.model.schedule.field == "velocity"
    yield from (
        (name, method) for name, method in BENCHMARKED_METHODS.items() if flow or not name.startswith("BayesFlow")
    )


def fidelity(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int], draws: int = 128) -> list[Row]:
    """Maps of every method against the truth of `draws` weights; see `Agreement` for the columns."""
    exact = truth(posterior, labels, images, draws)
    rows = []
    for name, method in applicable(posterior):
        found = method.run(posterior, labels, images)
        rows.append({"method": name, "published": method.published, **agreement(found, exact).row()})
    return rows


def consistency(
    posterior: PosteriorPipeline,
    labels: Sequence[int],
    images: Sequence[int],
    steps: tuple[int, int] = (10, 40),
    draws: int = 64,
    methods: Sequence[str] = ("tangents, K = 32", "BayesFlow as published, S = 100"),
) -> list[Row]:
    """Total variance with many steps over that with few, and that ratio over the truth's (1 is consistent)."""
    few, many = (at_steps(posterior, count) for count in steps)
    exact = [float(truth(each, labels, images, draws).sum()) for each in (few, many)]
    rows = [{"method": f"truth, K = {draws}", "published": False, "ratio": exact[1] / exact[0], "over_truth": 1.0}]
    for name in methods:
        totals = [float(BENCHMARKED_METHODS[name].run(each, labels, images).sum()) for each in (few, many)]
        ratio = totals[1] / totals[0]
        over = ratio / rows[0]["ratio"]
        rows.append(
            {"method": name, "published": BENCHMARKED_METHODS[name].published, "ratio": ratio, "over_truth": over}
        )
    return rows


def published_posterior(laplace: LastLayerLaplace) -> LastLayerLaplace:
    """BayesFlow's: diagonal empirical Fisher, doubled, of all images once, sigma_noise and prior precision 1."""
    other = laplace.with_curvature("ef", published_ef=True)
    other.sigma_noise, other.prior_precision = 1.0, 1.0
    return other


def calibration(
    pipeline: ModelPipeline, train: Dataset, held_out: Dataset, *, draws: int = 4, count: int = 60, tests: int = 200
) -> list[Row]:
    """Predictive variances of posteriors on held-out states over those of `count` bootstraps over images.

    All see the same `draws` noises of every image, which are as often as it counts: the width asked for is that of
    refits, not of the model's training. `ratio` is of the mean variances, `overall` Spearman's correlation.
    The row AGAIN is as many bootstraps more in place of a posterior, r: what the draws leave of a correlation. A
    posterior without an error correlates about sqrt(r), since of the two only the bootstraps then carry noise.
    """
    seed = pipeline.sampling.seed
    laplace = new_posterior(pipeline, curvature="full", visits=draws)
    also = ("sandwich", "diag", "ef")
    laplace.fit(observations(pipeline.model, train, draws=draws, seed=seed), draws=draws, also=also)
    laplace.optimize_sigma_noise()
    laplace.optimize_prior_precision()
    batches = observations(pipeline.model, train, draws=draws, seed=seed)
    source = generator("bootstrap", seed)
    refits = bootstrap_refits(laplace, batches, images=len(train), draws=draws, count=2 * count, source=source)
    positions = chosen_positions(len(held_out), min(tests, len(held_out)), seed)
    states = list(observations(pipeline.model, held_out, positions, seed=seed + 1))
    features = torch.cat([laplace.features(state.x, state.t, state.cond) for state in states])
    exact, again = (Refits(laplace, part).variance(features) for part in refits.matrices.split(count))
    posteriors = {name: laplace.with_curvature(name) for name in ("full", "sandwich", "diag")}
    posteriors["published: doubled ef, sigma 1, prior 1"] = published_posterior(laplace)
    variances = {name: posterior.predict(features)[1] for name, posterior in posteriors.items()}
    rows = []
    for name, variance in {**variances, AGAIN: again}.items():
        found = agreement(variance, exact)
        own = {"ratio": found.total, "overall": found.overall}
        rows.append({"posterior": name, "published": name.startswith("published"), **own, "bootstraps": count})
    return rows


@torch.no_grad()
def error_alignment(
    pipeline: ModelPipeline, data: Dataset, shares: Sequence[float], *, count: int = 200, probes: int | None = None
) -> list[Row]:
    """The aleatoric map of held-out images against their squared errors |x_0 - E[x_0 | x]|^2.

    At each noise share sigma / (alpha + sigma): `pixel`, Spearman's correlation within images, mean and half the width
    of Student's 95 % interval over images; `ratio`, expected over actual squared error; `image`, Spearman's correlation
    of the images' sums; `negative`, clamped elements.
    """
    model, device = pipeline.model, pipeline.device
    positions = chosen_positions(len(data), min(count, len(data)), pipeline.sampling.seed)
    items = [data[position] for position in positions]
    batch = {model.first_stage_key: torch.stack([item[model.first_stage_key] for item in items]).to(device)}
    x0 = model.get_input(batch, model.first_stage_key)
    cond = None
    if pipeline.n_classes:
        cond = pipeline.labels([int(item[model.cond_stage_key]) for item in items])
    eps, denoiser = pipeline.noise(positions).initial(x0.shape).to(x0), model.denoiser(cond)
    rows = []
    for number, share in enumerate(shares):
        u = float(model.schedule.time_at(share / (1 - share)))
        x, source = model.schedule.noised(x0, eps, u), None if probes is None else generator("probes", number)
        found = data_posterior(denoiser, model.schedule, x, u, probes=probes, generator=source)
        errors = (found.mean - x0).square()
        variances = found.var.flatten(1).double().cpu().numpy()
        ranks = mean_interval(rank_correlation(variances, errors.flatten(1).double().cpu().numpy()))
        sums = errors.flatten(1).sum(1).double().cpu().numpy()
        images = rank_correlation(found.total.double().cpu().numpy(), sums)
        ratio = float(found.total.mean() / errors.flatten(1).sum(1).mean())
        own = {
            "pixel": ranks.estimate,
            "pixel_half": (ranks.high - ranks.low) / 2,
            "image": float(images),
            "ratio": ratio,
        }
        rows.append({"noise_share": share, **own, "negative": found.negative})
    return rows


def data_scaling(
    pipeline: ModelPipeline,
    train: Dataset,
    held_out: Dataset,
    parts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 3,
    draws: int = 4,
    tests: int = 100,
) -> list[Row]:
    """Mean predictive variance on held-out states when N / part images were seen; see `slope`.

    The backbone stays as trained; sigma and prior are those found with all images, so that the number alone changes.
    """
    seed = pipeline.sampling.seed
    whole = new_posterior(pipeline)
    whole.fit(observations(pipeline.model, train, draws=draws, seed=seed), draws=draws)
    whole.optimize_sigma_noise()
    whole.optimize_prior_precision()
    positions = chosen_positions(len(held_out), min(tests, len(held_out)), seed)
    states = list(observations(pipeline.model, held_out, positions, seed=seed + 1))
    features = torch.cat([whole.features(state.x, state.t, state.cond) for state in states])
    rows = []
    for part in parts:
        for repeat in range(1 if part == 1 else repeats):
            size = len(train) // part
            own = new_posterior(pipeline, sigma_noise=whole.sigma_noise, prior_precision=whole.prior_precision)
            chosen = chosen_positions(len(train), size, seed + repeat)
            own.fit(observations(pipeline.model, train, chosen, draws=draws, seed=seed), draws=draws)
            rows.append({"images": size, "repeat": repeat, "variance": float(own.predict(features)[1].mean())})
    return rows


def slope(rows: Sequence[Row]) -> float:
    """Slope of ln variance in ln images, by least squares."""
    logs = np.log([[row["images"], row["variance"]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
