"""Encode the images of a training once, before it starts, in any number of processes: its latent cache.

Examples:
  python scripts/cache_latents.py --base configs/latent-diffusion/digits-vq.yaml data.params.latent_cache=data/latents
  torchrun --nproc_per_node 8 -- scripts/cache_latents.py --base configs/latent-diffusion/cin256-v2.yaml \\
      --start_from_pretrained --component all --members 5 --ensemble_name b data.params.latent_cache=data/latents

Takes the options of the training's own command (`main.py --help`); main.py with the same options finds the latents, and
encodes what is missing. Processes of torchrun and of SLURM arrays take shares; what was stopped continues.
"""

from __future__ import annotations

import logging
import sys

from ldm.cli import run_script
from ldm.commands.line import parse
from ldm.commands.train import Train
from ldm.jobs import pick_device
from ldm.training.latent_cache import find_cached_modules, prepare_latents
from ldm.training.session import prepare_data, prepare_model, read_training_config


def main(argv: list[str] | None = None) -> bool:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return True
    training = parse(Train, argv, "cache_latents.py").training
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = read_training_config(training)
    model = prepare_model(config, training)
    data = prepare_data(config, training)
    if not find_cached_modules(data):
        raise ValueError("name the folder of the latents: data.params.latent_cache=DIR")
    complete = prepare_latents(model, config, data, pick_device(), finish=False)
    print("complete" if complete else "this process's share is done")
    return complete


if __name__ == "__main__":
    run_script(main)
