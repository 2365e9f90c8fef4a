"""Groups of command-line arguments that the scripts share: which model or ensemble, and how it is sampled."""

from __future__ import annotations

import argparse
import re

from ldm.cli import add_device_arguments
from ldm.data.subsets import DATASET_NAMES
from ldm.models.diffusion.sampler import SAMPLERS
from ldm.models.diffusion.sampler.grids import SPACINGS


def steps_of(text: str) -> int | str:
    """A number of steps, or a respacing of ADM as it is: "ddim50", "10,10,5"."""
    if not re.fullmatch(r"\d+(,\d+)*|ddim\d+", text):
        raise argparse.ArgumentTypeError(f"expected a number of steps, or a respacing: ddim50 or 10,10,5; got '{text}'")
    return int(text) if text.isdigit() else text


def add_sampling_arguments(parser: argparse.ArgumentParser, steps: int = 200, scale: float = 5.0) -> None:
    """Options of the sampler; what is not given comes from the config."""
    parser.add_argument("--sampler", default="DDIM", choices=sorted(SAMPLERS), help="sampler")
    number = f"number of steps (config's uncertainty.steps, else {steps}), or a respacing: ddim50 or 10,10,5"
    parser.add_argument("--steps", "--ddim_steps", dest="ddim_steps", type=steps_of, help=number)
    eta = {"dest": "ddim_eta", "type": float, "default": 0.0}
    parser.add_argument("--eta", "--ddim_eta", **eta, help="DDIM's noise: 0 none .. 1 ancestral variance")
    parser.add_argument("--scale", type=float, help=f"guidance scale, 1 is off (config, else {scale:g})")
    parser.add_argument("--spacing", default="auto", choices=SPACINGS, help="how the steps are spaced")
    parser.set_defaults(default_steps=steps, default_scale=scale)


def add_model_arguments(parser: argparse.ArgumentParser, steps: int = 200) -> None:
    """Which model `open_model` opens, and how it is sampled."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run directory of a training, or a checkpoint in one")
    source.add_argument("--base", help="config; needs --ckpt")
    parser.add_argument("--ckpt", help="checkpoint for --base, a released one for example")
    parser.add_argument("--pretrained", help="a component's trunk, where it moved")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, where there are any"
    )
    add_sampling_arguments(parser, steps, scale=1.0)
    add_device_arguments(parser)


def add_ensemble_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ensemble, and where its members part."""
    parser.add_argument("--path", required=True, help="folder that save_ensemble.py wrote")
    parser.add_argument("--pretrained", help="the trunk's checkpoint, where it moved")
    parser.add_argument("--dataset", choices=DATASET_NAMES, help="the members' split: an error if they had another")
    branch = parser.add_mutually_exclusive_group()
    branch.add_argument("--unc_branch", type=int, help="grid step at which members part, 0 = noisiest")
    branch.add_argument("--branch_at", type=float, help="the same as a fraction of the steps, 0 .. 1")
    branch.add_argument("--branch_t", type=float, help="the same as a time: the first step with t <= this")
    parser.add_argument("--base_comp", type=int, default=0, help="member that walks to the branch")
    parser.add_argument("--chunk", type=int, help="images that one pass through the network holds at most")
    add_sampling_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
