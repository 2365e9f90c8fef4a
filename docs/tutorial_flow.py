"""Tutorial: flow matching on digits, from training to likelihoods, beside its diffusion twin.

Runs whole (python docs/tutorial_flow.py), or cell by cell in an editor that knows "# %%". It takes the newest runs
named digits-flow and digits-diffusion below logs/, and trains those that are missing (about 4 CPU minutes each).
Pictures go to results/tutorial_flow. Other folders: python docs/tutorial_flow.py LOGS RESULTS
"""

# %% Set-up: where things are
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # main.py lies there

from ldm.arguments import (  # noqa: E402
    add_model_arguments,
    open_model,
)
from ldm.diffusion.flow_matching import ODESolver, to_flow_matching  # noqa: E402
from ldm.diffusion.likelihood import log_likelihood  # noqa: E402
from ldm.diffusion.samplers import SAMPLERS, run  # noqa: E402
from ldm.evaluation.recognition import PixelClassifier  # noqa: E402
from ldm.images import heat_maps, save_image, tile_images  # noqa: E402
from ldm.pipelines import ModelPipeline  # noqa: E402
from ldm.settings import Training  # noqa: E402
from ldm.training.runs import runs_named  # noqa: E402
from ldm.training.session import train  # noqa: E402
from ldm.uncertainty.aleatoric import data_posterior  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

if len(sys.argv) not in (1, 3) or sys.argv[-1].startswith("-"):
    sys.exit(__doc__)
LOGS, RESULTS = map(Path, sys.argv[1:3] if len(sys.argv) == 3 else ("logs", "results/tutorial_flow"))
FLOW = "configs/flow-matching/digits.yaml"
TWIN = "configs/flow-matching/diffusion-twin.yaml"


# %% Train: a flow is a path, a target and times, all three in the config
# model.params.schedule_config    FlowSchedule: x = (1 - u) x_0 + u eps, u = 0 data .. 1 noise
# model.params.parameterization: velocity    the network regresses eps - x_0
# model.params.times_config   UniformTimes; LogNormalNoise(0, 1) is a normal logit, (-1.2, 1.2) flow_matching's skewed
# The twin is the same network, data and optimiser on a table of betas: one more config on top.
def trained(name: str, *configs: str) -> Path:
    known = runs_named(LOGS, name) if LOGS.is_dir() else []
    if known and (known[-1].path / "finished.json").exists():
        return known[-1].path
    bases = tuple(str(ROOT / config) for config in configs)
    return train(Training(bases, scale_lr=False, name=name, logdir=str(LOGS)))


flow_run, twin_run = trained("digits-flow", FLOW), trained("digits-diffusion", FLOW, TWIN)


# %% Open both, as every script does: options in, model and config out
def pipeline(path: Path, steps: int, sampler: str = "Euler") -> ModelPipeline:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return open_model(parser.parse_args(["--run", str(path), "--steps", str(steps), "--sampler", sampler]))


flow, twin = pipeline(flow_run, 10), pipeline(twin_run, 50)
labels = [image % 10 for image in range(100)]

# %% Sample: ten classes, the same noises for both
for name, model in (("flow", flow), ("diffusion", twin)):
    pictures = model.decode(model.sample(labels, range(100)))
    save_image(tile_images(pictures, columns=10, zoom=4), RESULTS / f"samples_{name}.png", overwrite=True)

# %% Quality against steps: a flow needs few, for its lines are straight
training_set = instantiate_from_config(flow.config["data"]["params"]["train"])
items = [training_set[index] for index in range(len(training_set))]
classifier = PixelClassifier(
    torch.stack([item["image"] for item in items]).numpy(), [int(item["class_label"]) for item in items]
)
print("steps   flow   diffusion    (samples recognised as their class)")
for steps in (2, 5, 10, 20):
    rates = []
    for path in (flow_run, twin_run):
        model = pipeline(path, steps)
        pictures = model.decode(model.sample(labels, range(100))).permute(0, 2, 3, 1)
        rates.append(classifier.recognised(pictures, labels).mean())
    print(f"{steps:5}  {rates[0]:5.1%}  {rates[1]:9.1%}")

# %% Samplers: any of them, on any path; a walk is a generator of steps, so intermediates are what a caller keeps
network, path = flow.model.network, flow.model.schedule
few = torch.arange(10, device=flow.device)
denoiser, x = flow.model.denoiser(few), flow.noise(range(10)).initial((10, *flow.model.latent_shape))
with torch.no_grad():
    fine = run(SAMPLERS["RK4"](denoiser, path, x, flow.model.sampling_times(50)))
    for name in ("Euler", "Midpoint", "Heun", "RK4", "Dopri5"):
        found = run(SAMPLERS[name](denoiser, path, x, flow.model.sampling_times(5)))
        print(
            f"{name:>9}, grid of 5 steps: {float((found - fine).square().mean().sqrt()):.4f} away from RK4's 50 steps"
        )
    states = [step.x_next for step in SAMPLERS["Euler"](denoiser, path, x, flow.model.sampling_times(10))]
save_image(tile_images(flow.decode(torch.cat(states)), columns=10, zoom=4), RESULTS / "walk.png", overwrite=True)

# %% The other convention: flow_matching counts t from noise (0) to data (1), and its field points to the data
solver = ODESolver(to_flow_matching(denoiser, path))
times = torch.linspace(0, 1, 11, dtype=torch.float64)
ours, theirs = states[-1], solver.sample(x, time_grid=times, return_intermediates=True)
print(f"Euler by either convention differs by {float((ours - theirs[-1]).abs().max()):.1e}; {len(theirs)} states kept")

# %% Likelihood: the divergence of the field along the way from data to noise, exact here (8 x 8 pixels)
test = instantiate_from_config(flow.config["data"]["params"]["validation"])
real = [test[index] for index in range(10)]
clean = torch.stack([item["image"] for item in real]).permute(0, 3, 1, 2).to(flow.device)
denoiser = flow.model.denoiser(torch.tensor([int(item["class_label"]) for item in real], device=flow.device))
grid = torch.linspace(1, 0, 11, dtype=torch.float64)
exact = log_likelihood(denoiser, path, clean, grid, method="midpoint")
source = torch.Generator().manual_seed(0)
rough = log_likelihood(denoiser, path, clean, grid, method="midpoint", probes=8, generator=source)
print(
    f"log density of held-out digits: {exact.log_density.mean():.1f} nats, by 8 probes {rough.log_density.mean():.1f}"
)
wrong = flow.model.denoiser(torch.tensor([(int(item["class_label"]) + 1) % 10 for item in real], device=flow.device))
other = log_likelihood(wrong, path, clean, grid, method="midpoint")
print(f"with the next digit's label: {other.log_density.mean():.1f} nats")

# %% What the data leave open: the covariance of clean data given a noisy state, from the derivative of the denoiser
noisy = path.noised(clean, flow.noise(range(10)).initial(clean.shape), 0.5)
found = data_posterior(denoiser, path, noisy, 0.5)
errors = (found.mean - clean).square().flatten(1).sum(1)
print(f"squared error half-way: {errors.mean():.2f} found, {found.total.mean():.2f} foreseen")
heat_maps(found.mean.cpu().clamp(-1, 1), found.var.mean(1).cpu(), RESULTS / "data.png", "variance", overwrite=True)
print(*sorted(map(str, RESULTS.glob("*.png"))), sep="\n")
