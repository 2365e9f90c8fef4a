"""Does the ensemble's uncertainty mean what it should? Controls on one data set, with every class at every class_size.

Examples:
  python scripts/benchmark_decu.py --base configs/latent-diffusion/digits.yaml --out results/decu
  python scripts/benchmark_decu.py --base configs/latent-diffusion/digits.yaml --out results/decu --variants default
  python scripts/benchmark_decu.py --base configs/latent-diffusion/digits.yaml --out results/decu --only_tables

For every variant (head or initialisation) and every rotation of the classes through the bins: draws the bins, trains
the members in one training, gathers them, and reads their uncertainty with get_unc_synsets.py at every branch point.
The variant `default` is also compared with scores that need no ensemble or no mutual information, with the quality of
its samples, with itself at 2 .. --most_members members, and with the cost of a plain model. What exists is not
repeated: a run that was stopped continues, and variants or rotations can be added. Words a.b=c go over all configs.

Writes {out}/: report.md, tables (.csv), pictures, record.json, and a folder a run.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.checkpoint import load_state_dict
from ldm.cli import HelpFormatter, run_script
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.data.bins import class_size_order
from ldm.evaluation.recognition import PixelClassifier
from ldm.experiments.controls import class_controls, members_study
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.pipelines.images import real_images
from ldm.records import write_record
from ldm.report.control_report import write_control_report
from ldm.report.tables import read_csv, write_csv
from ldm.settings import Branching, Sampling, Training
from ldm.training.config import load_config
from ldm.training.gathering import gather_members
from ldm.training.runs import runs_named
from ldm.training.session import train
from ldm.util import atomic_write

ROOT = Path(__file__).resolve().parent.parent
NAME, DEFAULT = "controls", "default"
DOTTED = re.compile(r"\w+(\.\w+)+=")
HEADS, RATE = "model.params.heads", "model.base_learning_rate"
# What each variant puts on top of the config of a component; a .yaml is one more config. Rates as chosen on digits.
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "pretrained": (f"{HEADS}.init=pretrained",),
    "random": (f"{HEADS}.init=random",),
    "anchored": (f"{HEADS}.init=anchored",),
    "equal_rows": (f"{HEADS}.row_rates=equal",),
    "lora": (f"{HEADS}.names=[lora]", "model.params.cond_stage_config.params.lora=true", f"{RATE}=3.0e-2"),
    "output": (f"{HEADS}.names=[output]", f"{RATE}=2.0e-3"),
    "time_embedding": (f"{HEADS}.names=[time_embedding]", f"{RATE}=2.0e-3"),
    "class_and_output": (f"{HEADS}.names=[class_embedding,output]", f"{RATE}=2.0e-2"),
    "published": (str(ROOT / "configs/latent-diffusion/digits-published.yaml"),),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="config of the model, with a section `components`; its trunk must exist")
    add("--out", required=True, help="folder of everything")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="heads and initialisations")
    add("--rotations", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="assignments of the classes to the bins")
    add("--classes_per_bin", nargs="+", metavar="BUDGET:CLASSES", help="as in make_bins.py (default: its own)")
    add("--members", type=int, default=5, help="members of every ensemble")
    add("--most_members", type=int, default=10, help="members of the default's first ensemble, to study their number")
    add("--branch_at", type=float, nargs="+", default=[0.0, 0.5, 0.98], help="branch points, fractions of the steps")
    add("--n", type=int, default=16, help="noises a class")
    add("--quality_n", type=int, default=8, help="noises a class for baselines and quality, walked to the end")
    add("--quality_steps", type=int, default=20, help="steps of those walks")
    add("--real", type=int, default=10000, help="real images at most for the classifier, and for the distances")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--seed", type=int, default=0, help="seed of the bins, of the first member (the next have the next), of noise")
    add("--only_tables", action="store_true", help="train nothing: write the report of what there is")
    parser.add_argument("dotlist", nargs="*", metavar="a.b=c", help="over the config of all variants")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; words a.b=c may stand anywhere."""
    words = sys.argv[1:] if argv is None else argv
    dotlist = [word for word in words if DOTTED.match(word)]
    options = get_parser().parse_args([word for word in words if not DOTTED.match(word)])
    options.dotlist = dotlist
    return options


