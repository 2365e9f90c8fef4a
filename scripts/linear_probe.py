"""What does a diffusion model know of classes? Linear probes of its features at every layer and noise level.

Examples:
  python scripts/linear_probe.py --run logs/2026-01-01T00-00-00_mnist --grid --out results/probe
  python scripts/linear_probe.py --run logs/2026-01-01T00-00-00_mnist --grid --epoch 49 --t 11 41 101 --untrained \\
      --pixels --out results/probe
  python scripts/linear_probe.py --run logs/2026-01-01T00-00-00_mnist --t 11 --layers out_6 --out results/one
  python scripts/linear_probe.py --base configs/ddae/EDM_ddpmpp.yaml --ckpt model.ckpt --index 3 4 5 --grid --out DIR
  python scripts/linear_probe.py --run RUN --t 11 --layers out_6 --finetune --tuning_epochs 5 --out results/tuned

With --grid all (noise level, layer) heads train together: the trunk passes once a noise level, one optimiser holds
every head. Heads are chosen on held-out training images (--validation), averaged over --seeds, and the chosen place is
tested once a seed. --untrained and --pixels do the same with fresh weights and with raw pixels. --finetune trains the
encoder with its head, once a seed. Levels and layers come from the options or the config's section `probe`.
A stopped run continues; its features are kept in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ldm.arguments import add_reading_arguments, add_source_arguments, make_feature_reading, open_model
from ldm.cli import HelpFormatter, add_device_arguments, run_script
from ldm.evaluation.finetuning import Tuning
from ldm.evaluation.probe import ProbeResult, ProbeTraining
from ldm.evaluation.taps import Reading
from ldm.experiments.probes import ProbeStudy
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.features import log_snr, make_backbone, make_reading, reinitialise
from ldm.records import refuse_existing, write_record
from ldm.report.probes import heat_map
from ldm.report.tables import markdown_table, write_csv


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--epoch", type=int, help="the checkpoint that --run kept of this epoch instead of its last")
    add_reading_arguments(parser)
    add = parser.add_argument
    add("--grid", action="store_true", help="search all layers and the levels given, or those of the config's grid")
    add("--seeds", type=int, default=3, help="splits, orders and test noises")
    add("--n_train", type=int, help="training images, drawn by --seed (default: all)")
    add("--copies", type=int, default=1, help="noised and augmented copies of each training image; epochs take turns")
    add("--latent_cache", help="folder for latents of a model with a first stage: images are encoded once a copy")
    add("--validation", type=float, default=0.1, help="share of the training images that heads are chosen on")
    defaults = ProbeTraining()
    add("--epochs", type=int, default=defaults.epochs, help="passes of the heads over the features")
    add("--batch_size", type=int, default=defaults.batch_size, help="images in a step")
    add("--learning_rate", type=float, default=defaults.learning_rate, help="Adam's rate at the start")
    add("--standardise", action=argparse.BooleanOptionalAction, default=True, help="features to mean 0, deviation 1")
    add("--untrained", action="store_true", help="also probe the same network with fresh weights")
    add("--pixels", action="store_true", help="also probe raw pixels")
    add("--finetune", action="store_true", help="also train the encoder up to the chosen place")
    add("--tuning_epochs", type=int, default=Tuning().epochs, help="passes of --finetune over the images")
    add("--tuning_rate", type=float, default=Tuning().learning_rate, help="rate of --finetune; the head's is 10 x")
    add("--out", required=True, help="folder of the output")
    add("--overwrite", action="store_true", help="replace tables and figures that exist")
    add_device_arguments(parser)
    return parser


def write_grid(
    name: str, result: ProbeResult, reading: Reading, model: LatentDiffusion, out: Path, overwrite: bool
) -> None:
    """Validation accuracies of every place as a table, and as a heat map where there are several."""
    rows = []
    for place in reading.places:
        values = [100 * seed[place] for seed in result.validation]
        rows.append({
            "t": place[0], "log_snr": log_snr(model, place[0]), "layer": place[1],
            "validation": float(np.mean(values)), "deviation": float(np.std(values)), "chosen": place == result.place,
        })  # fmt: skip
    note = (
        f"linear probe of {name}: % of validation images recognised, mean and s.d. over {len(result.validation)} seeds"
    )
    write_csv(out / f"{name}.csv", rows, [note], overwrite)
    if len(rows) == 1:
        return
    layers = list(reading.taps)
    values = np.array([row["validation"] for row in rows]).reshape(len(reading.times), len(layers)).T
    columns = [f"{u:.4g}\n({log_snr(model, u):.1f})" for u in reading.times]
    u, tap = result.place
    where = (layers.index(tap), reading.times.index(u))
    labels = ("validation accuracy (%)", "time (log-SNR)", "layer", f"{name}: test {100 * result.mean:.2f} %")
    heat_map(values, layers, columns, out / f"{name}.png", *labels, chosen=where, overwrite=overwrite)


def main(argv: list[str] | None = None) -> dict[str, ProbeResult]:
    options = get_parser().parse_args(argv)
    pipeline, out = open_model(options), Path(options.out)
    refuse_existing([out / "results.csv"], options.overwrite)
    trunk = make_backbone(pipeline.model, options.label)
    reading = make_reading(pipeline, trunk, make_feature_reading(options), search=options.grid, seed=options.seed)
    study = ProbeStudy(pipeline, options, out / "features")
    results, tuned = {"trained": study.probe_backbone(trunk, reading, "trained")}, None
    if options.finetune:
        tuned = study.fine_tune(trunk, reading, results["trained"].place)
    if options.untrained:
        reinitialise(pipeline, options.seed)
        results["untrained"] = study.probe_backbone(trunk, reading, "untrained", f"untrained {options.seed}")
    if options.pixels:
        results["pixels"] = study.probe_pixels()
    rows = []
    for name, result in results.items():
        if name != "pixels":
            write_grid(name, result, reading, pipeline.model, out, options.overwrite)
        rows.append({
            "features": name, "t": result.place[0], "layer": result.place[1], "test": 100 * result.mean,
            "deviation": 100 * result.deviation, "seeds": len(result.test),
        })  # fmt: skip
    if tuned is not None:
        u, tap = results["trained"].place
        rows.append({
            "features": "fine-tuned", "t": u, "layer": tap, "test": 100 * float(np.mean(tuned)),
            "deviation": 100 * float(np.std(tuned)), "seeds": len(tuned),
        })  # fmt: skip
    note = "% of test images recognised at the place chosen on validation images: mean and s.d. over seeds"
    write_csv(out / "results.csv", rows, [note], options.overwrite)
    errors = [
        {"features": name, "class": label, "error": 100 * float(np.mean([seed[label] for seed in result.errors]))}
        for name, result in results.items()
        for label in range(study.classes)
    ]
    write_csv(out / "errors.csv", errors, ["% of each class's test images that the probe mistakes"], options.overwrite)
    facts = {"checkpoint": str(pipeline.checkpoint), "reading": reading.describe(), "n_train": len(study.positions)}
    write_record(out / "record.json", vars(options), overwrite=True, **facts)
    print(markdown_table(rows))
    return results


if __name__ == "__main__":
    run_script(main)
