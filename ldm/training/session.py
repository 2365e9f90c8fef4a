"""One training put together from a config: run directory, model, data, callbacks, loggers, Trainer."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.plugins.environments import ClusterEnvironment

from ldm.memory import keep_freed_memory
from ldm.models.diffusion.stages import check_encoding_acts
from ldm.records import write_record
from ldm.settings import Training
from ldm.training.agreement import check_agreement
from ldm.training.blocks import BlockOptions
from ldm.training.callbacks import CUDACallback, EMACallback, SeededSteps, SetupCallback
from ldm.training.checkpoint_io import PlainCheckpointIO
from ldm.training.checkpoints import KeepCheckpoints
from ldm.training.config import learning_rate, load_config, point_data, shared_batch, take_section, to_plain
from ldm.training.config_keys import NAMED_CALLBACKS, load_checked_config
from ldm.training.joint import JointMembers
from ldm.training.latent_cache import prepare_latents
from ldm.training.lock import hold_run
from ldm.training.logs import announce
from ldm.training.members import build_joint_data, build_members, write_member_runs
from ldm.training.processes import find_known_run, is_first, make_run, share_run
from ldm.training.progress import TrainingProgress
from ldm.training.resumed import check_resumed, describe_steps, restoring
from ldm.training.runs import RunDirectory, write_run_record
from ldm.training.slurm import Job
from ldm.training.stopping import SaveWhenStopped, StopAtNaN, StoppedBySignal
from ldm.training.trainer import (
    Devices,
    check_trainer_options,
    choose_devices,
    cluster_environment,
    split_trainer_options,
)
from ldm.training.wandb import online_loggers
from ldm.trust import find_own_classes, settle, trusting
from ldm.util import instantiate_as

log = logging.getLogger(__name__)

# What writes pictures where a config says nothing of it.
PICTURES = {"target": "ldm.training.callbacks.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4}}


def train(training: Training, fit: bool = True) -> Path:
    """Do a whole run: set it up, train, evaluate on the test set; return its run directory.

    Signals act at the end of a step (`ldm.training.stopping`): Ctrl-C and SIGTERM save first, SIGUSR2 saves and goes
    on.

    Args:
        training: what to train, and how.
        fit: False only sets the run up and tests.

    Raises:
        ValueError: for a config or options that cannot be trained with, which leaves nothing behind, or if another
            process is training in the run directory.
        StoppedBySignal: after Ctrl-C or SIGTERM.
        KeyboardInterrupt: after a second Ctrl-C, which saves nothing.
        FloatingPointError: if the loss is not finite; the checkpoints of earlier steps are kept.
    """
    with ExitStack() as held:
        session = set_up(training, held)
        try:
            if fit:
                session.fit()
            session.test()
        except SystemExit as stop:  # by which Lightning answers an interrupt
            if getattr(session.trainer, "received_sigterm", False):
                raise StoppedBySignal(signal.SIGTERM, saved=False) from stop
            raise KeyboardInterrupt from stop
        log.info("done: %s", session.run.path)
        if not fit:
            log.info("nothing was trained: without -t a run is only set up, and tested where its config has a test set")
        return session.run.path


@dataclass(frozen=True)
class Session:
    """What a training needs, ready to fit."""

    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    run: RunDirectory
    checkpoint: Path | None
    training: Training
    resumed: bool
    config: DictConfig

    def fit(self) -> None:
        """Train to the end. A new run that fails before its first step leaves no directory behind."""
        # Lightning does this after it has restored the weights, which would round those of float64.
        self.trainer.precision_plugin.convert_module(self.model)
        reader = self.trainer.strategy.checkpoint_io
        if isinstance(reader, PlainCheckpointIO) and not isinstance(self.model, JointMembers):
            reader.model = self.model
        try:
            with share_run(self.run, self.trainer), restoring(self.checkpoint):
                self.trainer.fit(self.model, self.data, ckpt_path=self.checkpoint)
        except BaseException:
            if not self.resumed and self.trainer.global_step == 0 and is_first() and not self.training.debug:
                self.run.discard()
            raise
        if is_first():
            step = self.trainer.global_step
            if isinstance(self.model, JointMembers):
                for path in write_member_runs(self.run, self.model, self.config, self.training, step):
                    log.info("member: %s", path)
            write_record(self.run.finished, self.training.flat_options(), overwrite=True, step=step)

    def test(self) -> None:
        """Evaluate on the test set, where the config has one."""
        if self.training.test and "test" in getattr(self.data, "dataset_configs", ()):
            with share_run(self.run, self.trainer):
                self.trainer.test(self.model, self.data)


def build_callbacks(
    run: RunDirectory, config: DictConfig, lightning: DictConfig, training: Training, monitor: str | None
) -> list[Callback]:
    """Our defaults, changed or switched off by `lightning.callbacks.{name}`, and the checkpoint writer."""
    given = to_plain(lightning.get("callbacks") or OmegaConf.create({}))
    pictures = {**PICTURES, **(given.pop("image_logger", None) or {})}
    callbacks = [
        SetupCallback(run, config, lightning),
        EMACallback(),
        SeededSteps(training.seed, training.member),
        instantiate_as(Callback, pictures, "lightning.callbacks.image_logger"),
        StopAtNaN(),
        LearningRateMonitor(logging_interval="step"),
        CUDACallback(),
    ]
    named = {name: {"target": NAMED_CALLBACKS.get(name), **one} for name, one in given.items() if one is not None}
    callbacks += [instantiate_as(Callback, callback, f"lightning.callbacks.{name}") for name, callback in named.items()]
    checkpoint = to_plain(lightning.get("modelcheckpoint") or OmegaConf.create({}))
    if "target" in checkpoint:
        params = {"dirpath": run.checkpoints, **(checkpoint.get("params") or {})}
        spec = {**checkpoint, "params": params}
        callbacks.append(instantiate_as(Callback, spec, "lightning.modelcheckpoint"))
        checkpoint, monitor = {}, None
    keeper = KeepCheckpoints.from_options(
        run.checkpoints, checkpoint.get("params") or {}, monitor, training.every_n_epochs, training.every_n_steps
    )
    callbacks += [keeper, SaveWhenStopped(keeper.save, on_error=not training.debug)]
    progress = [TrainingProgress()] if lightning.trainer.get("enable_progress_bar", True) else []
    return [*callbacks, *progress]


def prepare_model(config: DictConfig, training: Training) -> pl.LightningModule:
    """The model with its draws seeded; where a member is trained, all but its heads is frozen."""
    if training.joint:
        return build_members(config, training)
    model = instantiate_as(pl.LightningModule, config.model, "model")
    if training.start_from_pretrained:
        model.start_from_pretrained(training.member, training.seed)
    if hasattr(model, "seed_draws"):
        model.seed_draws(training.seed, training.member)
    return model


def prepare_data(config: DictConfig, training: Training) -> pl.LightningDataModule:
    """The data in the order of this run, set up; where all members train at once, in the order of each."""
    if training.joint:
        data = build_joint_data(config, training)
    else:
        data = instantiate_as(pl.LightningDataModule, config.data, "data")
        data.seed = training.seed
        data.member = training.member
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
    settings: dict[str, Any] = {"max_epochs": -1 if chosen.get("max_steps") else 1000, "enable_model_summary": False}
    settings |= {**devices.options, **split_trainer_options(chosen), "strategy": devices.options["strategy"]}
    plugins = [*environment, *(settings.pop("plugins", None) or []), PlainCheckpointIO()]
    own: dict[str, Any] = {"default_root_dir": run.path, "callbacks": callbacks, "logger": loggers, "plugins": plugins}
    try:
        return pl.Trainer(use_distributed_sampler=False, **own, **settings)
    except (TypeError, ValueError, pl.utilities.exceptions.MisconfigurationException) as error:
        words = " ".join(str(error).split())[:400]
        raise ValueError(f"the trainer options {', '.join(map(str, chosen))} were refused: {words}") from error


def read_training_config(training: Training, start: Sequence[DictConfig] = ()) -> DictConfig:
    """Merge the configs of a training, with its data those of its member; `start` goes below them."""
    config = load_checked_config(
        training.base,
        training.changes,
        training.start_from_pretrained,
        start,
        needs=("model", "data"),
    )
    params = OmegaConf.select(config, "model.params")
    if training.first_stage and params is not None and "first_stage_config" in params:
        params.first_stage_encoding = training.first_stage
    component = training.member if training.start_from_pretrained else None
    return point_data(config, component, training.overwrite_data_root, training.synset_bins)


def find_own_targets(training: Training) -> set[str]:
    """Find the classes that the user's own configs and words name: a run that is resumed with them may name them."""
    return find_own_classes(load_config(training.base, training.changes, training.start_from_pretrained, needs=()))


