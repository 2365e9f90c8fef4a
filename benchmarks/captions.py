"""Does mutual information find the prompts whose words few members saw? Counted digits, with a control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf

from ldm.commands.export import Export
from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.commands.train import Train
from ldm.data.bins import ALL, BINNED, MASKED, plan_binned, plan_masked
from ldm.data.class_bins import find_full_data
from ldm.data.counted import CountedDigits
from ldm.data.plans import sample_keys, write_subsets
from ldm.ensembles.classes import Classes
from ldm.experiments.counted import CanvasClassifier, Shown, make_prompts, share_recognised, show_test_picture
from ldm.options import option
from ldm.pipelines import EnsemblePipeline, InformationPlan, load_ensemble, load_model
from ldm.pipelines.information import measure_classes
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, read_or_make, write_csv
from ldm.settings import Branching, Sampling, Training
from ldm.stats import auroc_interval
from ldm.training.config import load_config
from ldm.training.gathering import gather_members
from ldm.training.runs import runs_named
from ldm.util import generator, instantiate_from_config

Words = Literal["digits", "counts", "styles"]
CONTROL = "control"


def choose_hidden(names: Sequence[str], seed: int) -> list[str]:
    """Return two of five of the words, at least one: the next ones of a fixed order for every seed."""
    order = torch.randperm(len(names), generator=generator("order of hidden words")).tolist()
    count = max(1, 2 * len(names) // 5)
    return [names[order[(seed * count + place) % len(names)]] for place in range(count)]


def compare_rows(rows: Sequence[Row]) -> dict[str, float | int | str]:
    """Return how well mutual information tells the prompts of hidden words, beside their control.

    The unit of the intervals is a word in a seed: the mean over its prompts of log MI, less the mean over all prompts
    of the seed and ensemble. Ratios are geometric means over prompts of MI over the control's.

    Args:
        rows: `seed`, `word`, `hidden`, `mi` and `control` (nats) of each prompt.
    """
    scores: dict[str, list[float]] = {"mi": [], CONTROL: [], "ratio": []}
    hidden = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        logs = {name: np.log([row[name] for row in own]) for name in ("mi", CONTROL)}
        logs["ratio"] = logs["mi"] - logs[CONTROL]
        words = np.array([row["word"] for row in own])
        for word in dict.fromkeys(words.tolist()):
            hidden.append(bool(next(row["hidden"] for row in own if row["word"] == word)))
            for name, values in logs.items():
                scores[name].append(float(values[words == word].mean() - values.mean()))
    found: dict[str, float | int | str] = {"words": len(hidden), "hidden": sum(hidden)}
    for name, values in scores.items():
        area = auroc_interval(values, hidden)
        found |= {f"auroc_{name}": area.estimate, f"{name}_low": area.low, f"{name}_high": area.high}
    for name, kept in (("hidden", True), ("seen", False)):
        logs = [math.log(row["mi"] / row[CONTROL]) for row in rows if bool(row["hidden"]) == kept]
        found[f"ratio_{name}"] = math.exp(float(np.mean(logs)))
    return found


@dataclass(frozen=True)
class CaptionStudy:
    """Train a model of counted digits, members that some words were hidden from, and members that saw all words.

    For every seed and kind of words, two of five words are hidden from --hidden_from of the members; the control has
    the same seeds and saw everything. What exists is not repeated: a run that was stopped continues.

    Examples:
      python -m benchmarks.captions --out results/captions
      python -m benchmarks.captions --out results/captions --ckpt logs/pretrained/captions/base.ckpt --words digits
      python -m benchmarks.captions --out results/counted --base configs/text/digits-counted.yaml \\
          --words digits counts styles

    Writes {out}/: recognised.csv, prompts.csv (a row a prompt, seed and kind), summary.csv, record.json.
    """

    out: str
    """The folder of everything."""
    base: str = "configs/text/digits-captions.yaml"
    """The config of the model, with a section `components`."""
    ckpt: Annotated[str | None, option(metavar="FILE", default="one is trained")] = None
    """The base checkpoint."""
    words: tuple[Words, ...] = ("digits", "styles")
    """Kinds of words that are hidden, each in ensembles of their own; counts are words of counted digits only."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of members and of the choice of words."""
    members: int = 5
    """Members of an ensemble."""
    hidden_from: int = 3
    """Members that a hidden word is hidden from."""
    steps: Annotated[int | None, option(metavar="N", default="the config's")] = None
    """Steps of the members' training."""
    n: int = 8
    """Noises of a prompt."""
    samples: int = 5
    """Samples of a prompt for recognition, in 20 steps."""
    place: Placement = Placement()

    def run(self) -> Path:
        """Train and measure what is not there, print and write the tables, and return the folder."""
        out = Path(self.out)
        checkpoint = Path(self.ckpt) if self.ckpt is not None else self.train_base()
        recognised = read_or_make(out / "recognised.csv", lambda: self.recognise(checkpoint))
        print(markdown_table(recognised))
        rows = []
        for seed in self.seeds:
            control = self.measure(CONTROL, seed, checkpoint)
            for kind in self.words:
                for found, plain in zip(self.measure(kind, seed, checkpoint), control, strict=True):
                    rows.append({"kind": kind, **found, CONTROL: plain["mi"]})
        summary = [
            {"hidden words": kind, "seed": str(seed), **compare_rows(chosen)}
            for kind in self.words
            for seed in ("all", *self.seeds)
            if (chosen := [row for row in rows if row["kind"] == kind and seed in ("all", row["seed"])])
        ]
        write_csv(out / "prompts.csv", rows, ["mi, control: mutual information in nats"], overwrite=True)
        write_csv(out / "summary.csv", summary, overwrite=True)
        write_record(out / "record.json", self, overwrite=True)
        print(markdown_table(summary, 3))
        return out

    @cached_property
    def config(self) -> Any:
        """What --base holds."""
        return load_config([self.base], needs=("data",))

    @cached_property
    def counted(self) -> bool:
        """Whether digits are counted."""
        return str(self.config.data.params.train.target).endswith(CountedDigits.__name__)

    @cached_property
    def prompts(self) -> dict[str, Shown]:
        """The prompts with what they ask for."""
        return make_prompts(self.counted)

    # The base model

    def train_base(self) -> Path:
        """Train the base model where it is not there, and return its checkpoint."""
        logs = Path(self.out) / "base"
        checkpoint = logs / "base.ckpt"
        if not checkpoint.exists():
            Train(
                Training(base=(self.base,), gpus=self.gpus, scale_lr=False, logdir=str(logs), name="base"), True
            ).run()
            Export(str(runs_named(logs, "_base")[-1].path), str(checkpoint)).run()
        return checkpoint

    @property
    def gpus(self) -> str:
        """latent-diffusion's word for the device."""
        return "0" if self.place.device == "cpu" else "0,"

    def recognise(self, checkpoint: Path) -> list[Row]:
        """Return the share of real test pictures and of samples that show what their captions say."""
        train, test = (instantiate_from_config(self.config.data.params[part]) for part in ("train", "validation"))
        classifier = CanvasClassifier(train)
        chosen = torch.randperm(len(test), generator=generator("test canvases"))[:400].tolist()
        pictures = torch.stack([test[index]["image"] for index in chosen]).movedim(-1, 1)
        prompts = self.prompts
        real = [show_test_picture(test, index) for index in chosen]
        sampling = Sampling(steps=20, seed=0)
        pipeline = load_model(base=self.base, ckpt=str(checkpoint), sampling=sampling, device=self.place.device)
        images = pipeline.with_prompts(list(prompts)).sample(n=self.samples)
        asked = [one for one in prompts.values() for _ in range(self.samples)]
        return [
            share_recognised("test pictures", classifier.read(pictures), real),
            share_recognised("samples", classifier.read(images), asked),
        ]

    # Ensembles

    def measure(self, kind: str, seed: int, checkpoint: Path) -> list[Row]:
        """Return a row a prompt of an ensemble, which is trained where it is not there."""
        folder = Path(self.out) / f"{kind}_{seed}"

        def read() -> list[Row]:
            ensemble = next(folder.glob(f"{kind}_*_{self.members}"), None)
            pipeline = load_ensemble(
                ensemble or self.train(kind, seed, folder, checkpoint),
                Sampling(seed=seed),
                Branching(at=0.0),
                pretrained=str(checkpoint),
                device=self.place.device,
            )
            return list(self.rows(pipeline, seed))

        return read_or_make(folder / "prompts.csv", read)

    def rows(self, pipeline: EnsemblePipeline, seed: int) -> list[Row]:
        """Return of each prompt its word, whether it was hidden, and its mutual information in nats."""
        prompts = list(self.prompts)
        asked = pipeline.with_prompts(prompts)
        names = pipeline.ensemble.spec["class_names"]
        words = Classes(len(names), tuple(names))
        rows: list[Row] = []
        for found in measure_classes(asked, range(len(prompts)), InformationPlan(n=self.n)):
            word = words.name(words.named_in(prompts[found.label])[0])
            groups = asked.classes.groups(found.label)
            hidden = groups is not None and bool(groups.uncertain)
            rows.append({"seed": seed, "prompt": prompts[found.label], "word": word, "hidden": hidden,
                         "mi": float(found.mi.mean())})  # fmt: skip
        return rows

    def train(self, kind: str, seed: int, folder: Path, checkpoint: Path) -> Path:
        """Train all members of an ensemble in one run, gather them, and return their folder."""
        dataset = BINNED if kind == CONTROL else MASKED
        target = "data.params.train.params"
        changes = [f"{target}.dataset_name={dataset}", f"{target}.folder={folder / 'bins'}"]
        changes.append(f"model.params.pretrained_path={checkpoint}")
        if kind != CONTROL:
            changes.append(f"{target}.dataset.params.classes={self.name_classes(kind)}")
        if self.steps is not None:
            changes.append(f"lightning.trainer.max_steps={self.steps}")
            changes.append(f"model.params.scheduler_config.params.cycle_lengths=[{self.steps}]")
        self.write_bins(kind, seed, folder / "bins")
        training = Training(
            base=(self.base,),
            gpus=self.gpus,
            scale_lr=False,
            start_from_pretrained=True,
            component="all",
            members=self.members,
            seed=100 * seed,
            logdir=str(folder),
            ensemble_name=kind,
            changes=tuple(changes),
        )
        Train(training, True).run()
        return gather_members(folder, kind, self.members)

    def name_classes(self, kind: str) -> str:
        """Return the data set's word for classes of a kind."""
        return "words" if kind == "digits" and not self.counted else kind

    def write_bins(self, kind: str, seed: int, folder: Path) -> None:
        """Write which pictures each member sees: all of them, or those of the words that it was shown."""
        whole = find_full_data(OmegaConf.to_container(self.config.data.params.train, resolve=True))
        if kind != CONTROL:
            whole["params"]["classes"] = self.name_classes(kind)
        data = instantiate_from_config(whole)
        names = data.class_names
        common = {"members": self.members, "seed": seed, "resample": False}
        if kind == CONTROL:
            plan = plan_binned(data.labels, names, {ALL: len(names)}, **common)
        else:
            hidden = [names.index(name) for name in choose_hidden(names, seed)]
            plan = plan_masked(data.labels, names, self.hidden_from, hidden=hidden, **common)
        write_subsets(folder, plan, sample_keys(data), whole, overwrite=True)


if __name__ == "__main__":
    run_file(CaptionStudy)
