"""Train a model from YAML configs: a trunk, or one component of an ensemble on a frozen trunk.

Examples:
  python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --name digits
  python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --start_from_pretrained \\
      --logdir logs --seed 0 --component 0 --ensemble_name bootstrapped
  python main.py --resume logs/2026-01-01T00-00-00_digits -t --gpus 0, --max_steps 5000

Options of Lightning's Trainer are taken as --name value (--max_steps 100, --precision bf16-mixed); whatever remains
is a dotlist over the config (model.params.parameterization=v data.params.batch_size=32). Configs merge from left to
right; with --start_from_pretrained the section `components` of the config goes on top.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar

from ldm.cli import run_script, str2bool, write_record
from ldm.data.module import DataModuleFromConfig, WrappedDataset
from ldm.training.callbacks import (
    CUDACallback,
    EMACallback,
    ImageLogger,
    SaveWhenStopped,
    SeededSteps,
    SetupCallback,
    StopAtNaN,
)
from ldm.training.config import load_config, point_data
from ldm.training.runs import RunDirectory, find_run, new_run
from ldm.training.trainer import TRAINER_KEYS, device_count, device_options, split_trainer_options
from ldm.util import instantiate_from_config

__all__ = [
    "CUDACallback",
    "DataModuleFromConfig",
    "ImageLogger",
    "LearningRateMonitor",
    "SetupCallback",
    "WrappedDataset",
    "main",
]

log = logging.getLogger("main")


def get_parser() -> argparse.ArgumentParser:
    """latent-diffusion's options, DECU's, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = {"type": str2bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    parser.add_argument("-n", "--name", default="", help="name of the run directory (default: the first config's name)")
    parser.add_argument("-r", "--resume", default="", help="run directory or checkpoint to continue")
    parser.add_argument(
        "-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged from left to right"
    )
    parser.add_argument("-t", "--train", **flag, help="train (without it the run is set up and only tested)")
    parser.add_argument("--no-test", **flag, help="skip the test set after training")
    parser.add_argument("-p", "--project", default="", help="accepted for compatibility; the run name is what counts")
    parser.add_argument("-d", "--debug", **flag, help="log at debug level, and do not save when an error stops the run")
    parser.add_argument("-s", "--seed", type=int, default=23, help="seed of every draw (default 23)")
    parser.add_argument("-f", "--postfix", default="", help="appended to the run's name")
    parser.add_argument("-l", "--logdir", default="logs", help="where run directories are made (default logs)")
    parser.add_argument(
        "--scale_lr",
        **{**flag, "default": True},
        help="multiply the rate by devices * batch * accumulation (default True)",
    )
    parser.add_argument("--gpus", default=None, help="'0,' or '0,1' or a count; without CUDA the CPU is used")
    parser.add_argument("--cpus", type=int, default=1, help="processes when training on the CPU (default 1)")
    group = parser.add_argument_group("components of an ensemble")
    group.add_argument(
        "--start_from_pretrained", **flag, help="freeze the trunk of model.params.pretrained_path, train heads"
    )
    group.add_argument(
        "--component", type=int, default=0, help="number of this component: its data and its start (default 0)"
    )
    group.add_argument("--ensemble_name", default="", help="goes into the run's name, for save_ensemble.py")
    group.add_argument("--overwrite_data_root", default="", help="root folder of the training and validation data")
    group.add_argument("--synset_bins", **flag, help="handed to data sets that take it")
    return parser


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, object], list[str]]:
    """(our options, Trainer options, dotlist)."""
    parser = get_parser()
    options, rest = parser.parse_known_args(argv)
    trainer_options, dotlist = {}, [word for word in options.base if "=" in word]
    options.base, rest = [word for word in options.base if "=" not in word], list(rest)
    while rest:
        word = rest.pop(0)
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in TRAINER_KEYS:
            if not _:
                if not rest:
                    parser.error(f"--{key} needs a value")
                value = rest.pop(0)
            trainer_options[key] = (
                OmegaConf.create([]) if value == "" else OmegaConf.from_dotlist([f"value={value}"]).value
            )
        elif not word.startswith("-") and "=" in word:
            dotlist.append(word)
        else:
            parser.error(
                f"unknown option '{word}': expected an option of --help, of Lightning's Trainer, or key.path=value"
            )
    if options.name and options.resume:
        parser.error("-n/--name and -r/--resume cannot be given together: a resumed run keeps its directory")
    if not options.base and not options.resume:
        parser.error("give a config (--base FILE.yaml) or a run to continue (--resume DIR)")
    return options, trainer_options, dotlist


