"""Writers that are killed: one process of its own forks a trial each, and SIGKILL comes at a call that writes.

`python -m tests.kills WRITER TRIALS FOLDER` prints, as JSON, what was found in each trial.
"""

import builtins
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# What changes names and what makes sure that bytes are on the disk, of `os`; `open` for writing counts as well.
CALLS = ("replace", "rename", "link", "fsync", "unlink", "mkdir")


@dataclass(frozen=True)
class Writer:
    """What is killed.

    Args:
        prepare: makes what is there before, in a folder.
        act: writes; the same call again goes on after a kill.
        read: what the folder holds, None for nothing; it raises where that is half written.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    read: Callable[[Path], Any]


def count_calls(reached: Callable[[int, bool], None]) -> None:
    """Let `reached(number of the call, whether it is done)` see each call that writes, from now on in this process."""
    calls = 0

    def watch(function: Callable, writes: Callable[..., bool] = lambda *_, **__: True) -> Callable:
        def watched(*args: Any, **keywords: Any) -> Any:
            nonlocal calls
            if not writes(*args, **keywords):
                return function(*args, **keywords)
            calls += 1
            number = calls
            reached(number, False)
            made = function(*args, **keywords)
            reached(number, True)
            return made

        return watched

    def for_writing(_file: Any, mode: str = "r", *_args: Any, **_keywords: Any) -> bool:
        return not set(mode).isdisjoint("wax+")

    for name in CALLS:
        setattr(os, name, watch(getattr(os, name)))
    builtins.open = watch(open, for_writing)


def fork(act: Callable[[], None]) -> int:
    """Do something in a process of its own; return how that ended (`os.waitpid`)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def run_trials(writer: Writer, trials: int, folder: Path) -> list[dict[str, Any]]:
    """Kill a writer before and after calls drawn at random; say of each trial what was left, and what came of it."""
    whole, counted = folder / "whole", folder / "calls"

    def act_and_count() -> None:
        seen = []
        count_calls(lambda number, _: seen.append(number))
        writer.act(whole)
        os.write(os.open(counted, os.O_CREAT | os.O_WRONLY), str(max(seen)).encode())

    writer.prepare(whole)
    before = writer.read(whole)
    assert fork(act_and_count) == 0
    after = writer.read(whole)
    calls = int(counted.read_text())
    found = []
    points = [(number, done) for number in range(1, calls + 1) for done in (False, True)]
    for number, done in random.Random(0).sample(points, min(trials, len(points))):
        place = folder / f"{number}_{done}"
        writer.prepare(place)

        def act_and_die(place: Path = place, at: tuple[int, bool] = (number, done)) -> None:
            count_calls(lambda *reached: os.kill(os.getpid(), signal.SIGKILL) if reached == at else None)
            writer.act(place)

        killed = fork(act_and_die) == signal.SIGKILL
        left = writer.read(place)
        again = fork(lambda place=place: writer.act(place)) == 0
        partial = [path.name for path in place.rglob("*.partial*")]
        end = writer.read(place)
        found.append(
            {
                "at": [number, done],
                "killed": killed,
                "whole": any(same(left, state) for state in (before, after)),
                "again": again,
                "equal": same(end, after),
                "partial": partial,
            }
        )
        shutil.rmtree(place)
    return found


def same(first: Any, second: Any) -> bool:
    """Whether two readings are equal bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def write_earlier_ensemble(folder: Path) -> None:
    from tests.ensembles import write_ensemble

    write_ensemble(folder)


def write_later_ensemble(folder: Path) -> None:
    """Members of another spread in place of those that are there."""
    from ldm.ensembles import storage
    from tests.ensembles import TABLE

    earlier = storage.read_ensemble(folder)
    spec = {key: value for key, value in earlier.spec.items() if key != "format"}
    records = [{key: one[key] for key in one if key not in ("file", "sha256")} for one in spec["members"]]
    heads = [{TABLE: torch.full((11, 16), float(member))} for member in range(len(records))]
    storage.write_ensemble(folder, {**spec, "members": records}, heads, overwrite=True)


def read_members(folder: Path) -> dict[str, torch.Tensor]:
    from ldm.ensembles.storage import read_ensemble

    return dict(read_ensemble(folder).members.overrides)


def fit_posterior(folder: Path, prior_precision: float) -> None:
    """A posterior of a tiny model, in place of one that is there."""
    from ldm.commands.laplace_fit import FitLaplace
    from ldm.commands.shared import ModelSource
    from tests.posteriors import CPU

    model = ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))
    options = {"n": 2, "draws": 1, "prior_precision": prior_precision, "overwrite": True, "place": CPU}
    FitLaplace(model, str(folder / "fit"), **options).run()


def write_earlier_posterior(folder: Path) -> None:
    from tests.posteriors import write_model

    folder.mkdir()
    write_model(folder)
    fit_posterior(folder, 50.0)


def read_posterior(folder: Path) -> dict[str, torch.Tensor]:
    from ldm.laplace import load_laplace
    from ldm.pipelines import load_model

    model = load_model(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"), device="cpu")
    return load_laplace(folder / "fit", model.model.network).state_dict()


def write_results(folder: Path) -> None:
    """Three parts and what they are joined to, as commands that continue write them."""
    from ldm.jobs import WorkList
    from ldm.util import atomic_write

    work = WorkList(folder / "parts", {"seed": 1})
    for key in work.pending(["a", "b", "c"]):
        work.save(key, {"value": key})
    with atomic_write(folder / "joined.txt", overwrite=True) as partial:
        partial.write_text(" ".join(work.load(key)["value"] for key in "abc"))


def read_results(folder: Path) -> str | None:
    joined = folder / "joined.txt"
    for part in folder.glob("parts/*.json"):
        json.loads(part.read_text())
    return joined.read_text() if joined.exists() else None


def train_or_resume(folder: Path) -> None:
    from tests.training.conftest import write_config
    from tests.training.runs import resume, run_training

    runs = sorted(folder.glob("logs/*/checkpoints/last.ckpt"))
    if runs:
        resume(runs[-1].parents[1])
        return
    run_training(write_config(folder), folder, "lightning.trainer.max_steps=4", every_n_steps=2)


def read_training(folder: Path) -> dict[str, Any] | None:
    """The weights and the optimiser of a training that is done, None of one that is not."""
    from ldm.checkpoint import load_checkpoint

    for kept in folder.glob("logs/*/checkpoints/*.ckpt"):
        load_checkpoint(kept)
    for last in folder.glob("logs/*/checkpoints/last.ckpt"):
        content = load_checkpoint(last)
        if content["global_step"] == 4:
            (optimizer,) = content["optimizer_states"]
            return {"weights": content["state_dict"], "optimizer": optimizer["state"]}
    return None


WRITERS = {
    "ensemble": Writer(write_earlier_ensemble, write_later_ensemble, read_members),
    "posterior": Writer(write_earlier_posterior, lambda folder: fit_posterior(folder, 20.0), read_posterior),
    "results": Writer(lambda folder: folder.mkdir(), write_results, read_results),
    "training": Writer(lambda folder: folder.mkdir(), train_or_resume, read_training),
}

if __name__ == "__main__":
    name, trials, place = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(run_trials(WRITERS[name], int(trials), Path(place))))
