"""How much of an image is recognised under noise: classifiers told the noise level, and their rate at each level.

Examples:
  python scripts/noisy_classifier.py ddae --run logs/2026-01-01T00-00-00_mnist --layers mid --out results/noisy_ddae
  python scripts/noisy_classifier.py wrn --base configs/ddae/DDPM_ddpm.yaml --mode VP --out results/noisy_vp
  python scripts/noisy_classifier.py wrn --base configs/ddae/mnist.yaml --mode VE --depth 10 --width 1 --epochs 2 \\
      --beside results/noisy_ddae/recognition.csv --out results/noisy_ve
  python scripts/noisy_classifier.py adm --base configs/guided-diffusion/mnist-classifier.yaml \\
      --ckpt logs/2026-01-01T00-00-00_classifier/checkpoints/last.ckpt --out results/noisy_adm

ddae trains a small head on the frozen features of a diffusion model, which see the model's own noise; wrn a wide
residual network from scratch under VP noise (1,000 steps of DDPM) or VE noise (EDM); adm trains nothing: it takes a
classifier that main.py trained to guide a diffusion model, under that model's noise. Images come from the config.
Writes the weights of what was trained, recognition.csv (rate by log signal-to-noise ratio) and recognition.png;
--beside draws other runs' tables into the same figure.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.arguments import add_source_arguments, open_model
from ldm.checkpoint import save_tensors
from ldm.cli import HelpFormatter, add_device_arguments, run_script
from ldm.diffusion.schedule import EDMSchedule, Schedule, VPSchedule, make_betas
from ldm.diffusion.training_times import LogNormalNoise
from ldm.evaluation.noise_conditional import (
    WRN_TRAINING,
    BackboneClassifier,
    NetworkClassifier,
    NoiseHead,
    NoisyTraining,
    level_times,
    recognition,
    train_noisy,
)
from ldm.evaluation.taps import Reading, resolve_taps
from ldm.experiments.probes import draw_probe_positions
from ldm.jobs import pick_device, step_bar
from ldm.models.diffusion.classifier import NoisyClassifier
from ldm.modules.wide_resnet import WideResNet
from ldm.pipelines import build_model
from ldm.pipelines.features import INDEX_STEPS, DataStates, edm_index_times, make_backbone
from ldm.records import refuse_existing, write_record
from ldm.report.probes import line_plot
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.training.config import load_config
from ldm.util import instantiate_from_config


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    words = {"formatter_class": HelpFormatter, "description": __doc__}
    ddae = commands.add_parser("ddae", help="a head on a diffusion model's features", **words)
    add_source_arguments(ddae)
    ddae.add_argument("--epoch", type=int, help="the checkpoint that --run kept of this epoch")
    ddae.add_argument("--layers", nargs=1, help="the tap (default: the config's probe.layer)")
    ddae.add_argument("--pool", default="1", help="k: means of a k x k grid of the map; none: every position")
    ddae.add_argument("--label", type=int, help="class that a conditional trunk sees (default: its null class)")
    ddae.add_argument("--precision", default="float32", choices=("float32", "bf16", "fp16"), help="of the trunk")
    ddae.set_defaults(chunk=1)
    wrn = commands.add_parser("wrn", help="a wide residual network", **words)
    wrn.add_argument("--base", required=True, help="config whose images it is trained on")
    adm = commands.add_parser("adm", help="a classifier for guidance, trained by main.py", **words)
    adm.add_argument("--base", required=True, help="its config, a NoisyClassifier with its data")
    adm.add_argument("--ckpt", required=True, help="its weights")
    for command in (wrn, adm):
        command.add_argument("words", nargs="*", default=[], help="a.b=c changes a value of the config")
    wrn.add_argument("--mode", default="VP", choices=("VP", "VE"), help="noise of DDPM or of EDM")
    wrn.add_argument("--depth", type=int, default=28, help="layers, 6 n + 4")
    wrn.add_argument("--width", type=int, default=10, help="multiplies 16, 32, 64 channels")
    for command, training in ((ddae, NoisyTraining()), (wrn, WRN_TRAINING)):
        add = command.add_argument
        for name in ("epochs", "batch_size", "warm_up"):
            add(f"--{name}", type=int, default=getattr(training, name), help=f"{name} of the training")
        add("--learning_rate", type=float, default=training.learning_rate, help="rate at its highest")
        add("--n_train", type=int, help="training images, drawn by --seed (default: all)")
        command.set_defaults(training=training)
    for command in (ddae, wrn, adm):
        add = command.add_argument
        add("--n_test", type=int, help="test images, drawn by --seed (default: all)")
        add("--beside", nargs="+", default=[], metavar="CSV", help="recognition.csv of other runs, for the figure")
        add("--out", required=True, help="folder of the output")
        add("--overwrite", action="store_true", help="replace outputs that exist")
        add_device_arguments(command)
    return parser


def levels_of(schedule: Schedule) -> tuple[torch.Tensor, list[float]]:
    """Times that heads are trained on, and those they are tested at: 1 .. T and every 50th, or EDM's steps."""
    if isinstance(schedule, VPSchedule):
        trained = torch.arange(1, schedule.end + 1, dtype=torch.float64)
        return trained, trained[:: max(1, schedule.end // 20)].tolist()
    trained = torch.tensor(edm_index_times(schedule, range(1, INDEX_STEPS + 1)), dtype=torch.float64)
    return trained, trained.tolist()


def head_of(options: argparse.Namespace):
    """(classifier, schedule, times, model, config, what trains) on a diffusion model's features."""
    pipeline = open_model(options)
    trunk = make_backbone(pipeline.model, options.label)
    layers = options.layers or [(pipeline.config.get("probe") or {}).get("layer")]
    if layers == [None]:
        raise ValueError("which layer? Give --layers, or probe.layer in the config")
    tap, schedule = resolve_taps(trunk.network, layers), pipeline.model.schedule
    levels, _ = levels_of(schedule)
    zero = torch.zeros((1, *pipeline.model.latent_shape), device=pipeline.device)
    reading = Reading((float(levels[0]),), tap, None if options.pool == "none" else int(options.pool))
    (width,) = {value.shape[1] for value in trunk.features(zero, [0], reading).values()}
    classes = instantiate_from_config(pipeline.config["data"]["params"]["train"]).n_classes
    head = NoiseHead(width, classes).to(pipeline.device)
    classifier = BackboneClassifier(trunk, tap, levels, head, reading.pool)
    return classifier, schedule, level_times(levels), pipeline.model, pipeline.config, head


def network_of(options: argparse.Namespace):
    """The same of a wide residual network."""
    device = pick_device(options.device)
    config = load_config([options.base], options.words, needs=("model", "data"))
    schedule: Schedule = VPSchedule(make_betas("sqrt_linear", 1000)) if options.mode == "VP" else EDMSchedule()
    times = level_times(levels_of(schedule)[0])
    if options.mode == "VE":

        def times(uniform: torch.Tensor) -> torch.Tensor:
            return LogNormalNoise()(uniform, schedule)

    model = build_model(config).to(device)
    classes = instantiate_from_config(config.data.params.train).n_classes
    network = WideResNet(options.depth, options.width, classes, model.channels).to(device)
    return NetworkClassifier(network, schedule), schedule, times, model, config, network


def guide_of(options: argparse.Namespace):
    """The same of a classifier that main.py trained, of which nothing trains here."""
    config = load_config([options.base], options.words, needs=("model", "data"))
    model = instantiate_from_config(config.model)
    if not isinstance(model, NoisyClassifier):
        raise ValueError(f"{options.base} names {config.model.target}: expected the config of a NoisyClassifier")
    model.init_from_ckpt(options.ckpt)
    model = model.to(pick_device(options.device)).requires_grad_(False)
    classifier = NetworkClassifier(model.classifier, model.schedule, model.schedule.time_to_net)
    return classifier, model.schedule, None, model, config, None


MAKERS = {"ddae": head_of, "wrn": network_of, "adm": guide_of}


def images_of(model, config, split: str, wanted: int | None, seed: int) -> DataStates:
    """Images of a config's data set as the model's states: all, or `wanted` of them."""
    params = OmegaConf.to_container(OmegaConf.create(config)["data"]["params"], resolve=True)
    data = instantiate_from_config(params[split])
    return DataStates(model, data, draw_probe_positions(len(data), wanted, seed))


def train(options: argparse.Namespace, classifier, states: DataStates, times) -> None:
    """Train what of a classifier trains, under the options' training."""
    given = {name: getattr(options, name) for name in ("epochs", "batch_size", "warm_up", "learning_rate")}
    with step_bar("training") as progress:
        train_noisy(classifier, states, times, replace(options.training, **given), options.seed, progress)


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    refuse_existing([out / "recognition.csv"], options.overwrite)
    beside = {Path(file).parent.name: read_csv(file) for file in options.beside}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        classifier, schedule, times, model, config, trained = MAKERS[options.command](options)
    if trained is not None:
        train(options, classifier, images_of(model, config, "train", options.n_train, options.seed), times)
    tests, levels = images_of(model, config, "validation", options.n_test, options.seed), levels_of(schedule)[1]
    with tqdm(desc="recognition", total=len(tests), unit="image") as bar:
        rates = recognition(classifier, tests, levels, options.seed, progress=bar.update)
    rows = [
        {"t": u, "log_snr": -2 * float(schedule.ratio(u).log()), "recognised": 100 * rate}
        for u, rate in zip(levels, rates, strict=True)
    ]
    parameters = 0
    if trained is not None:
        parameters = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        save_tensors(trained.state_dict(), out / "classifier.safetensors", overwrite=options.overwrite)
    write_csv(out / "recognition.csv", rows, ["% of test images recognised at each noise level"], options.overwrite)
    curves = {
        name: ([row["log_snr"] for row in table], [row["recognised"] for row in table])
        for name, table in {out.name: rows, **beside}.items()
    }
    label = "log signal-to-noise ratio, 2 ln(alpha / sigma)"
    line_plot(curves, out / "recognition.png", label, "test images recognised (%)", overwrite=options.overwrite)
    write_record(out / "record.json", vars(options), overwrite=True, parameters=parameters)
    print(markdown_table(rows))
    return rows


if __name__ == "__main__":
    run_script(main)
