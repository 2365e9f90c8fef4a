"""One training put together from a config: run directory, model, data, callbacks, loggers, Trainer."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.jobs import step_from_environment
from ldm.memory import keep_freed_memory
from ldm.records import write_record
from ldm.training.callbacks import CUDACallback, EMACallback, SeededSteps, SetupCallback
from ldm.training.checkpoints import KeepCheckpoints, PlainCheckpointIO
from ldm.training.config import learning_rate, load_config, point_data, shared_batch
from ldm.training.labels import check_labels
from ldm.training.latent_cache import prepare_latents
from ldm.training.members import ALL_MEMBERS, build_members, is_joint, write_member_runs
from ldm.training.members import build_joint_data as build_joint_data
from ldm.training.runs import RunDirectory, find_run, new_run
from ldm.training.slurm import Job
from ldm.training.stopping import SaveWhenStopped, StopAtNaN
from ldm.training.trainer import Devices, choose_devices, cluster_environment, split_trainer_options
from ldm.training.wandb import wandb_logger
from ldm.util import instantiate_from_config

log = logging.getLogger("main")

RUN_VARIABLE = "LDM_RUN_DIRECTORY"
# Options that a resumed run takes from the run it continues.
KEPT_OPTIONS = ("seed", "component", "members", "ensemble_name", "start_from_pretrained", "scale_lr")
# What writes pictures where a config says nothing of it.
PICTURES = {"target": "ldm.training.callbacks.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4}}


@dataclass
class Session:
    """What a training needs, ready to fit."""

    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    run: RunDirectory
    checkpoint: Path | None
    options: argparse.Namespace
    resumed: bool
    config: DictConfig

    def fit(self) -> None:
        """Train to the end. A new run that fails before its first step leaves no directory behind."""
        # Lightning does this after it has restored the weights, which would round those of float64.
        self.trainer.precision_plugin.convert_module(self.model)
        try:
            with told_to_children(self.run):
                self.trainer.fit(self.model, self.data, ckpt_path=self.checkpoint)
        except BaseException:
            if not self.resumed and self.trainer.global_step == 0 and is_first() and not self.options.debug:
                self.run.discard()
            raise
        if is_first():
            step = self.trainer.global_step
            if is_joint(self.options):
                for path in write_member_runs(self.run, self.model, self.config, self.options, step):
                    log.info("member: %s", path)
            write_record(self.run.finished, vars(self.options), overwrite=True, step=step)

    def test(self) -> None:
        """Evaluate on the test set, where the config has one."""
        if not self.options.no_test and "test" in self.data.dataset_configs:
            with told_to_children(self.run):
                self.trainer.test(self.model, self.data)


@contextmanager
def told_to_children(run: RunDirectory) -> Iterator[None]:
    """Name the run directory to the processes that the first one starts, and to no later training of this process."""
    if is_first():
        os.environ[RUN_VARIABLE] = str(run.path)
    try:
        yield
    finally:
        if is_first():
            os.environ.pop(RUN_VARIABLE, None)


def is_first() -> bool:
    """True in the process that writes files and logs."""
    return (rank_zero_only.rank or 0) == 0


def build_callbacks(
    run: RunDirectory, config: DictConfig, lightning: DictConfig, options: argparse.Namespace, monitor: str | None
) -> list[Callback]:
    """Our defaults, changed or switched off by `lightning.callbacks.{name}`, and the checkpoint writer."""
    given = OmegaConf.to_container(lightning.get("callbacks") or OmegaConf.create({}), resolve=True)
    pictures = {**PICTURES, **(given.pop("image_logger", None) or {})}
    callbacks = [
        SetupCallback(run, config, lightning),
        EMACallback(),
        SeededSteps(options.seed, read_member(options)),
        instantiate_from_config(pictures),
        StopAtNaN(),
        LearningRateMonitor(logging_interval="step"),
        CUDACallback(),
    ]
    callbacks += [instantiate_from_config(callback) for callback in given.values() if callback and "target" in callback]
    checkpoint = OmegaConf.to_container(lightning.get("modelcheckpoint") or OmegaConf.create({}), resolve=True)
    if "target" in checkpoint:
        params = {"dirpath": run.checkpoints, **(checkpoint.get("params") or {})}
        callbacks.append(instantiate_from_config({**checkpoint, "params": params}))
        checkpoint, monitor = {}, None
    keeper = KeepCheckpoints.from_options(
        run.checkpoints, checkpoint.get("params") or {}, monitor, options.every_n_epochs, options.every_n_steps
    )
    callbacks += [keeper, SaveWhenStopped(keeper.save, on_error=not options.debug)]
    if lightning.trainer.get("enable_progress_bar", True):
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    return callbacks


def read_member(options: argparse.Namespace) -> int:
    """The number of the member that is trained; 0 for a base model or for all members. It is part of every seed."""
    return options.component if options.start_from_pretrained and not is_joint(options) else 0


def run_folders(options: argparse.Namespace) -> list[Path]:
    """Where the run of a SLURM job may be: that of --resume, and those below --logdir."""
    resumed, logdir = Path(options.resume), Path(options.logdir)
    own = [resumed.parent.parent if resumed.is_file() else resumed] if options.resume else []
    return own + (sorted(path for path in logdir.iterdir() if path.is_dir()) if logdir.is_dir() else [])


def known_run(options: argparse.Namespace, job: Job | None) -> tuple[RunDirectory | None, Path | None]:
    """(run, checkpoint) where a run is resumed or requeued, or given by the process that started this one.

    Raises:
        ValueError: if a process that is not the first cannot come to know its run directory.
    """
    run = job.requeued_run(run_folders(options)) if job else None
    if RUN_VARIABLE in os.environ and not is_first():
        run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
    elif not is_first() and step_from_environment()[1] == 1:
        raise ValueError("start main.py once, without torchrun: it starts its processes itself (--gpus 0,1)")
    requeued = run is not None and (job is not None and job.restarts > 0)
    if options.resume and not requeued:
        return find_run(options.resume, options.epoch)
    last = run.checkpoints / "last.ckpt" if requeued else None
    return run, last if last is not None and last.exists() else None


def make_run(options: argparse.Namespace, job: Job | None) -> RunDirectory:
    """A new run directory; in a later process of a SLURM step the one that its first process makes."""
    if job and not is_first():
        return job.joined_run(lambda: run_folders(options))
    name = (options.name or Path((options.base or ["run"])[0]).stem) + options.postfix
    if options.ensemble_name:
        name += f"_{options.ensemble_name}{ALL_MEMBERS if is_joint(options) else options.seed}"
    return new_run(options.logdir, name)


def prepare_model(config: DictConfig, options: argparse.Namespace) -> pl.LightningModule:
    """The model with its draws seeded; where a member is trained, all but its heads is frozen."""
    if is_joint(options):
        return build_members(config, options)
    model = instantiate_from_config(config.model)
    if options.start_from_pretrained:
        model.start_from_pretrained(options.component, options.seed)
    if hasattr(model, "seed_draws"):
        model.seed_draws(options.seed, read_member(options))
    return model


def prepare_data(config: DictConfig, options: argparse.Namespace) -> pl.LightningDataModule:
    """The data in the order of this run, set up; where all members train at once, in the order of each."""
    if is_joint(options):
        data = build_joint_data(config, options)
    else:
        data = instantiate_from_config(config.data)
        data.seed, data.member = options.seed, read_member(options)
    data.setup()
    return data


def build_trainer(
    run: RunDirectory,
    callbacks: list[Callback],
    chosen: Mapping[str, Any],
    devices: Devices,
    environment: Sequence[ClusterEnvironment] = (),
    more: Sequence[pl.loggers.Logger] = (),
) -> pl.Trainer:
    """A Trainer that logs to CSV, TensorBoard and `more`; a resumed run's CSV goes beside the earlier ones.

    Raises:
        ValueError: for a value that Lightning does not take.
    """
    earlier = len(list(run.path.glob("csv*/metrics.csv")))
    loggers = [
        pl.loggers.TensorBoardLogger(run.path, name="tensorboard", version=""),
        pl.loggers.CSVLogger(run.path, name=f"csv_resumed_{earlier}" if earlier else "csv", version=""),
        *more,
    ]
    settings = {"max_epochs": -1 if chosen.get("max_steps") else 1000, "enable_model_summary": False}
    settings |= {**devices.options, **split_trainer_options(chosen)}
    plugins = [*environment, *(settings.pop("plugins", None) or []), PlainCheckpointIO()]
    own = {"default_root_dir": run.path, "callbacks": callbacks, "logger": loggers, "plugins": plugins}
    try:
        return pl.Trainer(use_distributed_sampler=False, **own, **settings)
    except (TypeError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise ValueError(f"the trainer options {dict(chosen)} were refused: {error}") from error


def online_loggers(run: RunDirectory, record: DictConfig, options: argparse.Namespace) -> list[pl.loggers.Logger]:
    """Weights & Biases' logger where its settings ask for it, in the project that --project names."""
    if not is_first():
        return []
    shown = OmegaConf.to_container(record, resolve=True)
    logger = wandb_logger(run.path, options.project or "decu", shown, run.path.name)
    return [] if logger is None else [logger]


