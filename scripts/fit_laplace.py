"""Fit the Laplace posterior of a diffusion model's last layer: what its weights could as well have been.

Examples:
  python scripts/fit_laplace.py --run logs/2026-01-01T00-00-00_digits --also sandwich --out results/laplace/digits
  python scripts/fit_laplace.py --run logs/2026-01-01T00-00-00_digits --draws 8 --bins 4 --out results/laplace/levels
  python scripts/fit_laplace.py --base configs/latent-diffusion/cin256-v2.yaml \\
      --ckpt pretrained_models/cin256-v2/model.ckpt --n 2000 --draws 1 --out results/laplace/imagenet \\
      --data target=ldm.data.imagenet.ImageNetTrain params.data_root=DIR
  python scripts/fit_laplace.py --run logs/2026-01-01T00-00-00_digits --published --out results/laplace/as_published
  python scripts/fit_laplace.py --run RUN --merge results/laplace/a results/laplace/b --out results/laplace/both
  torchrun --nproc_per_node 4 -- scripts/fit_laplace.py --run RUN --out results/laplace/digits   (the images in shares)

Any run: latent, pixel, flow, conditional or not. The images are those of the run's config (data.params.train), or
--data. Each gives --draws rows (x_t, t, condition), drawn as in training; those seen stand for the whole data set.
sigma_noise is the residuals' maximum likelihood and prior_precision that of the greatest evidence, unless given.
A stopped fit continues; processes of torchrun or of a SLURM array share it, and the last to finish writes
laplace.safetensors, laplace.yaml and record.json. Parts lie in a folder named by what they were fitted to: a fit with
other settings begins anew, one with another sigma_noise, prior_precision or temperature takes them as they are.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.arguments import add_model_arguments, open_model
from ldm.checkpoint import load_state_dict, save_tensors
from ldm.cli import HelpFormatter, run_script
from ldm.jobs import WorkList, shard_from_environment, split_range
from ldm.laplace import CURVATURES, TUNERS, LastLayerLaplace, load_laplace, save_laplace
from ldm.pipelines import ModelPipeline, chosen_positions, new_posterior, observations
from ldm.records import write_record
from ldm.training.config import read_data_config
from ldm.util import instantiate_from_config

# Images in a part: what a process takes at once, and what is lost when it is stopped. A part holds the last layer's
# matrices (66 MB at Stable Diffusion's, 330 MB with the sandwich's), so there are at most so many of them.
PART, PARTS = 256, 64
# What BayesDiff hard-codes (Kou et al. 2024): doubled empirical Fisher, one draw an image, nothing rescaled or tuned.
PUBLISHED = {"curvature": "ef", "sigma_noise": 1.0, "prior_precision": 1.0, "draws": 1}


def number_or(*words: str):
    """A positive number or one of the words."""

    def parse(text: str) -> float | str:
        return text if text in words else float(text)

    parse.__name__ = f"number or {', '.join(words)}"
    return parse


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, help="folder of the posterior")
    add("--data", nargs="+", metavar="WORD", help="target=.. params.x=..; or CONFIG.yaml:train (default: the run's)")
    add("--split", default="train", help="split of the run's data to fit to")
    add("--n", type=int, help="images to fit to, drawn at random (default: all)")
    add("--data_size", type=int, help="images that those seen stand for (default: the data set's)")
    add("--draws", type=int, default=4, help="noise draws for each image")
    add("--curvature", default="full", choices=sorted(CURVATURES), help="see ldm.laplace")
    add("--also", nargs="+", default=[], choices=sorted(CURVATURES), help="gather what these need as well")
    add("--rank", type=int, default=128, help="eigenvectors of lowrank")
    add("--layer", help="the last layer by name (default: found)")
    tuned = "a number, or "
    add("--sigma_noise", type=number_or("ml"), default="ml", help=tuned + "ml: from the residuals, by noise level")
    add("--prior_precision", type=number_or(*TUNERS), default="marglik", help=tuned + "marglik or gridsearch")
    add("--validation", default="validation", help="split for gridsearch")
    add("--temperature", type=float, default=1.0, help="divides the likelihood's precision")
    add("--bins", type=int, default=1, help="noise levels with a sigma of their own, equally likely in training")
    add(
        "--published", action="store_true", help="as BayesDiff: ef doubled, sigma and precision 1, one draw, no rescale"
    )
    add("--merge", nargs="+", metavar="FOLDER", help="instead of fitting: join posteriors of the same model")
    add("--batch_size", type=int, default=16, help="images in one pass, --draws rows each")
    add("--patches", type=int, default=4, help="rows whose patches are held at once")
    add("--overwrite", action="store_true", help="replace a posterior, and drop the parts of fits with other settings")
    return parser


def data_of(options: argparse.Namespace, pipeline: ModelPipeline, split: str) -> tuple[Dataset, Any]:
    """The images to fit to, and what they were built from.

    Raises:
        ValueError: if neither --data nor the run's config has them.
    """
    if options.data is not None and split == options.split:
        config = read_data_config(options.data)
    else:
        config = OmegaConf.select(OmegaConf.create(pipeline.config), f"data.params.{split}")
        if config is None:
            raise ValueError(f"the config has no data.params.{split}: name the images with --data")
        config = OmegaConf.to_container(config, resolve=True)
    return instantiate_from_config(config), config


def time_edges(pipeline: ModelPipeline, bins: int) -> list[float]:
    """The network's times that part training into `bins` equally likely noise levels."""
    model = pipeline.model
    shares = torch.arange(1, bins, dtype=torch.float64) / bins
    t = model.drawn_times(shares if model.num_timesteps is None else (shares * model.num_timesteps).long())
    x = torch.zeros(len(shares), *model.latent_shape, device=pipeline.device)
    return sorted(model.network_input(x, t.to(pipeline.device))[1].double().tolist()) if len(shares) else []


