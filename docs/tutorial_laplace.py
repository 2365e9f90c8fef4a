"""Tutorial: what a flow's last layer could as well have been, and what that means for its samples; then a diffusion's.

Runs whole (python docs/tutorial_laplace.py), or cell by cell in an editor that knows "# %%". It takes the newest runs
named digits-flow and digits-diffusion below logs/: docs/tutorial_flow.py trains them. Pictures go to
results/tutorial_laplace. Other folders: python docs/tutorial_laplace.py LOGS RESULTS
"""

# %% Set-up: where things are
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ldm.arguments import add_model_arguments, open_model
from ldm.images import heat_maps
from ldm.laplace import LastLayerLaplace, Observation
from ldm.pipelines import ModelPipeline, PosteriorPipeline, new_posterior, observations
from ldm.report.flow_plots import curves_by_class, interleaved, maps_by_method, walked
from ldm.training.runs import runs_named
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.aleatoric import data_posterior
from ldm.uncertainty.propagation.bayesflow import bayesflow
from ldm.util import instantiate_from_config

if len(sys.argv) not in (1, 3) or sys.argv[-1].startswith("-"):
    sys.exit(__doc__)
LOGS, RESULTS = map(Path, sys.argv[1:3] if len(sys.argv) == 3 else ("logs", "results/tutorial_laplace"))


def pipeline(name: str, steps: int) -> ModelPipeline:
    known = runs_named(LOGS, name) if LOGS.is_dir() else []
    if not known:
        sys.exit(f"error: no run named {name} in {LOGS}: python docs/tutorial_flow.py trains it")
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return open_model(parser.parse_args(["--run", str(known[-1].path), "--steps", str(steps)]))


flow, twin = pipeline("digits-flow", 10), pipeline("digits-diffusion", 50)
train, test = (instantiate_from_config(flow.config["data"]["params"][split]) for split in ("train", "validation"))


# %% Fit: the last layer is a linear regression on the network's features, so its posterior is one matrix, exactly
# observations() draws what the network was trained on: noisy states, times, labels and targets.
def rows(model: ModelPipeline) -> Iterator[Observation]:
    return observations(model.model, train, range(500), draws=2, seed=0)


def fitted(model: ModelPipeline) -> LastLayerLaplace:
    laplace = new_posterior(model, curvature="full").fit(rows(model), draws=2, data_size=len(train), also=("ef",))
    laplace.optimize_sigma_noise()  # from the residuals
    laplace.optimize_prior_precision()  # by the evidence, in closed form
    print(f"sigma {float(laplace.sigma_noise):.3f}, prior precision {laplace.prior_precision:.3g}", end=", ")
    print(f"ln evidence {laplace.log_marginal_likelihood():.4g}")
    return laplace


walks = PosteriorPipeline(flow, fitted(flow), draws=32)
labels, images = list(range(10)), list(range(10))

# %% The variance of one prediction, and of a whole walk with every weight held: the truth, within its sampling error
*_, held = walks.steps("persistent", labels, images)
pictures = flow.decode(held.step.x_next)
heat_maps(pictures, held.var.mean(1).cpu(), RESULTS / "held.png", "variance over weights", overwrite=True)

# %% Tangents: the same draws by derivatives. Weights drawn anew at every step average out, so the scale is lost
maps = {"sampled weights, held": held.var}
for method in ("tangents", "bayesdiff"):
    *_, last = walks.steps(method, labels, images)
    maps[method] = last.var
source = torch.Generator().manual_seed(0)
for name, frozen in (("BayesFlow as published", False), ("with its frozen time", True)):
    start = (walks.predictive(labels), walks.initial(images), flow.grid)
    *_, last = bayesflow(*start, particles=20, source=source, frozen_time=frozen)
    maps[name] = last.var
print("method                    pixels  images  total   (against held weights)")
for name, value in list(maps.items())[1:]:
    found = agreement(value, held.var)
    print(f"{name:24} {found.pixel:7.3f} {found.image:7.3f} {found.total:6.3f}")
maps_by_method(
    pictures, {name: value.mean(1).cpu() for name, value in maps.items()}, RESULTS / "methods.png", overwrite=True
)

# %% What the published posterior does: doubled empirical Fisher, sigma = prior precision = 1
published = walks.laplace.with_curvature("ef", published_ef=True)
published.sigma_noise, published.prior_precision = 1.0, 1.0
state = next(observations(flow.model, test, range(16), seed=1))
ours, theirs = (laplace(state.x, state.t, state.cond)[1].mean() for laplace in (walks.laplace, published))
print(f"mean predictive variance: {ours:.2e} of the tuned posterior, {theirs:.2e} of the published one")

# %% Along the walk: a flow and a diffusion on one scale (variances of x / (alpha + sigma) by noise share)
twins = PosteriorPipeline(twin, fitted(twin), draws=8)
few = PosteriorPipeline(flow, walks.laplace, draws=8)
both = [walked(way, name, "persistent", labels, images) for name, way in (("flow", few), ("diffusion", twins))]
curves_by_class(both, RESULTS / "by_class.png", overwrite=True)
for walk in both:
    interleaved(walk, RESULTS / f"grid_{walk.name}.png", count=3, overwrite=True)

# %% The other kind: what the data leave open, from the derivative of the denoiser alone, at the walk's middle
middle = list(walks.plain(labels, images))[5]
denoiser = flow.model.denoiser(flow.labels(labels))
aleatoric = data_posterior(denoiser, flow.model.schedule, middle.x, middle.u)
kinds = {"epistemic": held.var.mean(1).cpu(), f"aleatoric at u = {middle.u:.1f}": aleatoric.var.mean(1).cpu()}
maps_by_method(pictures, kinds, RESULTS / "two_kinds.png", overwrite=True)
print(*sorted(map(str, RESULTS.glob("*.png"))), sep="\n")
