# %% [markdown]
# # A flow and its twin
#
# Flow matching on digits, from training to likelihoods, beside its diffusion twin.
#
# Run it whole (python docs/notebooks/flow_and_twin.py), or cell by cell in an editor that knows "# %%". It
# takes the newest runs named digits-flow and digits-diffusion below logs/, and trains those that are missing
# (about 4 CPU minutes each). Pictures go to results/flow_and_twin.

# %% [markdown]
# ## Set-up

# %%
from pathlib import Path

import torch

from ldm import Sampling, Training, load_model
from ldm.diffusion.flow_matching import ODESolver, to_flow_matching
from ldm.diffusion.likelihood import log_likelihood
from ldm.diffusion.samplers import SAMPLERS, run
from ldm.evaluation.recognition import PixelClassifier
from ldm.images import heat_maps, save_image, tile_images
from ldm.training.runs import runs_named
from ldm.training.session import train
from ldm.uncertainty.aleatoric import data_posterior
from ldm.util import instantiate_from_config

LOGS = Path("logs")
RESULTS = Path("results/flow_and_twin")
FLOW = "configs/flow-matching/digits.yaml"
TWIN = "configs/flow-matching/diffusion-twin.yaml"

# %% [markdown]
# ## Train
#
# A flow is a schedule, a target and times of training, and all three are in the config.
#
# model.params.schedule_config is FlowSchedule: x = (1 - u) x_0 + u eps, with u = 0 for data and u = 1 for
# noise. model.params.parameterization is velocity: the network regresses eps - x_0. model.params.times_config
# is UniformTimes; LogNormalNoise(0, 1) is a normal logit instead. The twin is the same network, data and
# optimiser on a table of betas: one more config on top.


# %%
def find_or_train(name: str, *configs: str) -> Path:
    known = [found for found in runs_named(LOGS, name) if found.finished.exists()] if LOGS.is_dir() else []
    return known[-1].path if known else train(Training(configs, scale_lr=False, name=name, logdir=str(LOGS)))


flow_run = find_or_train("digits-flow", FLOW)
twin_run = find_or_train("digits-diffusion", FLOW, TWIN)

# %% [markdown]
# ## Load both
#
# Euler is DDIM on any schedule.

# %%
flow = load_model(flow_run, Sampling("Euler", steps=10))
twin = load_model(twin_run, Sampling("Euler", steps=50))

# %% [markdown]
# ## Sample
#
# Ten images of each class, a row a class, with the same noises in both.

# %%
for name, model in (("flow", flow), ("diffusion", twin)):
    save_image(tile_images(model.sample(n=10), columns=10, zoom=4), RESULTS / f"samples_{name}.png", overwrite=True)

# %% [markdown]
# ## Quality against steps
#
# A flow needs few, for its trajectories are nearly straight.

# %%
training_set = instantiate_from_config(flow.config["data"]["params"]["train"])
images = torch.stack([item["image"] for item in training_set])
classifier = PixelClassifier(images.numpy(), [int(item["class_label"]) for item in training_set])
labels = [label for label in range(10) for _ in range(10)]
print("steps   flow   diffusion    (samples recognised as their class)")
for steps in (2, 5, 10, 20):
    samples = [model.with_(steps=steps).sample(n=10).permute(0, 2, 3, 1) for model in (flow, twin)]
    rates = [classifier.recognised(pictures, labels).mean() for pictures in samples]
    print(f"{steps:5}  {rates[0]:5.1%}  {rates[1]:9.1%}")

# %% [markdown]
# ## Samplers
#
# Any of them, on any schedule; each is a generator of steps, of which a caller keeps what it needs.

# %%
schedule = flow.model.schedule
denoiser = flow.model.denoiser(flow.labels(range(10)))
x = flow.initial(flow.noise(range(10)))
with torch.no_grad():
    fine = run(SAMPLERS["RK4"](denoiser, schedule, x, flow.model.sampling_times(50)))
    for name in ("Euler", "Midpoint", "Heun", "RK4", "Dopri5"):
        found = run(SAMPLERS[name](denoiser, schedule, x, flow.model.sampling_times(5)))
        print(f"{name:>9}, 5 steps: {float((found - fine).square().mean().sqrt()):.4f} away from RK4's 50 steps")
    states = [step.x_next for step in SAMPLERS["Euler"](denoiser, schedule, x, flow.times)]
save_image(tile_images(flow.decode(torch.cat(states)), columns=10, zoom=4), RESULTS / "trajectory.png", overwrite=True)

# %% [markdown]
# ## The other convention
#
# Flow_matching counts t from noise (0) to data (1), and its field points to the data.

# %%
solver = ODESolver(to_flow_matching(denoiser, schedule))
rising = torch.linspace(0, 1, 11, dtype=torch.float64)
theirs = solver.sample(x, time_grid=rising, return_intermediates=True)
difference = float((states[-1] - theirs[-1]).abs().max())
print(f"Euler by either convention differs by {difference:.1e}; {len(theirs)} states kept")

# %% [markdown]
# ## Likelihood
#
# The divergence of the field from data to noise, exact here (8 x 8 pixels).

# %%
test_set = instantiate_from_config(flow.config["data"]["params"]["validation"])
items = [test_set[index] for index in range(10)]
clean = torch.stack([item["image"] for item in items]).permute(0, 3, 1, 2).to(flow.device)
true_labels = [int(item["class_label"]) for item in items]
own = flow.model.denoiser(flow.labels(true_labels))
exact = log_likelihood(own, schedule, clean, flow.times, method="midpoint")
probes = {"probes": 8, "method": "midpoint"}
signs = torch.Generator().manual_seed(0)
rough = log_likelihood(own, schedule, clean, flow.times, generator=signs, **probes)
print(f"log density of held-out digits: {exact.log_density.mean():.1f} nats", end=", ")
print(f"by 8 probes {rough.log_density.mean():.1f}")
wrong = flow.model.denoiser(flow.labels([(label + 1) % 10 for label in true_labels]))
other = log_likelihood(wrong, schedule, clean, flow.times, generator=signs.manual_seed(0), **probes)
print(f"with the next digit's label, by the same probes: {other.log_density.mean():.1f} nats")

# %% [markdown]
# ## What the data leave open
#
# The covariance of clean data given a noisy state, from the derivative of the denoiser.

# %%
noisy = schedule.noised(clean, flow.initial(flow.noise(range(10))), 0.5)
posterior = data_posterior(own, schedule, noisy, 0.5)
errors = (posterior.mean - clean).square().flatten(1).sum(1)
print(f"squared error half-way: {errors.mean():.2f} found, {posterior.total.mean():.2f} predicted")
shown = posterior.mean.cpu().clamp(-1, 1)
heat_maps(shown, posterior.var.mean(1).cpu(), RESULTS / "data.png", "variance", overwrite=True)
print(*sorted(map(str, RESULTS.glob("*.png"))), sep="\n")