def posterior_of(options: argparse.Namespace, pipeline: ModelPipeline) -> LastLayerLaplace:
    """The unfitted posterior that the options describe."""
    return new_posterior(
        pipeline,
        layer=options.layer,
        curvature=options.curvature,
        rank=options.rank,
        published_ef=options.published,
        temperature=options.temperature,
        time_edges=time_edges(pipeline, options.bins),
        chunk=options.patches,
    )


def work_of(
    options: argparse.Namespace, pipeline: ModelPipeline, data: Dataset, config: Any, positions: list[int]
) -> WorkList:
    """The parts of this fit, in a folder named by all that their sums depend on."""
    names = ("curvature", "also", "draws", "bins", "layer", "seed")
    settings = {
        **{name: getattr(options, name) for name in names},
        "model": {
            key: value for key, value in pipeline.describe().items() if key.startswith(("checkpoint", "averaged"))
        },
        "config": OmegaConf.to_container(OmegaConf.create(pipeline.config), resolve=True)["model"],
        "data": config,
        "images": len(positions),
        "of": len(data),
    }
    return WorkList.apart(Path(options.out) / "parts", settings, shard_from_environment())


def fit_parts(
    options: argparse.Namespace, pipeline: ModelPipeline, data: Dataset, config: Any
) -> LastLayerLaplace | None:
    """Fit what has not been fitted, then join; None while parts of other processes are missing."""
    positions = chosen_positions(len(data), options.n, options.seed)
    work = work_of(options, pipeline, data, config, positions)
    spans = split_range(len(positions), max(PART, math.ceil(len(positions) / PARTS)))
    parts = {key: positions[span.start : span.stop] for key, span in spans.items()}
    with tqdm(total=len(positions), desc="fit", unit="image") as bar:
        for key in parts:
            bar.update(len(parts[key]) * (key not in work.pending(parts)))
        for key in work.pending(parts):
            part = posterior_of(options, pipeline)
            shared = {"draws": options.draws, "seed": options.seed, "batch_size": options.batch_size}
            rows = observations(pipeline.model, data, parts[key], **shared)
            part.fit(rows, draws=options.draws, also=options.also)
            save_tensors(part.state_dict(), work.folder / f"{key}.safetensors", {}, overwrite=True)
            work.save(key, {"images": len(parts[key])})
            bar.update(len(parts[key]))
    if not work.complete(parts):
        return None
    whole = None
    for key in parts:
        part = posterior_of(options, pipeline)
        part.load_state_dict(load_state_dict(work.folder / f"{key}.safetensors"))
        whole = part if whole is None else whole.merge(part)
    if options.overwrite:
        discard_others(work.folder)
    size = len(positions) if options.published else len(data)
    whole.data_size = options.data_size or size
    return whole


