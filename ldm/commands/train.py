"""`decu train` (main.py): train a model from YAML configs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ldm.commands.failures import end_bars
from ldm.options import option
from ldm.settings import Training


@dataclass(frozen=True)
class Train:
    """Train a model from YAML configs: a base model, or members of an ensemble on a frozen base model.

    Examples:
      python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False --name digits
      python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False \\
          --start_from_pretrained --logdir logs --seed 0 --component 0 --ensemble_name bootstrapped
      python main.py --base configs/latent-diffusion/digits.yaml -t --gpus 0, --scale_lr False \\
          --start_from_pretrained --logdir logs --seed 0 --component all --members 5 --ensemble_name bootstrapped
      python main.py --resume logs/2026-01-01T00-00-00_digits -t --gpus 0, --max_steps 5000

    Options of Lightning's Trainer are taken as --name value (--max_steps 100, --precision bf16-mixed,
    --gradient_clip_val 1). Words a.b=c change the config (model.params.parameterization=v data.params.batch_size=32).
    Configs merge from left to right; with --start_from_pretrained the section `components` of the config goes on top.
    data.params.batch_size counts the images of one device, and data.params.global_batch_size, in its place, those of
    all. model.base_learning_rate is multiplied as --scale_lr says; model.learning_rate, in its place, is taken as it
    is, so that a config with it and a global batch trains alike on any number of devices. Two rates that differ are
    an error.

    A resumed run gives the losses of one that was never stopped. Signals act at the end of a step:
      Ctrl-C    saves checkpoints/last.ckpt and exits with 130; a second Ctrl-C exits at once and saves nothing
      SIGTERM   saves and exits with 143
      SIGUSR2   saves and goes on
      SIGUSR1   under SLURM (sbatch --signal=USR1@90 --requeue, and srun before python: docs/slurm.md): saves and
                requeues the job, which then finds its run directory again under the same --logdir

    A loss that is not finite ends the run with its step and exit code 1, and so does an error in what was given; the
    last checkpoint is kept. Exit code 2 is an unknown option.
    """

    training: Training
    train: Annotated[bool, option("-t")] = False
    """Train; without it the run is set up and only tested."""

    def add_words(self, words: Sequence[str]) -> Train:
        """Return the command with further words: options of Lightning's Trainer, and a.b=c over the config."""
        return replace(self, training=add_training_words(self.training, words))

    def run(self) -> Path:
        """Train, and return the run directory; a signal or a loss that is not finite ends the process."""
        from ldm.training.logs import start_logging
        from ldm.training.peers import LostProcess
        from ldm.training.processes import is_first
        from ldm.training.session import train
        from ldm.training.slurm import end_step_at_exit
        from ldm.training.stopping import StoppedBySignal
        from ldm.training.wandb import check_project

        check_project(self.training.project)
        start_logging(self.training.debug)
        try:
            return train(self.training, fit=self.train)
        except StoppedBySignal as stop:
            sys.exit(128 + stop.signum if is_first() or not stop.saved else 0)
        except FloatingPointError as error:
            end_bars()
            sys.exit(f"error: {error}" if is_first() else 0)
        except LostProcess as error:
            end_bars()
            sys.exit(f"error: {error}" if error.told else 1)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except Exception:
            end_step_at_exit()
            raise


def add_training_words(training: Training, words: Sequence[str]) -> Training:
    """Return a training with the words that are no options of its own.

    Args:
        words: options of Lightning's Trainer with their values, and a.b=c.

    Raises:
        ValueError: for a word that is neither, or an option without its value.
    """
    if not words:
        return training
    trainer = dict(training.trainer)
    changes = list(training.changes)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, given, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in _trainer_keys():
            if not given and not rest:
                raise ValueError(f"--{key} needs a value")
            trainer[key] = _read_value(value if given else rest.pop(0))
        elif not word.startswith("-") and given:
            changes.append(word)
        else:
            raise ValueError(
                f"unknown option '{word}': expected an option of --help, of Lightning's Trainer, or key.path=value"
            )
    return replace(training, trainer=trainer, changes=tuple(changes))


def _trainer_keys() -> frozenset[str]:
    from ldm.training.trainer import TRAINER_KEYS

    return TRAINER_KEYS


def _read_value(word: str) -> Any:
    """Read a value as YAML reads it; the empty word is an empty list."""
    from omegaconf import OmegaConf

    if not word:
        return []
    value = OmegaConf.from_dotlist([f"value={word}"]).value
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
