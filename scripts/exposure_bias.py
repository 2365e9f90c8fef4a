"""Measure the exposure bias of a model: norms of the predicted noise, delta_t with its floor, statistics of x_t.

Examples:
  python scripts/exposure_bias.py --run logs/2026-01-01T00-00-00_digits --steps 20 --n 1000 --out results/exposure
  python scripts/exposure_bias.py --run logs/2026-01-01T00-00-00_digits --steps 20 --n 1000 --eps_scaler 1.01 \\
      --out results/exposure_scaled
  python scripts/exposure_bias.py --base configs/guided-diffusion/cifar10-32.yaml \\
      --ckpt pretrained_models/adm/cifar10-32.pt --sampler DDPM --steps 20 --spacing respace --n 5000 \\
      --eps_scaler published --out results/exposure_cifar10

Images of the config's data (--split) are noised to the times' first time and sampled from there, without scaling
(`sampling`) and, where a scaling is given, with it (`scaled`); `training` are the same images noised to every time.
Any sampler and path will do, flows included. A stopped run continues; processes of torchrun or of a SLURM array share
the images, and the last to finish writes norms.csv, states.csv, norms.png, ratios.png, delta.png, distance.png,
moments.safetensors and record.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.arguments import add_model_arguments, open_model
from ldm.checkpoint import save_tensors
from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.epsilon_scaling import EpsilonScaling
from ldm.experiments.exposure import Chains, load_split, measured
from ldm.jobs import WorkList, shard_from_environment, split_range
from ldm.pipelines import ModelPipeline
from ldm.records import write_record
from ldm.report.exposure import (
    compute_factors,
    delta_plot,
    distance_plot,
    norm_plot,
    norm_table,
    ratio_plot,
    state_table,
)
from ldm.report.tables import markdown_table, write_csv


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=20)
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--n", type=int, default=1000, help="images")
    parser.add_argument("--split", default="train", help="data.params.SPLIT of the config")
    parser.add_argument("--batch_size", type=int, default=100, help="images in one pass, and in a file of the parts")
    return parser


def write_outputs(out: Path, pipeline: ModelPipeline, chains: Chains, moments: Any) -> None:
    """Tables, figures and the moments themselves."""
    path, times, names = pipeline.model.schedule, pipeline.times, list(chains.scalings)
    factors = {name: compute_factors(path, times, scaling) for name, scaling in chains.scalings.items()}
    norms, states = norm_table(path, times, moments, factors), state_table(path, times, moments, names)
    write_csv(out / "norms.csv", norms, overwrite=True)
    write_csv(out / "states.csv", states, overwrite=True)
    title = f"{pipeline.sampling.sampler}, {len(times) - 1} steps"
    norm_plot(norms, out / "norms.png", names, moments["data"].mean[0].numel(), title)
    ratio_plot(norms, out / "ratios.png", names, title)
    delta_plot(states, out / "delta.png", names, title)
    distance_plot(states, out / "distance.png", names, title)
    tensors = {f"{name}.{kind}": value for name, found in moments.items() for kind, value in found.tensors().items()}
    save_tensors(tensors, out / "moments.safetensors", overwrite=True)
    print(markdown_table(norms))


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    if options.n < 2 or options.batch_size < 1:
        raise ValueError(f"expected --n of at least 2 and --batch_size of at least 1, got {vars(options)}")
    out, pipeline = Path(options.out), open_model(options)
    scalings = {"sampling": EpsilonScaling()}
    if not pipeline.wrappers.scaling.off:
        scalings["scaled"] = pipeline.wrappers.scaling
    chains = Chains(pipeline, load_split(pipeline.config, options.split), scalings)
    settings = {**pipeline.describe(), "split": options.split}
    work = WorkList(out / "parts", settings, shard_from_environment())
    parts = split_range(options.n, options.batch_size)
    with tqdm(total=sum(len(parts[key]) for key in work.pending(parts)), desc="images", unit="image") as bar:
        moments = measured(chains, work, parts, bar.update)
    if moments is None:
        print(f"{out}: this process is done; the one that finishes last writes the outputs (or running once more)")
        return out
    write_outputs(out, pipeline, chains, moments)
    write_record(out / "record.json", vars(options), overwrite=True, settings=settings)
    print(f"{out}: norms.csv, states.csv and figures of {options.n} images")
    return out


if __name__ == "__main__":
    run_script(main)
