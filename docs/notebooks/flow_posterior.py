# %% [markdown]
# # A posterior of a flow
#
# What a flow's last layer could as well have been, and what that means for its samples; then a diffusion's.
#
# Run it whole (python docs/notebooks/flow_posterior.py), or cell by cell in an editor that knows "# %%". It
# takes the newest runs named digits-flow and digits-diffusion below logs/, which
# docs/notebooks/flow_and_twin.py trains. Posteriors and pictures go to results/flow_posterior.

# %% [markdown]
# ## Set-up

# %%
from pathlib import Path

import torch

from ldm import Sampling, load_model, load_posterior
from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.shared import ModelSource
from ldm.images import heat_maps
from ldm.pipelines import observations
from ldm.report.flow_plots import curves_by_class, interleaved, maps_by_method, sample_trajectory
from ldm.training.runs import runs_named
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.aleatoric import data_posterior
from ldm.uncertainty.propagation.bayesflow import bayesflow
from ldm.util import instantiate_from_config

RESULTS = Path("results/flow_posterior")
labels = list(range(10))
images = list(range(10))

# %% [markdown]
# ## Load
#
# The flow with ten steps, the diffusion with fifty.

# %%
flow_run = runs_named("logs", "digits-flow")[-1].path
twin_run = runs_named("logs", "digits-diffusion")[-1].path
flow = load_model(flow_run, Sampling(steps=10))
twin = load_model(twin_run, Sampling(steps=50))

# %% [markdown]
# ## Fit
#
# The last layer is a linear regression on the network's features, so its posterior is one matrix, exactly.
#
# This is what decu laplace fit --run RUN --n 500 --draws 2 --also ef does: sigma from the residuals, the
# prior precision by the evidence. A command is a value, and its run() is what the command line calls.

# %%
for run in (flow_run, twin_run):
    if not (RESULTS / run.name / "laplace.yaml").exists():
        FitLaplace(ModelSource(run=str(run)), str(RESULTS / run.name), n=500, draws=2, also=("ef",)).run()

# %% [markdown]
# ## The variance along a whole trajectory with every weight held
#
# The truth, within its sampling error.

# %%
posterior = load_posterior(RESULTS / flow_run.name, flow, draws=32)
*_, held = posterior.steps("persistent", labels, images)
pictures = flow.decode(held.step.x_next)
heat_maps(pictures, held.var.mean(1).cpu(), RESULTS / "held.png", "variance over weights", overwrite=True)

# %% [markdown]
# ## Tangents
#
# The same draws by derivatives. Weights drawn again at every step average out, so the scale is lost.

# %%
found = {}
for method in ("tangents", "bayesdiff"):
    *_, last = posterior.steps(method, labels, images)
    found[method] = last.var
source = torch.Generator().manual_seed(0)
for name, frozen in (("BayesFlow as published", False), ("with its frozen time", True)):
    start = (posterior.predictive(labels), posterior.initial(images), flow.times)
    *_, last = bayesflow(*start, particles=20, source=source, frozen_time=frozen)
    found[name] = last.var
print("method                    pixels  images  total   (against held weights)")
for name, var in found.items():
    score = agreement(var, held.var)
    print(f"{name:24} {score.pixel:7.3f} {score.image:7.3f} {score.total:6.3f}")
maps = {name: var.mean(1).cpu() for name, var in {"sampled weights, held": held.var, **found}.items()}
maps_by_method(pictures, maps, RESULTS / "methods.png", overwrite=True)

# %% [markdown]
# ## What the published posterior does
#
# Doubled empirical Fisher, sigma = prior precision = 1.

# %%
published = posterior.laplace.with_curvature("ef", published_ef=True)
published.sigma_noise = 1.0
published.prior_precision = 1.0
test_set = instantiate_from_config(flow.config["data"]["params"]["validation"])
state = next(observations(flow.model, test_set, range(16), seed=1))
ours, theirs = (law(state.x, state.t, state.cond)[1].mean() for law in (posterior.laplace, published))
print(f"mean predictive variance: {ours:.2e} of the tuned posterior, {theirs:.2e} of the published one")

# %% [markdown]
# ## Along the trajectory
#
# A flow and a diffusion on one scale (variances of x / (alpha + sigma) by noise share).

# %%
few = {
    "flow": load_posterior(RESULTS / flow_run.name, flow, draws=8),
    "diffusion": load_posterior(RESULTS / twin_run.name, twin, draws=8),
}
both = [sample_trajectory(one, name, "persistent", labels, images) for name, one in few.items()]
curves_by_class(both, RESULTS / "by_class.png", overwrite=True)
for trajectory in both:
    interleaved(trajectory, RESULTS / f"states_{trajectory.name}.png", count=3, overwrite=True)

# %% [markdown]
# ## The other kind
#
# What the data leave open, from the derivative of the denoiser alone, half-way to the data.

# %%
middle = list(posterior.plain(labels, images))[5]
denoiser = flow.model.denoiser(flow.labels(labels))
aleatoric = data_posterior(denoiser, flow.model.schedule, middle.x, middle.u)
kinds = {"epistemic": held.var.mean(1).cpu(), f"aleatoric at u = {middle.u:.1f}": aleatoric.var.mean(1).cpu()}
maps_by_method(pictures, kinds, RESULTS / "two_kinds.png", overwrite=True)
print(*sorted(map(str, RESULTS.glob("*.png"))), sep="\n")
