"""`decu uncertainty study`: from a config to the page, every step in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ldm.commands.study_step import (
    StudyStep,
    base_words,
    find_foreign_classes,
    member_words,
    refuse_idle_words,
    say_other_config,
)
from ldm.commands.words import refuse_options
from ldm.options import option

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.training.runs import RunDirectory


@dataclass(frozen=True)
class Study:
    """Answer where a model does not know, from a config: train what is missing, sample, measure, write the page.

    What exists is kept, and a training that was stopped goes on: the same command again continues. Every step's own
    command is printed, so that each can be given by hand.

    Examples:
      decu new --data pictures --size 32 --out my.yaml && decu uncertainty study --config my.yaml
      decu uncertainty study --config configs/latent-diffusion/digits.yaml
      decu uncertainty study --config my.yaml --dry_run
      decu uncertainty study --config my.yaml --members 10 lightning.trainer.max_steps=5000

    Words a.b=c change the config of the trainings; where its section `components` has a value of its own, members keep
    that, and components.a.b=c changes it. Writes {logdir}/bootstrapped_NAME_{members}/, NAME that of the config:
    pictures of the members, rollouts, uncertainty per class and per pixel, what samples are taken for, and page.html,
    which shows them.
    """

    config: Annotated[str, option(metavar="YAML")]
    """The config of the model; `decu new` writes one for a folder of pictures."""
    members: int = 5
    """The number of members."""
    logdir: Annotated[str, option(metavar="DIR")] = "logs"
    """Where run directories and the ensemble go."""
    first_stage: Annotated[str | None, option(metavar="YAML", default="NAME-first-stage.yaml beside the config")] = None
    """The config of the first stage, where the model needs one that is not trained yet."""
    gpus: Annotated[str, option(metavar="LIST|N")] = "0,"
    """The GPUs of the trainings; without CUDA the CPU is used."""
    seed: int = 0
    """The seed of the bins and of the members, whose seeds are SEED, SEED + 1, ..."""
    dry_run: bool = False
    """Print the commands of what is missing, and run nothing."""
    changes: Annotated[tuple[str, ...], option(metavar="a.b=c ...", default="none")] = ()
    """Changes of the config; the words do without the option's name."""

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(f"--members must be 2 or more, for members to disagree; got {self.members}")

    def add_words(self, words: Sequence[str]) -> Study:
        """Return the command with words a.b=c over the config.

        Raises:
            ValueError: for any other word.
        """
        refuse_options(words, "a.b=c, which changes the config")
        return replace(self, changes=(*self.changes, *words))

    def run(self) -> Path:
        """Do what is missing, and return the page."""
        from ldm.commands.line import load_command, parse
        from ldm.pipelines.prompts import write_class_prompts
        from ldm.records import write_record

        self._check_words()
        left = [place for place, step in enumerate(self.steps()) if not step.done]
        if self.dry_run:
            print("\n".join(self.steps()[place].by_hand(self.own_classes) for place in left))
            return self.page
        say_other_config(self._find_run(f"{self.name}_base"), self.config, self.changes)
        began = time.monotonic()
        spent = {}
        for number, place in enumerate(left, 1):
            if self._captioned and not self.prompts.exists() and (self.ensemble / "ensemble.yaml").exists():
                write_class_prompts(self.ensemble, self.prompts)
            step = self.steps()[place]  # read again: it names the run of the step before
            minutes = (time.monotonic() - began) / 60
            where = f"[step {number} of {len(left)}, after {minutes:.0f} minutes]"
            print(f"\n{where} {step.title}\n  {step.by_hand(self.own_classes)}", flush=True)
            started = time.monotonic()
            parse(load_command(step.name), self._words(step), f"decu {step.name}").run()
            spent[step.command] = round(time.monotonic() - started, 1)
        write_record(self.ensemble / "study.json", self, overwrite=True, seconds=spent)
        print(f"\ndone; open {self.page}")
        return self.page

    def _check_words(self) -> None:
        """Refuse words that no config holds, and those that come after the training that they are for."""
        from ldm.training.config_keys import load_checked_config
        from ldm.training.trainer import parse_gpus

        parse_gpus(self.gpus)
        words, ours = base_words(self.changes), member_words(self.config, self.changes)
        load_checked_config([self.config], words)
        load_checked_config([self.config], ours, component=True)
        refuse_idle_words(self._find_run(f"{self.name}_base"), words)
        refuse_idle_words(self._find_run(f"{self.name}_bootstrappedall"), ours, self.seed)

    @cached_property
    def own_classes(self) -> set[str]:
        """Classes beyond this project's that the config names, which is the user's: what the study reads may, too."""
        return find_foreign_classes(self.config, self._read)

    def _words(self, step: StudyStep) -> list[str]:
        """Return the words of a step; those of a training that was stopped let it go on."""
        run = None if step.run is None else self._find_run(step.run)
        if run is None or not (run.checkpoints / "last.ckpt").exists():
            return step.words
        return ["--resume", str(run.path), "-t", "--gpus", self.gpus]

    def _find_run(self, name: str) -> RunDirectory | None:
        """Return the newest run of this name, None where there is none."""
        from ldm.training.runs import STAMP, runs_named

        if not Path(self.logdir).is_dir():
            return None
        found = runs_named(self.logdir, f"{STAMP.pattern}_{re.escape(name)}")
        return found[-1] if found else None

    def steps(self) -> list[StudyStep]:
        """Return every step in its order, as things stand now."""
        from omegaconf import OmegaConf

        from ldm.data.subsets import BINNED, subsets_file

        base = self._setting("model.params.pretrained_path")
        bins = self._setting("data.params.train.params.folder")
        first_stage = OmegaConf.select(self._read, "model.params.first_stage_config.params.ckpt_path")
        steps = []
        if first_stage is None and self.first_stage is not None:
            raise ValueError("--first_stage configures one that is trained, and this model has none: leave it out")
        if first_stage is not None:
            config = self.first_stage or str(Path(self.config).with_name(f"{self.name}-first-stage.yaml"))
            steps += self._trained("the first stage", config, f"{self.name}_first_stage", first_stage)
        steps += self._trained("the base model", self.config, f"{self.name}_base", base)
        planned = subsets_file(bins, OmegaConf.select(self._read, "data.params.train.params.dataset_name") or BINNED)
        words = ["--base", self.config, "--out", bins, "--components", str(self.members), "--seed", str(self.seed)]
        if OmegaConf.select(self._read, "uncertainty.bins") == "natural":
            words.append("--natural")
        words += [word for word in self.changes if word.startswith("paths.")]
        steps.append(StudyStep("drawing which pictures each member sees", "data bins", words, planned.exists()))
        return [*steps, *self._member_steps(), *self._measurements()]

    def _trained(self, what: str, config: str, name: str, out: str) -> list[StudyStep]:
        """Return the steps that train a model and write its weights."""
        ready = Path(out).exists()
        run = self._find_run(name)
        words = ["--base", config, "-t", "--gpus", self.gpus, "--scale_lr", "False", "--logdir", self.logdir]
        words += ["--name", name]
        words += base_words(self.changes) if config == self.config else []
        place = f"{self.logdir}/TIME_{name}" if run is None else str(run.path)
        return [
            StudyStep(f"training {what}", "train", words, ready or (run is not None and run.finished.exists()), name),
            StudyStep(f"writing the weights of {what}", "export", ["--run", place, "--out", out], ready),
        ]

    def _member_steps(self) -> list[StudyStep]:
        """Return the steps that train the members and gather them."""
        gathered = (self.ensemble / "ensemble.yaml").exists()
        name = f"{self.name}_bootstrappedall"
        run = self._find_run(name)
        words = ["--base", self.config, "-t", "--gpus", self.gpus, "--scale_lr", "False", "--logdir", self.logdir]
        words += ["--start_from_pretrained", "--component", "all", "--members", str(self.members)]
        words += ["--seed", str(self.seed), "--ensemble_name", "bootstrapped", *member_words(self.config, self.changes)]
        finished = run is not None and run.finished.exists()
        gather = ["--path", self.logdir, "--ensemble_name", "bootstrapped", "--ensemble_comps", str(self.members)]
        return [
            StudyStep(f"training {self.members} members together", "train", words, gathered or finished, name),
            StudyStep("gathering the members", "gather", [*gather, "--data_name", self.name], gathered),
        ]

    def _measurements(self) -> list[StudyStep]:
        """Return the steps that sample, measure and write the page."""
        path = ["--path", str(self.ensemble), *(["--prompts", str(self.prompts)] if self._captioned else [])]
        found = self.ensemble
        classes = "measuring what is not known, class by class"
        mistakes = StudyStep(
            "seeing what samples are taken for",
            "uncertainty mistakes",
            [*path, "--overwrite"],
            (found / "mistakes" / "record.json").exists(),
        )
        return [
            StudyStep(
                "sampling the members", "sample members", [*path, "--overwrite"], any(found.glob("samples/*.png"))
            ),
            StudyStep(
                "sampling before and after the branch",
                "rollout",
                [*path, "--branch_at", "0.5", "--overwrite"],
                any(found.glob("*/rollout_sample/*.png")),
            ),
            StudyStep(classes, "uncertainty classes", path, any(found.glob("*/uncertainty.csv"))),
            StudyStep(
                "mapping what is not known, pixel by pixel",
                "uncertainty pixels",
                [*path, "--overwrite"],
                any(found.glob("pixel_unc/*.png")),
            ),
            *([] if self._of_one_class else [mistakes]),
            StudyStep("writing the page", "report", [str(found)], False),
        ]

    @property
    def prompts(self) -> Path:
        """The captions that members of a model of texts are sampled for."""
        return self.ensemble / "prompts.txt"

    @property
    def _captioned(self) -> bool:
        """Whether the model is conditioned on captions."""
        from omegaconf import OmegaConf

        return OmegaConf.select(self._read, "model.params.cond_stage_key") == "caption"

    @property
    def _of_one_class(self) -> bool:
        """Whether the model knows one class, beside the null class of guidance: nothing else to be taken for."""
        from omegaconf import OmegaConf

        count = OmegaConf.select(self._read, "model.params.cond_stage_config.params.n_classes")
        return count is not None and int(count) <= 2

    def _setting(self, key: str) -> str:
        """Return what the config says.

        Raises:
            ValueError: if it says nothing.
        """
        from omegaconf import OmegaConf

        found = OmegaConf.select(self._read, key)
        if found is None:
            raise ValueError(
                f"{self.config} does not say {key}, which a study of members needs (in the section components, or "
                "outside of it); `decu new` writes a config that does"
            )
        return str(found)

    @cached_property
    def name(self) -> str:
        """NAME of the runs and of the ensemble."""
        return Path(self.config).stem

    @property
    def ensemble(self) -> Path:
        """The folder of the ensemble and of the results."""
        return Path(self.logdir) / f"bootstrapped_{self.name}_{self.members}"

    @property
    def page(self) -> Path:
        """The page that shows the results."""
        return self.ensemble / "page.html"

    @cached_property
    def _read(self) -> DictConfig:
        from ldm.training.config import load_config

        return load_config([self.config], member_words(self.config, self.changes), component=True)
