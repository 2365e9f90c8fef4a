"""Groups of command-line arguments that the scripts share: which model or ensemble, and how it is sampled."""

from __future__ import annotations

import argparse
import re

from ldm.cli import add_device_arguments
from ldm.data.subsets import DATASET_NAMES
from ldm.diffusion.epsilon_scaling import DIRECTIONS, UNITS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.ancestral import VARIANCES
from ldm.diffusion.times import SPACINGS
from ldm.pipelines import Defaults, ModelPipeline, PosteriorPipeline, load_model, load_posterior
from ldm.pipelines.speed import PRECISIONS
from ldm.settings import ClassifierGuidance, FeatureReading, Sampling, Scaling, Speed


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
    parser.add_argument("--variance", choices=VARIANCES, help="DDPM's (learned_range where learned, else fixed_small)")
    add_wrapper_arguments(parser)
    parser.set_defaults(default_steps=steps, default_scale=scale)


def scaler_of(text: str) -> str | float:
    """A positive number, or the name of the config's own values."""
    if text in ("published", "published-linear"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, published or published-linear; got '{text}'") from error


def add_wrapper_arguments(parser: argparse.ArgumentParser) -> None:
    """What acts on every prediction: epsilon scaling, clipping, guidance by a classifier."""
    add = parser.add_argument_group("epsilon scaling (docs/epsilon_scaling.md)").add_argument
    b = "divide the predicted noise by b, 1 is off; or published[-linear]: the config's values for this number of steps"
    add("--eps_scaler", type=scaler_of, metavar="B", help=b)
    add("--eps_slope", type=float, metavar="K", help="divide by K t + B, t as --eps_unit says")
    add("--eps_unit", choices=UNITS, help="t counts steps from the cleanest (step), or is -log SNR (file's, else step)")
    add("--eps_schedule", metavar="FILE", help="schedule file of choose_eps_scaling.py in place of B and K")
    window = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--eps_window", **window, help="scale only where sigma / alpha lies between these")
    add("--eps_direction", choices=DIRECTIONS, help="scale eps everywhere (full), or in x_0 only (file's, else full)")
    add = parser.add_argument_group("clipping and guidance by a classifier").add_argument
    clip = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--clip_denoised", **clip, help="clamp predicted pixels to [-1, 1] (config's, else off)")
    add("--classifier_config", metavar="YAML", help="config of a noisy classifier")
    add("--classifier_ckpt", metavar="FILE", help="its weights: a run's checkpoint, or guided-diffusion's file")
    add("--classifier_scale", type=float, metavar="S", help="scale of its gradient, which eps scaling leaves alone (1)")


def count_or_auto(text: str) -> int | None:
    """A number from 1, or None for "auto"."""
    if text != "auto" and (not text.isdigit() or text == "0"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, or auto; got '{text}'")
    return None if text == "auto" else int(text)


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """How the network runs; results agree to the precision chosen. See `ldm.pipelines.speed`."""
    group = parser.add_argument_group("speed")
    chunk = "images in one pass of the network (auto: what fits into memory; fewer, should it run out all the same)"
    group.add_argument("--chunk", type=count_or_auto, default="auto", help=chunk)
    precision = "of the network's products; samplers and estimates stay in float32 and float64"
    group.add_argument("--precision", choices=list(PRECISIONS), default="float32", help=precision)
    group.add_argument("--channels_last", action="store_true", help="lay images out with channels innermost")
    compiled = "compile the network: a minute or more at first, faster from then on"
    group.add_argument("--compile", action="store_true", help=compiled)


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which model `open_model` opens."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--run", help="run directory of a training, or a checkpoint in one")
    source.add_argument("--base", help="config; needs --ckpt")
    parser.add_argument("--ckpt", help="checkpoint for --base, a released one for example")
    parser.add_argument("--pretrained", help="a component's trunk, where it moved")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, where there are any"
    )


def add_model_arguments(parser: argparse.ArgumentParser, steps: int = 200) -> None:
    """Which model `open_model` opens, and how it is sampled."""
    add_source_arguments(parser)
    add_sampling_arguments(parser, steps, scale=1.0)
    add_device_arguments(parser)
    add_speed_arguments(parser)


def add_posterior_arguments(parser: argparse.ArgumentParser) -> None:
    """Which posterior of `decu laplace fit`, seen how, and how members and states are drawn from it."""
    add = parser.add_argument
    add("--posterior", required=True, help="folder that decu laplace fit wrote, of this model")
    add("--curvature", help="see the fit through another curvature that it gathered for (--also)")
    for name in ("prior_precision", "sigma_noise", "temperature"):
        add(f"--{name}", type=float, help=f"another {name} than the fit's")
    add("--draws", type=int, default=16, help="sampled weights of persistent, directions of tangents")
    add("--particles", type=int, default=10, help="states that bayesdiff draws at a step, an even number")
    add("--every", type=int, default=5, help="steps between two draws of the _skip methods")


def base_of(text: str) -> int | str:
    """The number of a member, or `all`."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected the number of a member, or all; got '{text}'")
    return text if text == "all" else int(text)


def scale_of(text: str) -> str | float:
    """`sum`, `mean`, or a positive number."""
    if text in ("sum", "mean"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected sum, mean, or a number above 0; got '{text}'")
    return number


def add_ensemble_arguments(parser: argparse.ArgumentParser, published_branch: int | None = None) -> None:
    """Which ensemble, and where its members part; `published_branch` is where --published parts them (None: last)."""
    parser.add_argument("--path", required=True, help="folder that save_ensemble.py wrote")
    parser.add_argument("--pretrained", help="the trunk's checkpoint, where it moved")
    parser.add_argument("--dataset", choices=DATASET_NAMES, help="the members' split: an error if they had another")
    branch = parser.add_mutually_exclusive_group()
    several = {"nargs": "+", "metavar": "B"}
    branch.add_argument("--unc_branch", type=int, **several, help="grid steps at which members part, 0 = noisiest")
    branch.add_argument("--branch_at", type=float, **several, help="the same as fractions of the steps, 0 .. 1")
    branch.add_argument("--branch_t", type=float, **several, help="the same as times: the first step with t <= B")
    parser.add_argument(
        "--base_comp", type=base_of, nargs="+", help="members that walk to the branch: numbers, or all (else 0)"
    )
    parser.add_argument(
        "--uncertain_comp",
        action="store_true",
        help="walk to the branch with a member that the class was hidden from (masked_classes)",
    )
    add_sampling_arguments(parser)
    where = "the last step" if published_branch is None else f"step {published_branch}"
    parser.add_argument(
        "--published",
        action="store_true",
        help="what the published scripts take, unless given: 200 steps on CompVis' grid, guidance 5, eta 0, "
        f"branch at {where}",
    )
    add_device_arguments(parser)
    add_speed_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.set_defaults(default_branch="config", published_branch=published_branch)


# What scripts that are not commands yet build from their options.


def make_sampling(options: argparse.Namespace) -> Sampling:
    """The values of `add_sampling_arguments` and --seed."""
    scaling = Scaling(
        options.eps_scaler,
        options.eps_slope,
        options.eps_unit,
        options.eps_schedule,
        None if options.eps_window is None else tuple(options.eps_window),
        options.eps_direction,
    )
    classifier = ClassifierGuidance(options.classifier_config, options.classifier_ckpt, options.classifier_scale)
    return Sampling(
        sampler=options.sampler,
        steps=options.ddim_steps,
        eta=options.ddim_eta,
        scale=options.scale,
        spacing=options.spacing,
        variance=options.variance,
        clip=options.clip_denoised,
        seed=options.seed,
        scaling=scaling,
        classifier=classifier,
    )


def make_speed(options: argparse.Namespace) -> Speed:
    """The values of `add_speed_arguments`."""
    chunk = "auto" if options.chunk is None else options.chunk
    return Speed(chunk, options.precision, getattr(options, "channels_last", False), getattr(options, "compile", False))


def open_model(options: argparse.Namespace) -> ModelPipeline:
    """The model that the options of `add_model_arguments` name."""
    sampling = make_sampling(options) if hasattr(options, "ddim_steps") else None
    defaults = Defaults(getattr(options, "default_steps", 200), getattr(options, "default_scale", 1.0))
    return load_model(
        options.run,
        sampling,
        base=options.base,
        ckpt=options.ckpt,
        ema=options.ema,
        epoch=getattr(options, "epoch", None),
        pretrained=options.pretrained,
        speed=make_speed(options),
        device=options.device,
        defaults=defaults,
    )


def open_walks(options: argparse.Namespace) -> PosteriorPipeline:
    """The model and posterior that the options of `add_model_arguments` and `add_posterior_arguments` name."""
    return load_posterior(
        options.posterior,
        open_model(options),
        curvature=options.curvature,
        prior_precision=options.prior_precision,
        sigma_noise=options.sigma_noise,
        temperature=options.temperature,
        draws=options.draws,
        particles=options.particles,
        every=options.every,
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Where features are read: noise levels, layers, pooling, draws."""
    levels = parser.add_mutually_exclusive_group()
    several = {"nargs": "+", "type": float}
    levels.add_argument("--t", **several, help="noise levels as times of the schedule: table entries, sigma of EDM")
    levels.add_argument("--logsnr", **several, help="the same as log signal-to-noise ratios, 2 ln(alpha / sigma)")
    levels.add_argument("--index", nargs="+", type=int, help="the same as EDM's 18 steps, 1 = cleanest")
    parser.add_argument("--layers", nargs="+", help="taps: in_1 .. mid .. out_1 .., dotted names, or all")
    parser.add_argument("--pool", default="1", help="k: means of a k x k grid of the map; none: every position")
    parser.add_argument("--draws", type=int, default=1, help="noise draws that features are averaged over")
    parser.add_argument("--label", type=int, help="class that a conditional backbone sees (default: its null class)")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16", "fp16"], help="of its products")
    parser.add_argument("--images_per_pass", type=int, default=100, help="images in one pass through the backbone")
    parser.set_defaults(chunk=1)


def make_feature_reading(options: argparse.Namespace) -> FeatureReading:
    """The values of `add_reading_arguments`."""
    levels = {name: tuple(getattr(options, name) or ()) or None for name in ("t", "logsnr", "index", "layers")}
    return FeatureReading(**levels, pool=options.pool, draws=options.draws, label=options.label)
