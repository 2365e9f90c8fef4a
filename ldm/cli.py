"""What the scripts share: argument groups, devices, the record written beside every output."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.jobs import local_rank, requeue_when_asked
from ldm.util import atomic_write

ROOT = Path(__file__).parents[1]  # main.py, scripts/


def str2bool(text: str | bool) -> bool:
    """True for yes, true, t, y, 1; False for no, false, f, n, 0."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got '{text}'")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a docstring as they are written and shows every default."""


def revision() -> str:
    """The git commit of the code, with `+` where files were changed; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def record(options: argparse.Namespace | Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What produced an output: command, options, revision, versions, time."""
    given = vars(options) if isinstance(options, argparse.Namespace) else dict(options)
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": {
            key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
            for key, value in given.items()
        },
        "revision": revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def write_record(
    path: str | Path, options: argparse.Namespace | Mapping[str, Any], overwrite: bool = False, **more: Any
) -> None:
    """Write `record(...)` as JSON beside an output."""
    with atomic_write(path, overwrite) as partial:
        partial.write_text(json.dumps(record(options, **more), indent=1, default=str) + "\n")


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Before anything is computed, make sure that outputs may be written.

    Raises:
        FileExistsError: naming the first that exists, unless `overwrite`.
    """
    found = next((path for path in paths if path.exists()), None)
    if found is not None and not overwrite:
        raise FileExistsError(f"{found} exists; choose another --out, or add --overwrite")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one (of several processes on a machine each takes its own), else the CPU.

    Raises:
        ValueError: if CUDA is asked for and absent.
    """
    if name == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", local_rank() % count) if count else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device here; use --device cpu")
    return torch.device(name)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --seed."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--seed", type=int, default=42, help="seed of the noise; image i draws from (seed, i, step)")


@contextmanager
def step_bar(name: str, runs: int = 1) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over the steps of `runs` trainings of one length; call it with (steps done, steps in all, loss)."""
    with tqdm(desc=name, unit="step") as bar:

        def progress(_done: int, steps: int, loss: float) -> None:
            bar.total = steps * runs
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield progress


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`; errors a user can act on end it with their message and exit code 1,
    an interrupt (Ctrl-C) with exit code 130.

    In a SLURM job SIGUSR1 puts the job back into the queue: scripts continue what they were stopped in.
    The project's scripts may import one another inside functions, wherever this one was started from.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    requeue_when_asked()
    try:
        main()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