def discard_others(folder: Path) -> None:
    """Remove the parts of fits with other settings beside this one's."""
    for other in sorted(folder.parent.glob("parts*")):
        if other != folder and (other / "settings.json").exists():
            print(f"{other}: parts of a fit with other settings, discarded")
            shutil.rmtree(other, ignore_errors=True)


def check(options: argparse.Namespace, pipeline: ModelPipeline) -> None:
    """Raise before the fit what its tuning would raise for the values given."""
    unfitted = posterior_of(options, pipeline)
    for name in ("sigma_noise", "prior_precision"):
        if not isinstance(getattr(options, name), str):
            setattr(unfitted, name, getattr(options, name))
    if options.curvature == "isotropic" and options.prior_precision == "marglik":
        raise ValueError("isotropic curvature holds no data, so no evidence: give --prior_precision, or gridsearch")
    if options.prior_precision == "gridsearch":
        data_of(options, pipeline, options.validation)


def tune(options: argparse.Namespace, pipeline: ModelPipeline, laplace: LastLayerLaplace) -> None:
    """Set sigma_noise, then prior_precision."""
    if options.sigma_noise == "ml":
        laplace.optimize_sigma_noise()
    else:
        laplace.sigma_noise = options.sigma_noise
    if not isinstance(options.prior_precision, str):
        laplace.prior_precision = options.prior_precision
        return
    held_out = {}
    if options.prior_precision == "gridsearch":
        data, _ = data_of(options, pipeline, options.validation)
        held_out["batches"] = observations(pipeline.model, data, seed=options.seed, batch_size=options.batch_size)
    laplace.optimize_prior_precision(options.prior_precision, **held_out)


def describe(laplace: LastLayerLaplace) -> dict[str, Any]:
    """What was found, for the record and the screen."""
    found = {
        "curvature": laplace.curvature,
        "layer": laplace.name,
        "entries": laplace.layer.width,
        "channels": laplace.layer.outputs,
        "images": int(laplace.fitted().images),
        "draws": laplace.repeats,
        "data_size": laplace.data_size,
        "sigma_noise": [round(each, 6) for each in laplace.sigma_noise.tolist()],
        "prior_precision": float(f"{laplace.prior_precision:.6g}"),
    }
    if laplace.curvature != "isotropic":
        spectrum = laplace.spectrum()
        found["log_marginal_likelihood"] = laplace.log_marginal_likelihood()
        found["parameters_determined"] = float((spectrum / (spectrum + laplace.prior_precision)).sum())
    return found


def main(argv: list[str] | None = None) -> Path:
    parser = get_parser()
    options = parser.parse_args(argv)
    if options.published:
        for name, value in PUBLISHED.items():
            if getattr(options, name) not in (value, parser.get_default(name)):
                raise ValueError(f"--published sets --{name} to {value}: leave out --{name} {getattr(options, name)}")
            setattr(options, name, value)
    out = Path(options.out)
    if (out / "laplace.yaml").exists() and not options.overwrite:
        raise FileExistsError(f"{out} holds a posterior; choose another folder, or --overwrite")
    pipeline = open_model(options)
    check(options, pipeline)
    if options.merge:
        laplace, config = load_laplace(options.merge[0], pipeline.model.network), {"merged": options.merge}
        for folder in options.merge[1:]:
            laplace = laplace.merge(load_laplace(folder, pipeline.model.network))
    else:
        data, config = data_of(options, pipeline, options.split)
        laplace = fit_parts(options, pipeline, data, config)
    if laplace is None:
        print(f"{out}: this process is done; the one that finishes last writes the posterior (or running once more)")
        return out
    tune(options, pipeline, laplace)
    found = describe(laplace)
    source = {"checkpoint": str(pipeline.checkpoint), **pipeline.describe(), "data": config, "seed": options.seed}
    save_laplace(laplace, out, source, options.overwrite)
    write_record(out / "record.json", vars(options), overwrite=True, found=found)
    for name, value in found.items():
        print(f"{name:>24}  {value}")
    return out


if __name__ == "__main__":
    run_script(main)
