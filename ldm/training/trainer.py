"""From latent-diffusion's trainer options to a Lightning 2.x Trainer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from ldm.arguments import check_value, suggest_key
from ldm.jobs import local_rank, step_from_environment
from ldm.models.diffusion.training import DDPM
from ldm.ranges import COUNT, FINITE, Range, check_range

TRAINER_KEYS = frozenset(inspect.signature(pl.Trainer.__init__).parameters) - {
    "self",
    "logger",
    "callbacks",
    "default_root_dir",
}
# Precisions that convert weights and buffers.
TRUE_HALF = frozenset({"bf16-true", "16-true"})
# Strategies that keep a part of each weight in each process.
SHARDED = ("fsdp", "deepspeed", "model_parallel")
# Names of Lightning's for data-parallel training, and whether parameters may go without a gradient.
DATA_PARALLEL = {"ddp": False, "ddp_find_unused_parameters_false": False, "ddp_find_unused_parameters_true": True}
# The same, with the state of the optimiser shared out among the processes.
SHARED_STATE = "ddp_zero1"
# What tells a process where the others of a training are, by torchrun, LSF, MPI or by hand.
LAUNCHED = {"MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}
# Options of Lightning 1.x that released YAMLs use and that changed nothing in the result.
IGNORED_KEYS = frozenset({"progress_bar_refresh_rate", "weights_summary", "flush_logs_every_n_steps", "num_gpus"})


def parse_gpus(gpus: str | int | Sequence[int] | None) -> list[int] | int:
    """Device indices of `--gpus`: "0," and "0,1" list them, "2" counts them; None or 0 is the CPU.

    Raises:
        ValueError: if it is none of these.
    """
    if gpus is None or gpus in (0, "0"):
        return 0
    if isinstance(gpus, int):
        return gpus
    if not isinstance(gpus, str):
        return [int(device) for device in gpus]
    try:
        devices = [int(part) for part in gpus.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--gpus expects '0,' or '0,1' or a count, got '{gpus}'") from error
    if not devices:
        raise ValueError(f"--gpus expects '0,' or '0,1' or a count, got '{gpus}', which names none: leave it out")
    return devices if "," in gpus else devices[0]


@dataclass(frozen=True)
class Devices:
    """Where a training runs: Trainer options, how many processes on all machines, and both in words."""

    options: Mapping[str, Any]
    count: int
    words: str

    @property
    def own(self) -> torch.device:
        """The device of this process, counted as in `ldm.jobs.pick_device`."""
        if self.options["accelerator"] != "gpu":
            return torch.device("cpu")
        devices = self.options["devices"]
        return torch.device("cuda", devices[local_rank() % len(devices)])

    def for_module(self, module: pl.LightningModule) -> Devices:
        """These devices for a module; one with several optimisers gives some parameters no gradient in each step.

        Raises:
            ValueError: if the optimiser's state is to be shared out, and the module's optimiser does not do it.
        """
        shares = isinstance(self.options["strategy"], SharedStateStrategy)
        if shares and not isinstance(module, DDPM):
            raise ValueError(
                f"--strategy {SHARED_STATE} shares out the optimiser's state of a whole diffusion model, and not that "
                f"of a {type(module).__name__}: use --strategy ddp"
            )
        if module.automatic_optimization or not isinstance(self.options["strategy"], DDPStrategy):
            return self
        return replace(self, options={**self.options, "strategy": make_data_parallel(unused=True)})


class SharedStateStrategy(DDPStrategy):
    """DDP whose processes keep a part of the optimiser's state each (ZeRO, stage 1: Rajbhandari et al. 2020).

    Weights and gradients are whole in every process, and so are checkpoints. Module's `configure_optimizers` makes the
    optimiser that shares its state where the strategy says so (`ldm.models.diffusion.optimisation.make_optimiser`).
    """

    shares_state = True


def choose_devices(
    gpus: str | int | Sequence[int] | None, cpus: int = 1, nodes: int = 1, strategy: str | None = None
) -> Devices:
    """The devices of --gpus, else `cpus` processes on the CPU, of each machine. Several train data-parallel.

    Args:
        strategy: a name of Lightning's by which they train together, or `SHARED_STATE`; None, auto: ddp.

    Raises:
        ValueError: if --gpus cannot be read, or asks for devices that are not there, or for a strategy that shards.
    """
    check_strategy(strategy)
    devices = parse_gpus(gpus)
    wanted = list(range(devices)) if isinstance(devices, int) else devices
    present = torch.cuda.device_count()
    each = f" on each of {nodes} nodes" if nodes > 1 else ""
    if not wanted or not present:
        cpus = max(1, cpus)
        words = (f"{cpus} CPU processes" if cpus > 1 else "CPU") + each
        words += f" (--gpus {gpus}: no CUDA device here)" if wanted else ""
        words += " (use the GPU with --gpus 0,)" if present and gpus is None else ""
        count = cpus * nodes
        return Devices(
            {"accelerator": "cpu", "devices": cpus, "strategy": choose_strategy(count, strategy)}, count, words
        )
    if missing := [index for index in wanted if not 0 <= index < present]:
        raise ValueError(f"--gpus {gpus}: no CUDA device {missing}, there are {present} here")
    words = ", ".join(f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in wanted) + each
    count = len(wanted) * nodes
    return Devices(
        {"accelerator": "gpu", "devices": wanted, "strategy": choose_strategy(count, strategy)}, count, words
    )


def check_strategy(strategy: Any) -> None:
    """Refuse what no training here can be done with.

    Raises:
        ValueError: for a strategy that shards the weights, and for what is no name.
    """
    if strategy is None:
        return
    if not isinstance(strategy, str):
        raise ValueError(f"--strategy takes a name of Lightning's, ddp for example; got {strategy!r}")
    if strategy.startswith(SHARDED):
        raise ValueError(
            f"--strategy {strategy} keeps a part of each weight in each process, and the averages, pictures and "
            f"metrics of a training read whole weights: use --strategy {SHARED_STATE}, which shares out the "
            "state of the optimiser, and for more room --gradient_checkpointing and --precision bf16-mixed"
        )


def choose_strategy(count: int, name: str | None) -> str | DDPStrategy:
    """Return how `count` processes train together: one needs nothing, several that are told nothing else use ddp."""
    if name not in (None, "auto", SHARED_STATE, *DATA_PARALLEL):
        return str(name)
    kind = SharedStateStrategy if name == SHARED_STATE else DDPStrategy
    return "auto" if count == 1 else make_data_parallel(DATA_PARALLEL.get(str(name), False), kind)


def make_data_parallel(unused: bool, kind: type[DDPStrategy] = DDPStrategy) -> DDPStrategy:
    """Make DDP; `unused`: some parameters have no gradient in a step."""
    # Buffers need no broadcast in every step: averages are stepped alike in every process, all else is constant.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"find_unused_parameters": unused, name: False}
    return kind(**options)


def cluster_environment(count: int, nodes: int = 1) -> list[ClusterEnvironment]:
    """How the `count` processes of a training find one another in a SLURM job; elsewhere Lightning finds out.

    One srun started all of them, or there is one, in a step or a batch script, which starts the others.

    Raises:
        ValueError: if srun started another number, or nothing started those of further nodes.
    """
    if "SLURM_JOB_ID" not in os.environ:
        if nodes > 1 and not LAUNCHED.intersection(os.environ):
            raise ValueError(
                f"--num_nodes {nodes}: nothing says where the other nodes are, and the first would wait for them: "
                "start it on each node by srun or torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there"
            )
        return []
    _, started = step_from_environment()
    if started == nodes == 1:
        return [LightningEnvironment()]
    if started != count:
        raise ValueError(
            f"srun started {started} processes, but the options ask for {count}, of {nodes} node(s): let --ntasks-per-"
            "node of srun be the number that --gpus or --cpus ask for, and --nodes that of --num_nodes. Or start one "
            "process (srun --ntasks=1), which starts the others of its node"
        )
    # Lightning refuses a step that was counted by --ntasks alone.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(count // nodes))
    return [SLURMEnvironment(auto_requeue=False)]


# Numbers and switches among the options of Lightning's Trainer; the others are Lightning's to check.
SWITCHES = (
    "barebones",
    "benchmark",
    "detect_anomaly",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "inference_mode",
    "sync_batchnorm",
    "use_distributed_sampler",
)
TRAINER_VALUES: dict[str, tuple[Any, Range]] = {
    **dict.fromkeys(SWITCHES, (bool | None, FINITE)),
    "deterministic": (bool | Literal["warn"] | None, FINITE),
    "fast_dev_run": (int | bool, Range(low=0)),
    "reload_dataloaders_every_n_epochs": (int, Range(low=0)),
    "max_steps": (int, Range(low=0, also=(-1,))),
    "max_epochs": (int | None, Range(low=0, also=(-1,))),
    "min_steps": (int | None, Range(low=0)),
    "min_epochs": (int | None, Range(low=0)),
    "accumulate_grad_batches": (int, COUNT),
    "check_val_every_n_epoch": (int | None, COUNT),
    "val_check_interval": (int | float | str | None, Range(low=0, open_low=True)),
    "log_every_n_steps": (int | None, Range(low=0)),
    "gradient_clip_val": (int | float | None, Range(low=0)),
    "num_nodes": (int, COUNT),
    "num_sanity_val_steps": (int | None, Range(low=0, also=(-1,))),
    "limit_train_batches": (int | float | None, Range(low=0, open_low=True)),
    "limit_val_batches": (int | float | None, Range(low=0)),
    "limit_test_batches": (int | float | None, Range(low=0)),
    "overfit_batches": (int | float, Range(low=0)),
}


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Make sure that the options of the Trainer exist, and that its numbers are numbers, in their ranges.

    Raises:
        ValueError: naming the option, what it takes and what came.
    """
    known = sorted(TRAINER_KEYS | IGNORED_KEYS | {"gpus", "cpus", "distributed_backend"})
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"unknown trainer option '{name}': {suggest_key(str(name), known)} Lightning {pl.__version__} takes "
                f"{sorted(TRAINER_KEYS)}"
            )
        if name == "devices" and value not in (None, "auto"):
            raise ValueError(
                f"--devices {value}: say --gpus or --cpus, by which the images of a step and the learning rate are "
                "counted as well"
            )
        hint, allowed = TRAINER_VALUES.get(name, (Any, FINITE))
        check_value(value, hint, f"--{name} (lightning.trainer.{name})")
        if name in TRAINER_VALUES:
            check_range(name, value, {name: allowed}, f"--{name} (lightning.trainer.{name})")
    if options.get("gradient_clip_algorithm") is not None and not options.get("gradient_clip_val"):
        raise ValueError("--gradient_clip_algorithm acts only with --gradient_clip_val: give that as well")
    for unit in ("steps", "epochs"):
        least, most = (options.get(f"{end}_{unit}") or 0 for end in ("min", "max"))
        if 0 < most < least:
            raise ValueError(f"--min_{unit} {least} is more than --max_{unit} {most}, which ends the training before")


def split_trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what Lightning 2.x takes; drop what only changed the display of 1.x.

    Raises:
        ValueError: for an option that neither knows, or a precision that would hold the weights themselves in 16 bits.
    """
    unknown = set(options) - TRAINER_KEYS - IGNORED_KEYS - {"gpus", "cpus", "distributed_backend"}
    if unknown:
        raise ValueError(
            f"unknown trainer options {sorted(unknown)}; Lightning {pl.__version__} takes {sorted(TRAINER_KEYS)}"
        )
    if str(options.get("precision")) in TRUE_HALF:
        raise ValueError(
            f"precision {options['precision']} would round the table of noise levels and the averages of the weights, "
            "which then no longer move: use bf16-mixed or 16-mixed"
        )
    return {key: value for key, value in options.items() if key in TRAINER_KEYS}