def bins_of(options: argparse.Namespace, rotation: int) -> Path:
    """The folder of a rotation's bins, made if it is not there."""
    from scripts import make_bins

    folder = Path(options.out) / f"bins_{rotation}"
    if not (folder / "subsets_binned_classes.yaml").exists():
        members = max(options.members, options.most_members)
        words = ["--base", options.base, "--rotation", rotation, "--seed", options.seed, "--components", members]
        words += [
            "--out",
            folder,
            *(["--classes_per_bin", *options.classes_per_bin] if options.classes_per_bin else []),
        ]
        make_bins.main([*map(str, words), *[word for word in options.dotlist if word.startswith("paths.")]])
    return folder


def ensemble_of(options: argparse.Namespace, variant: str, rotation: int) -> Path | None:
    """Folder of the ensemble of a variant and rotation, trained and gathered if it is not there (and may be)."""
    logs = Path(options.out) / f"{variant}_{rotation}"
    if found := sorted(logs.glob(f"{NAME}_*_{options.members}/ensemble.yaml")):
        return found[-1].parent
    if options.only_tables:
        return None
    members = options.members
    if variant == DEFAULT and rotation == options.rotations[0]:
        members = max(members, options.most_members)
    joint = runs_named(logs, f"_{NAME}all") if logs.is_dir() else []
    gpus = "0" if options.device == "cpu" else "0,"
    if not joint or not (joint[-1].checkpoints / "last.ckpt").exists():
        configs = [change for change in VARIANTS[variant] if change.endswith(".yaml")]
        changes = [change for change in VARIANTS[variant] if not change.endswith(".yaml")]
        bins = f"data.params.train.params.folder={bins_of(options, rotation)}"
        training = Training(
            (options.base, *configs),
            gpus=gpus,
            scale_lr=False,
            start_from_pretrained=True,
            component="all",
            members=members,
            seed=options.seed,
            logdir=str(logs),
            ensemble_name=NAME,
            changes=(*changes, bins, *options.dotlist),
        )
        train(training)
    elif not joint[-1].finished.exists():
        train(Training(resume=str(joint[-1].path), gpus=gpus))
    for count in sorted({members, options.members}, reverse=True):
        folder = gather_members(logs, NAME, count, overwrite=True)
    return folder


def measure_uncertainty(options: argparse.Namespace, ensemble: Path, at: float, keep: bool = False) -> Path:
    """Measure the classes of an ensemble at a branch point; the folder of the report."""
    command = UncertaintyClasses(
        EnsembleSource(str(ensemble)),
        n=options.n,
        keep_images=("tensors",) if keep else None,
        branching=Branching(at=at),
        sampling=Sampling(seed=options.seed),
        place=Placement(options.device),
    )
    return command.run()


def read_uncertainty(options: argparse.Namespace, ensemble: Path) -> dict[float, Path]:
    """{branch point: table of get_unc_synsets.py}, measured where it is not there yet."""
    kept = ensemble / "controls.json"
    tables: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    for at in options.branch_at:
        if str(at) not in tables:
            folder = measure_uncertainty(options, ensemble, at)
            tables[str(at)] = str(folder.relative_to(ensemble) / "uncertainty.csv")
            with atomic_write(kept, overwrite=True) as partial:
                partial.write_text(json.dumps(tables) + "\n")
    return {at: ensemble / tables[str(at)] for at in options.branch_at}


