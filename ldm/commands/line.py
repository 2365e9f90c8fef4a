"""The command line: the table of commands, from words to a command's value, and how its errors end the process."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import tyro

from ldm.commands.checks import check_command, run_checked, tell_named
from ldm.commands.failures import describe_failure, end_bars, refused_words, take_debug, until_reader_leaves
from ldm.commands.words import collapse, normalise, take_trusted
from ldm.options import READING, SHOWN

# The one option that all commands have: it says what may be read, not what is done.
TRUST = """Files of runs, ensembles, posteriors, references and subsets build classes of this project alone:
  --trust PACKAGE       Take classes of this package of your own from them, too; it may be repeated.
"""
# A word over a config: model.params.timesteps=100.
CHANGE = re.compile(r"\w+(\.\w+)+=")


@dataclass(frozen=True)
class Entry:
    """Where a command's class is, what it does in one line, and whether its results have a page."""

    module: str
    name: str
    summary: str
    page: bool = False


# Groups and commands in the order in which the help shows them.
COMMANDS: dict[str, Entry] = {
    "new": Entry("new", "New", "Write a config that trains a model of one's own pictures."),
    "train": Entry("train", "Train", "Train a model, a member of an ensemble, or all members at once."),
    "export": Entry("export", "Export", "Write a model as a base checkpoint, or for diffusers."),
    "sample model": Entry("sample_model", "SampleModel", "Draw samples of a diffusion model, a released one included."),
    "sample inpaint": Entry("sample_inpaint", "SampleInpaint", "Fill in the holes of pictures."),
    "sample restore": Entry("sample_restore", "SampleRestore", "Restore noisy pictures, with intervals.", page=True),
    "sample members": Entry("sample_members", "SampleMembers", "Draw a grid of samples: members by classes."),
    "rollout": Entry("rollout", "Rollout", "Draw the states before and after the branch, one figure a class."),
    "uncertainty study": Entry("study", "Study", "From a config to the page: all that is missing, step by step."),
    "uncertainty classes": Entry(
        "uncertainty_classes", "UncertaintyClasses", "Measure what is not known, class by class.", page=True
    ),
    "uncertainty pixels": Entry(
        "uncertainty_pixels", "UncertaintyPixels", "Map what is not known, pixel by pixel.", page=True
    ),
    "uncertainty mistakes": Entry(
        "uncertainty_mistakes", "UncertaintyMistakes", "See what samples of a class are taken for.", page=True
    ),
    "uncertainty ood": Entry("uncertainty_ood", "UncertaintyOod", "Score pictures that may be unknown.", page=True),
    "uncertainty toy": Entry(
        "uncertainty_toy", "UncertaintyToy", "Compare estimates where the truth is known.", page=True
    ),
    "report": Entry("report", "WritePage", "Write the page of results that exist."),
    "laplace fit": Entry("laplace_fit", "FitLaplace", "Fit the posterior of a model's last layer."),
    "laplace sample": Entry("laplace_sample", "SampleLaplace", "Sample with a variance for every pixel.", page=True),
    "laplace sweep": Entry(
        "laplace_sweep", "SweepLaplace", "Map under a grid of sigma_noise and prior_precision.", page=True
    ),
    "laplace resample": Entry("laplace_resample", "ResampleLaplace", "Finish again from states around one.", page=True),
    "laplace filter": Entry(
        "laplace_filter", "FilterLaplace", "Leave out uncertain images, beside random removal.", page=True
    ),
    "laplace plots": Entry(
        "laplace_plots", "PlotLaplace", "Draw every figure of BayesFlow for a flow and its twin.", page=True
    ),
    "attribute": Entry("attribute", "Attribute", "Say which training pictures carry a sample.", page=True),
    "value": Entry("value", "ValueData", "Predict what more pictures of a class would bring.", page=True),
    "gather": Entry("gather", "Gather", "Gather trained members into an ensemble."),
    "benchmark": Entry(
        "benchmark", "BenchmarkMethods", "Compare every method with an oracle: one table, one page.", page=True
    ),
    "evaluate reference": Entry(
        "evaluate_reference", "EvaluateReference", "Extract the features of a reference set once."
    ),
    "evaluate metrics": Entry("evaluate_metrics", "EvaluateMetrics", "Measure images against a reference.", page=True),
    "evaluate trainings": Entry("evaluate_trainings", "EvaluateTrainings", "Measure trainings together.", page=True),
    "evaluate classifier": Entry(
        "evaluate_classifier", "EvaluateClassifier", "Train the small classifier whose features small data take."
    ),
    "evaluate recognise": Entry("evaluate_recognise", "EvaluateRecognise", "Recognise samples by a classifier."),
    "exposure measure": Entry(
        "exposure_measure",
        "MeasureExposure",
        "Measure how far sampling drifts from training: norms, delta_t, x_t.",
        page=True,
    ),
    "exposure choose": Entry(
        "exposure_choose", "ChooseScaling", "Choose the epsilon scaling that corrects it.", page=True
    ),
    "features probe": Entry(
        "features_probe", "FeaturesProbe", "Probe what a model's features know of classes.", page=True
    ),
    "features uncertainty": Entry(
        "features_uncertainty",
        "FeaturesUncertainty",
        "Compare probes with an ensemble's uncertainty by class.",
        page=True,
    ),
    "features contrastive": Entry(
        "features_contrastive", "FeaturesContrastive", "Measure alignment and uniformity of features.", page=True
    ),
    "features classifier": Entry(
        "features_classifier", "FeaturesClassifier", "Train a head on features of noisy images, test it by noise level."
    ),
    "features network": Entry("features_classifier", "FeaturesNetwork", "The same of a network trained from scratch."),
    "features guide": Entry(
        "features_classifier", "FeaturesGuide", "Test a classifier that guides a diffusion model by noise level."
    ),
    "data check": Entry("new", "CheckData", "Look at a folder of pictures: classes, counts, sizes, what is skipped."),
    "data bins": Entry("data_bins", "MakeBins", "Draw which images each member of an ensemble sees."),
    "data latents": Entry("data_latents", "EncodeLatents", "Encode the images of a training before it starts."),
    "data prepare": Entry("data_prepare", "PrepareData", "Fetch published data sets and networks, and verify them."),
    "cluster train": Entry("cluster", "ClusterTrain", "Print a training for each member, or a SLURM array of them."),
    "cluster share": Entry("cluster", "ClusterShare", "Print jobs that share a command's work, or a SLURM array."),
}
GROUPS: dict[str, str] = {
    "sample": "Draw samples of a model, or of the members of an ensemble.",
    "uncertainty": "Measure what an ensemble does not know.",
    "laplace": "Fit a posterior of a model's last layer, and sample with its variances.",
    "evaluate": "Measure how good images are, whatever made them.",
    "exposure": "Exposure bias, and the epsilon scaling that corrects it (docs/epsilon_scaling.md).",
    "features": "Measure what the features of a diffusion model know.",
    "data": "Data sets: fetched, split among members, encoded.",
    "cluster": "The work of an ensemble on the jobs of a cluster.",
}


