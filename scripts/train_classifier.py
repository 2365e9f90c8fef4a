"""Train the small classifier whose features FID, KID, CMMD, precision and recall use on small data, offline.

Examples:
  python scripts/train_classifier.py --base configs/evaluation/digits.yaml --out models/digits.safetensors
  python scripts/train_classifier.py --base configs/evaluation/mnist.yaml --out models/mnist.safetensors
  python scripts/train_classifier.py --base configs/evaluation/mnist.yaml --out models/m.safetensors paths.data_root=DIR
  python scripts/train_classifier.py --base configs/latent-diffusion/mnist.yaml --epochs 2 --out models/m32.safetensors

The config's data.params.train is learned from and data.params.validation tested on: any training's config will do.
Beside the weights lies NAME.yaml with the architecture, the data, the seed and the accuracy on the test images.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields, replace
from pathlib import Path

from omegaconf import OmegaConf

from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.classifier import (
    Architecture,
    ClassifierTraining,
    SmallClassifier,
    accuracy,
    record_path,
    save_classifier,
    train_classifier,
)
from ldm.jobs import pick_device, step_bar
from ldm.pipelines.images import DataSetImages
from ldm.records import record, refuse_existing
from ldm.training.config import load_config
from ldm.util import instantiate_from_config


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("words", nargs="*", default=[], help="a.b=c changes a value of the config")
    parser.add_argument("--base", nargs="+", required=True, help="configs with a section data, merged left to right")
    parser.add_argument("--out", required=True, help="weights to write, NAME.safetensors")
    names = {"epochs": int, "batch_size": int, "learning_rate": float, "shift": int}
    for name, kind in names.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{name} (config's classifier section, else its default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initial weights and order")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def training_of(section: dict, options: argparse.Namespace) -> tuple[ClassifierTraining, dict]:
    """How to train, and the architecture's own sizes, from the config's section and the options.

    Raises:
        ValueError: for a key that is neither.
    """
    known = {field.name for field in fields(ClassifierTraining)}
    sizes = {key: section[key] for key in section if key not in known}
    if unknown := set(sizes) - {"width", "num_features"}:
        raise ValueError(
            f"unknown keys {sorted(unknown)} in the section classifier; known: {sorted(known)}, width, num_features"
        )
    training = ClassifierTraining(**{key: value for key, value in section.items() if key in known})
    given = {name: getattr(options, name) for name in known if getattr(options, name, None) is not None}
    return replace(training, **given), sizes


def main(argv: list[str] | None = None) -> float:
    options = get_parser().parse_args(argv)
    out, device = Path(options.out), pick_device(options.device)
    refuse_existing([out, record_path(out)], options.overwrite)
    config = load_config(options.base, options.words, needs=("data",))
    sets = {name: OmegaConf.to_container(config.data.params[name], resolve=True) for name in ("train", "validation")}
    data = instantiate_from_config(sets["train"])
    images, labels = DataSetImages(data).everything()
    training, sizes = training_of(OmegaConf.to_container(config.get("classifier", OmegaConf.create())), options)
    _, channels, side, other = images.shape
    if side != other:
        raise ValueError(f"expected square images, got {side} x {other}")
    model = SmallClassifier(Architecture(channels, side, data.n_classes, **sizes), options.seed)
    began = time.process_time()
    with step_bar("steps") as progress:
        train_classifier(model, images, labels, training, options.seed, progress, device)
    seconds = time.process_time() - began
    tested = DataSetImages(instantiate_from_config(sets["validation"])).everything()
    rate = accuracy(model, *tested)
    facts = {
        "data": sets,
        "training": vars(training),
        "seed": options.seed,
        "test_accuracy": rate,
        "test_images": len(tested[1]),
        "cpu_seconds": round(seconds, 1),
        "record": json.loads(json.dumps(record(vars(options)), default=str)),
    }
    save_classifier(model, out, facts, options.overwrite)
    print(f"{out}: {rate:.2%} of {len(tested[1])} test images recognised, {seconds:.0f} s of CPU time")
    return rate


if __name__ == "__main__":
    run_script(main)
