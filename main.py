"""Train a model from YAML configs: a trunk, or one component of an ensemble on a frozen trunk.

Examples:
  python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --name digits
  python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --start_from_pretrained \\
      --logdir logs --seed 0 --component 0 --ensemble_name bootstrapped
  python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --start_from_pretrained \\
      --logdir logs --seed 0 --component all --members 5 --ensemble_name bootstrapped
  python main.py --resume logs/2026-01-01T00-00-00_digits -t --gpus 0, --max_steps 5000

Options of Lightning's Trainer are taken as --name value (--max_steps 100, --precision bf16-mixed, --gradient_clip_val
1); whatever remains is a dotlist over the config (model.params.parameterization=v data.params.batch_size=32). Configs
merge from left to right; with --start_from_pretrained the section `components` of the config goes on top.
data.params.batch_size counts images of one device; data.params.global_batch_size, in its place, those of all.
model.base_learning_rate is multiplied as --scale_lr says; model.learning_rate, in its place, is taken as it is, so that
a config with it and a global batch trains alike on any number of devices. Two rates that differ are an error.

A resumed run gives the losses of one that was never stopped. Signals act at the end of a step:
  Ctrl-C    saves checkpoints/last.ckpt and exits with 130; a second Ctrl-C exits at once and saves nothing
  SIGTERM   saves and exits with 143
  SIGUSR2   saves and goes on
  SIGUSR1   under SLURM (sbatch --signal=USR1@90 --requeue, and srun before python: docs/slurm.md): saves and requeues
            the job, which then finds its run directory again under the same --logdir
A loss that is not finite ends the run with its step and exit code 1, and so does an error in what was given; the last
checkpoint is kept. Exit code 2 is an unknown option.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import signal
import sys
from pathlib import Path
from typing import Any

from ldm.cli import run_script, str2bool

# What configs and scripts look for here; imported when it is asked for, so that --help does not wait for Lightning.
EXPORTS = {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.data.module",
    "ImageLogger": "ldm.training.callbacks",
    "LearningRateMonitor": "pytorch_lightning.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.data.module",
}

DOTTED = re.compile(r"\w+(\.\w+)+=")

log = logging.getLogger("main")


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(importlib.import_module(EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_parser() -> argparse.ArgumentParser:
    """latent-diffusion's options, DECU's, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = {"type": str2bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", default="", help="name of the run directory (default: the first config's name)")
    add("-r", "--resume", default="", help="run directory or checkpoint to continue")
    add("--epoch", type=int, help="with --resume DIR: continue the checkpoint kept of this epoch (default: the last)")
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged from left to right")
    add("-t", "--train", **flag, help="train (without it the run is set up and only tested)")
    add("--no-test", **flag, help="skip the test set after training")
    add("-p", "--project", default="", help="project of Weights & Biases (default decu), see ldm/training/wandb.py")
    add("-d", "--debug", **flag, help="log at debug level, and do not save when an error stops the run")
    add("-s", "--seed", type=int, default=23, help="seed of every draw (default 23)")
    add("-f", "--postfix", default="", help="appended to the run's name")
    add("-l", "--logdir", default="logs", help="where run directories are made (default logs)")
    scale = "multiply the rate by devices * batch * accumulation (default True)"
    add("--scale_lr", **{**flag, "default": True}, help=scale)
    add("--gpus", default=None, help="'0,' or '0,1' or a count; without CUDA the CPU is used")
    add("--cpus", type=int, default=1, help="processes when training on the CPU (default 1)")
    every = "keep a checkpoint every N {}, by name (before lightning.modelcheckpoint.params)"
    add("--every_n_epochs", type=int, metavar="N", help=every.format("epochs"))
    add("--every_n_steps", type=int, metavar="N", help=every.format("optimiser steps"))
    add = parser.add_argument_group("components of an ensemble").add_argument
    add("--start_from_pretrained", **flag, help="freeze the trunk of model.params.pretrained_path, train heads")
    number = "number of this component: its data and its start (default 0); or all: train every one, on one trunk"
    add("--component", type=component_of, default=0, metavar="N|all", help=number)
    add(
        "--members",
        type=int,
        help="with --component all: how many; their seeds are --seed, --seed + 1, ... (default 5)",
    )
    add("--ensemble_name", default="", help="goes into the run's name, for save_ensemble.py")
    add("--overwrite_data_root", default="", help="root folder of the training and validation data")
    add("--synset_bins", **flag, help="handed to data sets that take it")
    return parser


def component_of(text: str) -> int | str:
    """A number, or "all"."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number from 0, or all; got '{text}'")
    return text if text == "all" else int(text)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, object], list[str]]:
    """(our options, Trainer options, dotlist)."""
    parser = get_parser()
    words = sys.argv[1:] if argv is None else argv
    # Taken out first: a flag before it would take `a.b=c` for its value.
    dotlist = [word for word in words if DOTTED.match(word)]
    options, rest = parser.parse_known_args([word for word in words if not DOTTED.match(word)])
    trainer_options, more = trainer_words(parser, rest) if rest else ({}, [])
    if options.name and options.resume:
        parser.error("-n/--name and -r/--resume cannot be given together: a resumed run keeps its directory")
    if not options.base and not options.resume:
        parser.error("give a config (--base FILE.yaml) or a run to continue (--resume DIR)")
    if options.epoch is not None and not options.resume:
        parser.error("--epoch chooses a checkpoint of the run that --resume DIR continues")
    if options.component == "all" and not options.resume:
        if not (options.start_from_pretrained and options.ensemble_name):
            parser.error("--component all needs --start_from_pretrained, and --ensemble_name for the members' runs")
        options.members = 5 if options.members is None else options.members
    elif options.members is not None:
        parser.error("--members goes with --component all")
    return options, trainer_options, dotlist + more


def trainer_words(parser: argparse.ArgumentParser, words: list[str]) -> tuple[dict[str, object], list[str]]:
    """Trainer options and dotlist among the words that our parser does not know."""
    from omegaconf import OmegaConf

    from ldm.training.trainer import TRAINER_KEYS

    options, dotlist, words = {}, [], list(words)
    while words:
        word = words.pop(0)
        key, given, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in TRAINER_KEYS:
            if not given and not words:
                parser.error(f"--{key} needs a value")
            value = value if given else words.pop(0)
            options[key] = OmegaConf.create([]) if value == "" else OmegaConf.from_dotlist([f"value={value}"]).value
        elif not word.startswith("-") and "=" in word:
            dotlist.append(word)
        else:
            parser.error(
                f"unknown option '{word}': expected an option of --help, of Lightning's Trainer, or key.path=value"
            )
    return options, dotlist


def main(argv: list[str] | None = None) -> Path:
    """Run one training; return its directory. Exit codes: see --help."""
    options, trainer_options, dotlist = parse(argv)
    from ldm.training import session
    from ldm.training.quiet import quieten
    from ldm.training.stopping import StoppedBySignal

    level = logging.DEBUG if options.debug else logging.INFO if session.is_first() else logging.ERROR
    logging.basicConfig(format="%(message)s")
    for name in ("main", "ldm"):
        logging.getLogger(name).setLevel(level)
    if not options.debug:
        quieten()
    current = None
    try:
        current = session.set_up(options, trainer_options, dotlist, sys.argv[1:] if argv is None else argv)
        if options.train:
            current.fit()
        current.test()
    except StoppedBySignal as stop:
        sys.exit(128 + stop.signum if session.is_first() else 0)
    except FloatingPointError as error:
        sys.exit(f"error: {error}" if session.is_first() else 0)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit:
        terminated = current is not None and current.trainer.received_sigterm
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    log.info("done: %s", current.run.path)
    return current.run.path


if __name__ == "__main__":
    run_script(main)
