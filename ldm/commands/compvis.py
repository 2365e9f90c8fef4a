"""latent-diffusion's scripts/sample_diffusion.py in our words: its options, its defaults, where it finds and writes.

| theirs | ours |
| --- | --- |
| -r, --resume CKPT or DIR | --base and --ckpt where config.yaml lies beside model.ckpt, else --run |
| -l, --logdir DIR | --out DIR/NAME/samples/HOW (without it MODEL/samples/HOW), and --pngs |
| -n, --n_samples (50000) | --n |
| -c, --custom_steps (50) | --steps on CompVis' times (--spacing published) |
| -e, --eta (1.0) | --eta |
| -v, --vanilla_sample | --sampler DDPM --steps with all steps of the config |
| --batch_size (10) | --batch_size |

Their script names the last folder after the checkpoint's step and the time; here it is named after the sampler, so that
a run that was stopped continues in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

COMMAND = "sample model"
# Where their words say nothing.
N_SAMPLES = 50000
CUSTOM_STEPS = 50
ETA = 1.0
BATCH_SIZE = 10
# The steps of a model whose config does not name them.
TIMESTEPS = 1000


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-r", "--resume")
    parser.add_argument("-l", "--logdir")
    parser.add_argument("-n", "--n_samples", type=int)
    parser.add_argument("-c", "--custom_steps", type=int)
    # --eta, --batch_size and --out are our words, too; they are read here for the defaults and the folder.
    parser.add_argument("-e", "--eta", "--ddim_eta", type=float)
    parser.add_argument("-v", "--vanilla_sample", action="store_true")
    parser.add_argument("--batch_size")
    parser.add_argument("--out")
    return parser


def translate_words(words: Sequence[str]) -> list[str]:
    """Return the words of `decu sample model` for latent-diffusion's; ours are kept as they are.

    With -r latent-diffusion's defaults hold where neither vocabulary says otherwise.

    Raises:
        ValueError: if -r names no file and no folder, or -v comes with what DDPM does not take.
    """
    given, rest = _make_parser().parse_known_args(list(words))
    theirs = given.resume is not None
    ours = {word.partition("=")[0] for word in rest}
    count = given.n_samples
    if count is None and theirs and not ours & {"--n", "--n_per_class", "--interpolate"}:
        count = N_SAMPLES
    batch_size = BATCH_SIZE if given.batch_size is None and theirs else given.batch_size
    found = [*_source(given.resume), *rest]
    found += _spell("--n", count) + _spell("--batch_size", batch_size)
    found += _sampler(given, ours, theirs)
    if given.out is not None:
        return [*found, "--out", given.out]
    if theirs or given.logdir is not None:
        pictures = [] if "--pngs" in ours else ["--pngs"]
        return [*found, *pictures, "--out", str(_folder(given, found))]
    return found


def _spell(name: str, value: object) -> list[str]:
    """Return an option with its value, or nothing where the value is None."""
    return [] if value is None else [name, str(value)]


def _source(resume: str | None) -> list[str]:
    """Return which model -r names.

    Raises:
        ValueError: if there is no such file or folder, or the config names a class that is not known.
    """
    if resume is None:
        return []
    from ldm.training.config import read_config
    from ldm.trust import accept_config

    path = Path(resume)
    if not path.exists():
        raise ValueError(f"-r {resume}: expected a checkpoint or the folder of one, found neither")
    checkpoint = path / "model.ckpt" if path.is_dir() else path
    config = checkpoint.parent / "config.yaml"
    if checkpoint.is_file() and config.is_file():
        accept_config(read_config(config), config)  # it came with the checkpoint: -r does not name it
        return ["--base", str(config), "--ckpt", str(checkpoint)]
    return ["--run", resume]


def _sampler(given: argparse.Namespace, ours: set[str], theirs: bool) -> list[str]:
    """Return the sampler, its steps and its noise."""
    if given.vanilla_sample:
        if given.eta:
            print("-v samples with DDPM: -e is not used", file=sys.stderr)
        return ["--sampler", "DDPM", "--steps", str(_all_steps(given.resume))]
    eta = given.eta
    if eta is None and theirs and "--sampler" not in ours:
        eta = ETA
    steps = given.custom_steps
    if steps is None and theirs and not ours & {"--steps", "--ddim_steps"}:
        steps = CUSTOM_STEPS
    spacing = "published" if steps is not None and "--spacing" not in ours else None
    return _spell("--eta", eta) + _spell("--steps", steps) + _spell("--spacing", spacing)


def _all_steps(resume: str | None) -> int:
    """Return the number of steps that the model was trained with."""
    from ldm.training.config import load_config
    from ldm.training.runs import find_run

    if resume is None:
        return TIMESTEPS
    words = _source(resume)
    config = load_config([words[1]]) if words[0] == "--base" else find_run(resume)[0].config()
    return int(config.model.params.get("timesteps", TIMESTEPS))


def _folder(given: argparse.Namespace, words: Sequence[str]) -> Path:
    """Return where the samples go: LOGDIR/NAME/samples/HOW, or samples/HOW in the folder of the model."""
    model = _model_folder(given.resume)
    if given.logdir is None:
        assert model is not None
        root = model
    else:
        root = Path(given.logdir) / (model.name if model is not None else "")
    options = dict(pairwise(words))
    sampler = options.get("--sampler", "DDIM").lower()
    steps = options.get("--steps", options.get("--ddim_steps", "default"))
    eta = f"_eta{float(options['--eta']):g}" if "--eta" in options else ""
    return root / "samples" / f"{sampler}{steps}{eta}"


def _model_folder(resume: str | None) -> Path | None:
    """Return the folder of a released model, or the run directory of a checkpoint."""
    if resume is None:
        return None
    path = Path(resume)
    folder = path if path.is_dir() else path.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    return folder.resolve()


def run_sample_diffusion() -> None:
    """Run scripts/sample_diffusion.py from the words of this process, theirs or ours."""
    from ldm.commands.line import run_command
    from ldm.commands.words import take_trusted
    from ldm.trust import trusting

    try:
        with trusting(take_trusted(sys.argv[1:])[1]):
            words = translate_words(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    run_command(COMMAND, words, Path(sys.argv[0]).name)
