# %% [markdown]
# # Laplace of a pretrained model
#
# One trained model, no second training: what could its last layer as well have been, and what would that do
# to its samples? The notebook takes the newest run named `digits_base`, which `bash scripts/quickstart.sh`
# trains. A released model is opened by `load_model(base="CONFIG.yaml", ckpt="FILE")`, a folder of diffusers
# by `load_model(diffusers="FOLDER")`, a torch module of your own by `load_model(network=MODULE, ...)`.

# %%
from pathlib import Path

import torch

from ldm import Sampling, load_model
from ldm.images import heat_maps
from ldm.pipelines import PosteriorPipeline
from ldm.pipelines.fitting import LaplacePlan
from ldm.training.runs import runs_named
from ldm.uncertainty.agreement import agreement
from ldm.util import instantiate_from_config

RESULTS = Path("results/laplace_of_a_model")
model = load_model(runs_named("logs", "digits_base")[-1].path, Sampling(steps=10))
images = instantiate_from_config(model.config["data"]["params"]["train"])

# %% [markdown]
# ## Fit
#
# Given the features before it, the last layer is a linear regression, so that its posterior is one matrix,
# without a Jacobian and without a sample. sigma is taken from the residuals. `decu laplace fit --run RUN`
# does the same and writes it.

# %%
laplace = LaplacePlan(draws=4).fit(model, images, range(200))
print(f"{laplace.curvature} curvature, sigma {float(laplace.sigma_noise):.3f}, {len(images)} images")

# %% [markdown]
# ## Variance of samples
#
# Weights are drawn from the posterior, each is held for a whole trajectory, and the pictures differ where the
# data did not determine the weights. Tangents are the same to first order.

# %%
labels, numbers = list(range(8)), list(range(8))
held = PosteriorPipeline(model, laplace, draws=16)
*_, truth = held.steps("persistent", labels, numbers)
*_, linear = held.steps("tangents", labels, numbers)
score = agreement(linear.var, truth.var)
print(f"tangents against held weights: pixels {score.pixel:.2f}, pictures {score.image:.2f}, total {score.total:.2f}")
pictures = model.decode(truth.step.x_next)
heat_maps(pictures, truth.var.mean(1).cpu(), RESULTS / "variance.png", "variance over weights", overwrite=True)

# %% [markdown]
# ## Is it uncertainty, or only contrast?
#
# A map that knows nothing of the weights, the picture's own edges, may look the same. Where its rank
# correlation with the variance is high, the map tells little that the picture does not.

# %%
across = (pictures[..., 1:] - pictures[..., :-1]).abs()
edges = torch.nn.functional.pad(across, (0, 1)).mean(1)
pairs = zip(truth.var.mean(1).flatten(1), edges.flatten(1), strict=True)
ranks = [
    torch.corrcoef(torch.stack([var.cpu(), edge.cpu()]).argsort(1).argsort(1).double())[0, 1] for var, edge in pairs
]
print(f"rank correlation of the variance with edges, mean over pictures: {float(torch.stack(ranks).mean()):.2f}")

# %% [markdown]
# The width of this posterior is that of refits of the last layer, and not of trainings from scratch, which
# differ far more: [a posterior of the last layer](../posterior.md) says what was measured.
