"""What a training is: its configs, its seed, which member trains, where it runs. A plain value, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from ldm.options import FIXED, SUPPRESSED, WITH_VALUE, check_options, option, option_values

# Fields that a resumed run takes from the run that it continues.
KEPT_FIELDS = ("seed", "component", "members", "ensemble_name", "start_from_pretrained", "scale_lr", "first_stage")
# Fields that it takes where its own words give none.
CHOSEN_FIELDS = ("every_n_epochs", "every_n_steps")


@dataclass(frozen=True)
class Training:
    """One training: latent-diffusion's options, DECU's, and ours.

    Raises:
        ValueError: for options that do not go together, or a component that is neither a number nor all.
    """

    base: Annotated[tuple[str, ...], option("-b", metavar="YAML ...", default="none; or give --resume")] = ()
    """The configs, which are merged from left to right."""
    resume: Annotated[str, option("-r", metavar="DIR", default="a new run")] = ""
    """Continue the training of this run directory, or from this checkpoint of one."""
    epoch: Annotated[int | None, option(metavar="N", default="the last checkpoint")] = None
    """With --resume DIR, continue from the checkpoint that was kept of this epoch."""
    name: Annotated[str, option("-n", metavar="NAME", default="the first config's name")] = ""
    """The name of the run directory, after the time."""
    postfix: Annotated[str, option("-f", metavar="TEXT", default="nothing")] = ""
    """Append this to the run's name."""
    logdir: Annotated[str, option("-l", metavar="DIR")] = "logs"
    """The folder in which run directories are made."""
    project: Annotated[str, option("-p", metavar="NAME", default="decu")] = ""
    """The project of Weights & Biases, where that is turned on (WANDB_API_KEY)."""
    test: Annotated[bool, option(default="evaluated")] = True
    """Evaluate on the test set after training, where the config has one; --no-test leaves it out."""
    debug: Annotated[bool, option("-d")] = False
    """Log at debug level, and do not save when an error stops the run."""
    seed: Annotated[int, option("-s", metavar="N")] = 23
    """The seed of every draw."""
    scale_lr: Annotated[bool, WITH_VALUE, option(metavar="True|False")] = True
    """Multiply the base learning rate by devices * batch size * accumulated batches."""
    gpus: Annotated[str | None, option(metavar="LIST|N", default="the config's, or the CPU")] = None
    """The GPUs: '0,' or '0,1' list them and a number counts them; without CUDA the CPU is used."""
    cpus: Annotated[int, option(metavar="N")] = 1
    """The number of processes when training runs on the CPU."""
    compile: bool = False
    """Compile the blocks of the network, each kind once: a minute or more at first, faster steps from then on. The
    config's lightning.compile does the same."""
    gradient_checkpointing: bool = False
    """Keep no activations within the blocks of the network, but compute them again in the backward pass: a third more
    operations, and a fraction of the memory. The config's lightning.gradient_checkpointing does the same."""
    every_n_epochs: Annotated[int | None, option(metavar="N", default="the config's, or none are kept")] = None
    """Keep a checkpoint every N epochs, by name; this goes before lightning.modelcheckpoint.params."""
    every_n_steps: Annotated[int | None, option(metavar="N", default="the config's, or none are kept")] = None
    """Keep a checkpoint every N optimiser steps, by name."""
    start_from_pretrained: bool = False
    """Train the heads of a member: load model.params.pretrained_path and freeze all else."""
    component: Annotated[int | Literal["all"], option(metavar="N|all")] = 0
    """The number of the member, which decides its data and its start; or all: train every member in one run."""
    members: Annotated[int | None, option(metavar="M", default="5")] = None
    """With --component all, the number of members; their seeds are --seed, --seed + 1, ..."""
    first_stage: Annotated[Literal["sample", "mode"] | None, option(default="the config's, or sample")] = None
    """What training makes of a KL first stage's posterior: a sample in every step, or its mode, the mean."""
    ensemble_name: Annotated[str, option(metavar="NAME", default="none")] = ""
    """The name of the ensemble, which goes into the run's name for `decu gather` to find."""
    overwrite_data_root: Annotated[str, option(metavar="DIR", default="the config's")] = ""
    """The root folder of the training and validation data."""
    synset_bins: bool = False
    """Hand synset_bins to data sets that take it."""
    trainer: Annotated[Mapping[str, Any], FIXED, SUPPRESSED] = field(default_factory=dict)
    """Options of Lightning's Trainer by name, {"max_steps": 100} for example."""
    changes: Annotated[tuple[str, ...], FIXED, SUPPRESSED] = ()
    """Words a.b=c over the config."""
    named: Annotated[tuple[str, ...], FIXED, SUPPRESSED] = field(default=(), compare=False)
    """The options that a command line gave, also those with their default values."""

    def __post_init__(self) -> None:
        if self.name and self.resume:
            raise ValueError("-n/--name and -r/--resume cannot be given together: a resumed run keeps its directory")
        if not self.base and not self.resume:
            raise ValueError("give a config (--base FILE.yaml) or a run to continue (--resume DIR)")
        if self.epoch is not None and not self.resume:
            raise ValueError("--epoch chooses a checkpoint of the run that --resume DIR continues")
        moved = [name for name in ("postfix", "logdir") if getattr(self, name) != getattr(Training, name)]
        if self.resume and moved:
            raise ValueError(f"--{moved[0]} places a new run, and a resumed one keeps its directory: leave it out")
        if isinstance(self.component, int) and self.component < 0:
            raise ValueError(f"--component takes a number from 0, or all; got {self.component}")
        check_options(self)
        complete = self.start_from_pretrained and self.ensemble_name
        if self.component == "all" and not self.resume and not complete:
            raise ValueError("--component all needs --start_from_pretrained, and --ensemble_name for the members' runs")
        single = isinstance(self.component, int) and (self.component > 0 or "component" in self.named)
        if single and not self.resume and not complete:
            raise ValueError(
                f"--component {self.component} trains a member, which needs --start_from_pretrained, and "
                "--ensemble_name for `decu gather` to find it; without --component the whole model trains"
            )
        if self.ensemble_name and not self.start_from_pretrained and not self.resume:
            raise ValueError(
                f"--ensemble_name {self.ensemble_name} names a member's run, and without --start_from_pretrained the "
                "whole model trains: add that, or name the run by --name"
            )
        if self.members is not None and self.component != "all":
            raise ValueError("--members goes with --component all: a single member has its number")

    @property
    def joint(self) -> bool:
        """Whether all members train together in this run."""
        return self.start_from_pretrained and self.component == "all"

    @property
    def member(self) -> int:
        """The number of the member that trains, 0 for a base model or for all of them: a part of every seed."""
        return self.component if self.start_from_pretrained and isinstance(self.component, int) else 0

    @property
    def member_count(self) -> int:
        """The number of members of a joint training."""
        return 5 if self.members is None else self.members

    @property
    def kept_values(self) -> dict[str, Any]:
        """What a resumed run takes over, by the names of the fields."""
        values = {name: getattr(self, name) for name in (*KEPT_FIELDS, *CHOSEN_FIELDS)}
        return {**values, "members": self.member_count if self.joint else None}

    def resuming(self, kept: Mapping[str, Any]) -> Training:
        """Return this training with what the run that it continues kept; other keys are passed over.

        A run that kept nothing of its first stage was trained before posteriors were sampled.

        Raises:
            ValueError: if an option says something else than the run.
        """
        values = {"first_stage": "mode", **kept}
        for name in KEPT_FIELDS if self.resume else ():
            given, default = getattr(self, name), Training.__dataclass_fields__[name].default
            said = given != default or name in self.named
            if said and name in values and given != values[name]:
                raise ValueError(
                    f"--{name} {given}: the run was started with {values[name] or 'none'}, and a resumed run keeps "
                    "that: leave it out, or start a new run"
                )
        own = [name for name in CHOSEN_FIELDS if getattr(self, name) is not None]
        taken = {*KEPT_FIELDS, *CHOSEN_FIELDS}.difference(own)
        return replace(self, **{name: value for name, value in values.items() if name in taken})

    def flat_options(self) -> dict[str, Any]:
        """Return every option by its name, those of Lightning's Trainer among them, for records."""
        options = option_values(self)
        return options | options.pop("trainer")