def set_up(
    options: argparse.Namespace, trainer_options: Mapping[str, Any], dotlist: Sequence[str], argv: Sequence[str]
) -> Session:
    """Model, data, trainer and run directory, ready to fit. What the config names is built before the directory is."""
    job = Job.of(argv)
    known, checkpoint = known_run(options, job)
    saved = known if known and known.has_config else None
    if saved:
        for key, value in saved.config().run.items():
            setattr(options, key, value)
    start = [saved.config(), OmegaConf.create({"lightning": saved.config("lightning")})] if saved else []
    config = load_config(options.base, dotlist, options.start_from_pretrained, start, needs=("model", "data"))
    component = read_member(options) if options.start_from_pretrained else None
    config = point_data(config, component, options.overwrite_data_root, options.synset_bins)
    lightning = config.pop("lightning", OmegaConf.create())
    chosen = {**(lightning.get("trainer") or {}), **trainer_options}
    options.gpus = options.gpus if options.gpus is not None else chosen.get("gpus")
    nodes = int(chosen.get("num_nodes", 1))
    devices = choose_devices(options.gpus, options.cpus, nodes)
    environment = cluster_environment(devices.count, nodes)
    pl.seed_everything(options.seed, verbose=False)
    keep_freed_memory()

    accumulate = int(chosen.get("accumulate_grad_batches", 1))
    shared = shared_batch(config, devices.count * accumulate)
    rate = learning_rate(shared, options.scale_lr, devices.count, accumulate)
    model = prepare_model(config, options)
    data = prepare_data(shared, options)
    check_labels(model, data)
    prepare_latents(model, config, data, devices.own)
    model.learning_rate = rate

    run = known or make_run(options, job)
    if is_first():
        write_record(run.path / "record.json", vars(options), overwrite=True)
        if job:
            job.record(run)
    record = OmegaConf.merge(config, {"run": {key: getattr(options, key) for key in KEPT_OPTIONS}})
    lightning = OmegaConf.merge(lightning, {"trainer": chosen})
    try:
        callbacks = build_callbacks(run, record, lightning, options, getattr(model, "monitor", None))
        trainer = build_trainer(run, callbacks, chosen, devices, environment, online_loggers(run, record, options))
    except Exception:
        if known is None and is_first():
            run.discard()
        raise
    announce(run, model, devices.words)
    return Session(model, data, trainer, run, checkpoint, options, known is not None, record)


def announce(run: RunDirectory, model: pl.LightningModule, devices: str) -> None:
    """What a user wants to know before it starts."""
    parameters = [(value.numel(), value.requires_grad) for value in model.parameters()]
    trained = sum(size for size, trains in parameters if trains)
    log.info("run directory: %s", run.path)
    log.info(
        "device: %s  parameters: %s, %s of them trained  learning rate: %.3g",
        devices, f"{sum(size for size, _ in parameters):,}", f"{trained:,}", model.learning_rate,
    )  # fmt: skip