def set_up(training: Training, held: ExitStack) -> Session:
    """Put a training together, ready to fit. What the config names is built before the run directory is made.

    The run directory is this process's (`hold_run`) until `held` is closed.
    """
    job = Job.from_environment([f"{name}={value}" for name, value in training.flat_options().items()])
    known, checkpoint = find_known_run(training, job)
    if known:
        held.enter_context(hold_run(known))
    start = []
    if known and known.has_config:
        with trusting(find_own_targets(training)):
            saved = known.config()
            start = [saved, OmegaConf.create({"lightning": known.config("lightning")})]
        training = training.resuming(saved.run)
    config = read_training_config(training, start)
    config, lightning = take_section(config, "lightning")
    chosen = {**(lightning.get("trainer") or {}), **training.trainer}
    check_trainer_options(chosen)
    gpus = chosen.get("gpus") if training.gpus is None else training.gpus
    nodes = int(chosen.get("num_nodes", 1))
    devices = choose_devices(gpus, training.cpus, nodes, chosen.get("strategy"))
    environment = cluster_environment(devices.count, nodes)
    pl.seed_everything(training.seed % 2**32, verbose=False)
    keep_freed_memory()

    accumulate = int(chosen.get("accumulate_grad_batches", 1))
    shared = shared_batch(config, devices.count * accumulate)
    rate = learning_rate(shared, training.scale_lr, devices.count, accumulate)
    steps = describe_steps(devices.count * accumulate * int(shared.data.params.get("batch_size", 0)), rate)
    if known and start:
        check_resumed(known, start[0], config, steps)
    model = prepare_model(config, training)
    blocks = BlockOptions.choose(training, lightning).apply(model)
    data = prepare_data(shared, training)
    check_agreement(model, data)
    check_encoding_acts(model, training.first_stage if known is None else None)
    prepare_latents(model, config, data, devices.own)
    model.learning_rate = rate  # type: ignore[assignment]

    run = known
    if run is None:
        run = make_run(training, job)
        held.enter_context(hold_run(run))
    if is_first():
        write_run_record(run, training)
        if job:
            job.record(run)
    record = settle(cast(DictConfig, OmegaConf.merge(config, {"run": {**training.kept_values, **steps}})))
    lightning = settle(cast(DictConfig, OmegaConf.merge(lightning, {"trainer": chosen, **blocks.values})))
    try:
        callbacks = build_callbacks(run, record, lightning, training, getattr(model, "monitor", None))
        loggers = online_loggers(run, record, training)
        trainer = build_trainer(run, callbacks, chosen, devices.for_module(model), environment, loggers)
    except Exception:
        if known is None and is_first():
            run.discard()
        raise
    announce(run, model, devices.words, shared.model.get("base_learning_rate"), steps["images_per_step"])
    return Session(model, data, trainer, run, checkpoint, training, known is not None, record)