def build_callbacks(
    run: RunDirectory, config: DictConfig, lightning: DictConfig, options: argparse.Namespace, monitor: str | None
):
    """Our defaults, changed or switched off by `lightning.callbacks.{name}`, and the checkpoint writer."""
    given = OmegaConf.to_container(lightning.get("callbacks") or OmegaConf.create({}), resolve=True)
    image_logger = ImageLogger(
        **(given.pop("image_logger", None) or {}).get("params", {"batch_frequency": 750, "max_images": 4})
    )
    member = options.component if options.start_from_pretrained else 0
    callbacks = [
        SetupCallback(run, config, lightning),
        EMACallback(),
        SeededSteps(options.seed, member),
        image_logger,
        StopAtNaN(),
    ]
    callbacks += [LearningRateMonitor(logging_interval="step"), CUDACallback()]
    callbacks += [instantiate_from_config(callback) for callback in given.values() if callback and "target" in callback]
    checkpoint = {"filename": "{epoch:06}", "save_last": True, "auto_insert_metric_name": True}
    checkpoint.update(
        (OmegaConf.to_container(lightning.get("modelcheckpoint") or OmegaConf.create({})) or {}).get("params") or {}
    )
    if checkpoint.get("save_top_k", 1) not in (0, -1) and checkpoint.get("monitor", monitor) is not None:
        checkpoint.setdefault("monitor", monitor)
    callbacks.append(ModelCheckpoint(dirpath=run.checkpoints, **checkpoint))
    if lightning.trainer.get("enable_progress_bar", True):
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    return callbacks + ([] if options.debug else [SaveWhenStopped(run)])


def learning_rate(config: DictConfig, options: argparse.Namespace, accumulate: int) -> float:
    """The base rate, times devices * batch size * accumulation where --scale_lr is on."""
    base = config.model.base_learning_rate
    if not options.scale_lr:
        return base
    devices = max(1, device_count(options.gpus, options.cpus))
    return accumulate * devices * config.data.params.batch_size * base


def set_up(options: argparse.Namespace, trainer_options: dict[str, object], dotlist: list[str]):
    """Model, data, trainer and run directory, ready to fit."""
    resumed, checkpoint = find_run(options.resume) if options.resume else (None, None)
    if resumed:
        for key, value in resumed.config().run.items():
            setattr(options, key, value)
    start = [resumed.config(), OmegaConf.create({"lightning": resumed.config("lightning")})] if resumed else []
    config = load_config(options.base, dotlist, options.start_from_pretrained, start)
    component = options.component if options.start_from_pretrained else None
    config = point_data(config, component, options.overwrite_data_root, options.synset_bins)
    lightning = config.pop("lightning", OmegaConf.create())
    chosen = {**(lightning.get("trainer") or {}), **trainer_options}
    gpus = options.gpus if options.gpus is not None else chosen.get("gpus")
    name = (options.name or Path((options.base or ["run"])[0]).stem) + options.postfix
    name += f"_{options.ensemble_name}{options.seed}" if options.ensemble_name else ""

    model = instantiate_from_config(config.model)
    if options.start_from_pretrained:
        model.start_from_pretrained(options.component, options.seed)
    member = options.component if options.start_from_pretrained else 0
    model.seed_draws(options.seed, member)
    data = instantiate_from_config(config.data)
    data.seed, data.member = options.seed, member
    options.gpus = gpus
    model.learning_rate = learning_rate(config, options, int(chosen.get("accumulate_grad_batches", 1)))

    run = resumed or new_run(options.logdir, name)
    kept = ("seed", "component", "ensemble_name", "start_from_pretrained", "scale_lr")
    saved = OmegaConf.merge(config, {"run": {key: getattr(options, key) for key in kept}})
    write_record(run.path / "record.json", options, overwrite=True)
    callbacks = build_callbacks(
        run, saved, OmegaConf.merge(lightning, {"trainer": chosen}), options, getattr(model, "monitor", None)
    )
    csv = "csv" if not resumed else f"csv_resumed_{len(list(run.path.glob('csv*')))}"
    loggers = [
        pl.loggers.TensorBoardLogger(run.path, name="tensorboard", version=""),
        pl.loggers.CSVLogger(run.path, name=csv, version=""),
    ]
    settings = {"max_epochs": -1 if chosen.get("max_steps") else 1000, **split_trainer_options(chosen)}
    trainer = pl.Trainer(
        default_root_dir=run.path, callbacks=callbacks, logger=loggers, use_distributed_sampler=False,
        **{**device_options(gpus, options.cpus), **settings},
    )  # fmt: skip
    return model, data, trainer, run, checkpoint


def main(argv: list[str] | None = None) -> Path:
    """Run one training; return its directory. Exit codes: 130 after Ctrl-C, 143 after SIGTERM."""
    options, trainer_options, dotlist = parse(argv)
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    pl.seed_everything(options.seed, verbose=False)
    model, data, trainer, run, checkpoint = set_up(options, trainer_options, dotlist)
    log.info("run directory: %s  learning rate: %.3g", run.path, model.learning_rate)
    if options.train:
        try:
            trainer.fit(model, data, ckpt_path=checkpoint)
        except SystemExit:
            if trainer.received_sigterm:
                sys.exit(128 + signal.SIGTERM)
            sys.exit(128 + signal.SIGINT if trainer.interrupted else 1)
        trainer.save_checkpoint(run.checkpoints / "last.ckpt")
        write_record(run.path / "finished.json", options, overwrite=True, step=trainer.global_step)
    if not options.no_test and "test" in data.dataset_configs:
        trainer.test(model, data)
    log.info("done: %s", run.path)
    return run.path


if __name__ == "__main__":
    run_script(main)