class Command(Protocol):
    """What every command is: a frozen dataclass that runs."""

    default_steps: ClassVar[int]
    default_scale: ClassVar[float]

    def run(self) -> Any:
        """Do what the command says; the result is what it wrote, or a value."""


def load_command(name: str) -> type[Command]:
    """Import the class of a command, "uncertainty classes" for example."""
    entry = COMMANDS[name]
    return getattr(importlib.import_module(f"ldm.commands.{entry.module}"), entry.name)


def parse(command: type[Command], words: Sequence[str], prog: str) -> Command:
    """Make a command from words; a word that does not fit ends the process with code 2 and names what would.

    --help shows the command's own options and names the shared ones; --help_all explains those, too. A command that
    has `add_words` is given the words that are no options of its own: those of the form a.b=c, the unknown ones, and
    what follows -- as it is.
    """
    SHOWN.update(steps=getattr(command, "default_steps", 200), scale=getattr(command, "default_scale", 1.0))
    if not {"-h", "--help", "--help_all"} & set(words):
        return _parse(command, words, prog)
    shown = io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8")
    try:
        with contextlib.redirect_stdout(shown):
            return _parse(command, ["--help"], prog)
    finally:
        shown.seek(0)
        text = shown.read()
        print(text if "--help_all" in words else collapse(text), end="")
        print(TRUST, end="")