def once(path: Path, make: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a table, made if it is not there."""
    if not path.exists():
        write_csv(path, make())
    return read_csv(path)


def pipeline(
    options: argparse.Namespace, ensemble: Path, at: float = 0.0, steps: int | None = None
) -> EnsemblePipeline:
    """An ensemble as get_unc_synsets.py opens it; `steps` of the sampler instead of the config's."""
    sampling = Sampling(steps=steps, seed=options.seed)
    return load_ensemble(ensemble, sampling, Branching(at=at), device=options.device)


def judge_of(options: argparse.Namespace) -> tuple[PixelClassifier, dict[int, np.ndarray]]:
    """A classifier of training images, and the validation images of each class."""
    config = load_config([options.base], [word for word in options.dotlist if word.startswith("paths.")])
    (images, labels), (held_out, classes) = (
        real_images(config.data.params[split], options.real, options.seed) for split in ("train", "validation")
    )
    return PixelClassifier(images, labels), {int(c): held_out[classes == c] for c in np.unique(classes)}


def study_members(options: argparse.Namespace, ensemble: Path) -> list[dict[str, Any]]:
    """See `members_study`: of the ensemble with the most members, at the first branch point."""
    most = next(ensemble.parent.glob(f"{NAME}_*_{options.most_members}"))
    folder = measure_uncertainty(options, most, options.branch_at[0], keep=True)
    bins = pipeline(options, most).classes.sizes
    files = {int(file.stem.removeprefix("class")): file for file in (folder / "kept").glob("class*.safetensors")}
    distances = {label: load_state_dict(file)["distances"] for label, file in files.items()}
    return members_study(distances, {label: class_size_order(bins[label]) for label in distances})


def measure(task: Callable[[], Any], device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """(shortest duration of a few calls in seconds, peak memory in MiB: of the GPU, or of this process until now)."""
    found = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    if device.type == "cuda":
        return min(found), torch.cuda.max_memory_allocated(device) / 2**20
    return min(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cost_at(one: EnsemblePipeline, n: int) -> list[dict[str, Any]]:
    """Samples and uncertainty of n images of one class: seconds, peak memory, passes of the network an image."""
    given, steps, branch = ([0] * n, list(range(n))), len(one.grid) - 1, one.branch
    tasks = {
        "plain model: samples": (lambda: one.sample(*given), steps),
        "ensemble: one-step uncertainty": (lambda: next(iter(one.branched_steps(*given, (0,)))), branch + one.members),
        "ensemble: samples of all members": (
            lambda: one.sample_branched(*given, (0,)),
            branch + one.members * (steps - branch),
        ),
    }
    rows = []
    for name, (task, passes) in tasks.items():
        duration, memory = measure(task, one.device)
        rows.append({"task": name, "images": n, "seconds": duration, "peak_mib": memory, "passes_an_image": passes})
    return rows


def study_cost(options: argparse.Namespace, ensemble: Path) -> list[dict[str, Any]]:
    """See `cost_at`, at every branch point; and the bytes of the members, which a plain model does not have."""
    stored = sum(file.stat().st_size for file in ensemble.glob("member_*"))
    return [
        {"branch_at": at, **row, "members_bytes": stored if row["task"].startswith("ensemble") else 0}
        for at in options.branch_at
        for row in cost_at(pipeline(options, ensemble, at), options.n)
    ]


def main(argv: list[str] | None = None) -> Path:
    options = parse(argv)
    out = Path(options.out)
    tables: dict[str, dict[int, dict[float, list[dict[str, Any]]]]] = {}
    ensembles: dict[int, Path] = {}
    jobs = [(variant, rotation) for variant in options.variants for rotation in options.rotations]
    for variant, rotation in tqdm(jobs, desc="ensembles", unit="ensemble"):
        ensemble = ensemble_of(options, variant, rotation)
        if ensemble is None:
            continue
        found = read_uncertainty(options, ensemble)
        tables.setdefault(variant, {})[rotation] = {at: read_csv(path) for at, path in found.items()}
        if variant == DEFAULT:
            ensembles[rotation] = ensemble
    if not tables:
        raise ValueError(f"{out} holds no trained ensemble yet: run this without --only_tables")

    studies: dict[str, list[dict[str, Any]]] = {}
    if ensembles:
        classifier, references = judge_of(options)
        studies["controls"] = []
        for rotation, ensemble in ensembles.items():

            def control(ensemble: Path = ensemble) -> list[dict[str, Any]]:
                one = pipeline(options, ensemble, steps=options.quality_steps)
                return class_controls(one, range(one.n_classes), options.quality_n, classifier, references)

            rows = once(ensemble / "class_controls.csv", control)
            studies["controls"] += [{"rotation": rotation, **row} for row in rows]
        first = next(iter(ensembles.values()))
        if any(first.parent.glob(f"{NAME}_*_{options.most_members}")):
            studies["members"] = once(out / "members.csv", lambda: study_members(options, first))
        studies["cost"] = once(out / "cost.csv", lambda: study_cost(options, first))
    write_control_report(out, tables, studies)
    write_record(out / "record.json", vars(options), overwrite=True)
    print((out / "report.md").read_text())
    return out


if __name__ == "__main__":
    run_script(main)
