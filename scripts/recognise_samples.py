"""How many class-conditional samples of a trunk does a classifier trained on the real images recognise?

Examples:
  python scripts/recognise_samples.py --run logs/2026-01-01T00-00-00_digits --n 50
  python scripts/recognise_samples.py --base configs/latent-diffusion/digits.yaml --ckpt trunk.ckpt

The classifier and its own accuracy come from the config's training and validation data. Prints a line a class.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.cli import HelpFormatter, add_device_arguments, pick_device, run_script
from ldm.evaluation.recognition import PixelClassifier
from ldm.images import make_grid, save_image
from ldm.models.diffusion.noise import ImageNoise
from ldm.models.diffusion.sampler import SAMPLERS
from ldm.opened import add_sampling_arguments
from ldm.training.runs import find_run
from ldm.util import instantiate_from_config


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run directory of a training, or a checkpoint in one")
    source.add_argument("--base", help="config; needs --ckpt")
    parser.add_argument("--ckpt", help="checkpoint for --base")
    parser.add_argument("--n", type=int, default=50, help="samples a class")
    parser.add_argument("--grid", help="also write ten samples a class to this picture")
    add_sampling_arguments(parser)
    add_device_arguments(parser)
    return parser


def images_of(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images [N, H, W, C] and labels [N] of a data set."""
    data = instantiate_from_config(config)
    items = [data[index] for index in range(len(data))]
    return np.stack([item["image"].numpy() for item in items]), np.asarray([item["class_label"] for item in items])


def main(argv: list[str] | None = None) -> float:
    options = get_parser().parse_args(argv)
    if options.base and not options.ckpt:
        raise ValueError("--base needs --ckpt: the checkpoint to sample from")
    run, checkpoint = find_run(options.run) if options.run else (None, options.ckpt)
    config = run.config() if run else OmegaConf.load(options.base)
    device = pick_device(options.device)
    model = instantiate_from_config(config.model)
    model.init_from_ckpt(str(checkpoint), use_averaged=True)
    model = model.to(device).eval().requires_grad_(False)

    classifier = PixelClassifier(*images_of(config.data.params.train))
    own = classifier.recognised(*images_of(config.data.params.validation)).mean()
    settings = config.get("uncertainty") or {}
    grid = model.grid(options.ddim_steps or settings.get("steps", 50), options.spacing)
    scale = options.scale if options.scale is not None else model.guidance_scale
    rates, shown = [], []
    for label in tqdm(range(model.null_class), desc="classes", unit="class"):
        noise = ImageNoise(options.seed, tuple(range(label * options.n, (label + 1) * options.n)), device)
        labels = torch.full((options.n,), label, device=device)
        latents = model.sample(labels, noise, grid, scale, SAMPLERS[options.sampler], eta=options.ddim_eta)
        images = model.decode_first_stage(latents).clamp(-1, 1).cpu()
        shown.append(images[:10])
        rates.append(classifier.recognised(images.permute(0, 2, 3, 1), labels.cpu()).mean())
    if options.grid:
        save_image(make_grid(torch.cat(shown), columns=10, zoom=4), Path(options.grid), overwrite=True)
    print("  ".join(f"{label}: {rate:.1%}" for label, rate in enumerate(rates)))
    print(f"recognised {np.mean(rates):.2%} of {options.n * len(rates)} samples; real test images {own:.2%}")
    return float(np.mean(rates))


if __name__ == "__main__":
    run_script(main)