@refused_words()
def _parse(command: type[Command], words: Sequence[str], prog: str) -> Command:
    settings: dict[str, Any] = {
        "prog": prog,
        "description": inspect.getdoc(command),  # the whole of it: the parser would drop the examples
        "config": (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        "use_underscores": True,
        "registry": READING,
    }
    if not hasattr(command, "add_words"):
        own = normalise(command, words)
        return _checked(tyro.cli(command, args=own, **settings), own)
    # Taken out first: an option of several values before it would take a.b=c for one of them.
    end = list(words).index("--") if "--" in words else len(words)
    changes = [word for word in words[:end] if CHANGE.match(word)]
    own = normalise(command, [word for word in words[:end] if not CHANGE.match(word)])
    made, unknown = tyro.cli(command, args=own, return_unknown_args=True, **settings)
    return _checked(made.add_words([*changes, *unknown, *words[end:]]), own)


def _checked(command: Command, words: Sequence[str]) -> Command:
    """Return a command all of whose options act, in their ranges."""
    check_command(command, words)
    return tell_named(command, words)


@until_reader_leaves()
def run_command(name: str, words: Sequence[str], prog: str | None = None) -> Any:
    """Run a command from words; errors that a user can act on end the process with their message.

    The code is 2 for words, or values of words, that do not fit together, and 1 for what shows only when the command
    runs: a file that is missing, a class that the model does not have. Ctrl-C ends it with code 130. In a SLURM job
    SIGUSR1 puts the job back into the queue: commands continue what they were stopped in. With --debug among the words
    of any command, the traceback comes before the message.
    """
    return _run(load_command(name), words, prog or f"decu {name}", COMMANDS[name].page)


@until_reader_leaves()
def run_file(command: type) -> Any:
    """Run a command that is a file of its own, a benchmark for example, from the words of this process."""
    return _run(command, sys.argv[1:], Path(sys.argv[0]).name)


def _run(kind: type[Command], words: Sequence[str], prog: str, page: bool = False) -> Any:
    """Run a command from words; see `run_command` for how its errors end the process."""
    with refused_words():
        words, trusted = take_trusted(words)
    words, debug = take_debug(kind, words)
    command = parse(kind, words, prog)

    from ldm.commands.report import write_own_page
    from ldm.jobs import requeue_when_asked
    from ldm.trust import trusting

    requeue_when_asked()
    try:
        with trusting([*trusted, *getattr(command, "own_classes", ())]):
            found = run_checked(command)
        if page:
            write_own_page(command)
        return found
    except BrokenPipeError:
        raise
    except Exception as error:
        end_bars()
        if debug:
            traceback.print_exc()
        sys.exit(f"error: {describe_failure(error, command)}")
    except KeyboardInterrupt:
        end_bars()
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_as_script(name: str) -> None:
    """Run a command as a script of the repository does, from the words of this process."""
    run_command(name, sys.argv[1:], sys.argv[0].rpartition("/")[2])


@until_reader_leaves()
def main(words: Sequence[str] | None = None) -> None:
    """Run `decu`: name a command, or list what there is."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["--version"]:
        from ldm import __version__

        print(f"decu {__version__}")
        return
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            run_command(name, words[count:])
            return
    asked = words[:1] if words and words[0] in GROUPS else []
    print(overview(asked[0] if asked else None))
    wrong = words[len(asked) :]
    if wrong and wrong[0] not in ("-h", "--help"):
        sys.exit(f"error: there is no command '{' '.join(words[:2])}'; the commands are listed above")


def overview(group: str | None = None) -> str:
    """Return the list of commands, or of those in a group, a line each."""
    lines = ["usage: decu COMMAND [OPTIONS]      decu COMMAND --help explains one", ""]
    if group is None:
        lines = ["decu: where does a diffusion model not know?", "", *lines]
    last = None
    for name, entry in COMMANDS.items():
        own = name.split()[0]
        if group not in (None, own):
            continue
        if own in GROUPS and own != last:
            lines.append(f"{own}: {GROUPS[own]}")
        last = own
        indent = "  " if own in GROUPS else ""
        lines += textwrap.wrap(
            f"{indent}{name:<26}{entry.summary}", 110, subsequent_indent=" " * 28, drop_whitespace=False
        )
    return "\n".join(lines)
