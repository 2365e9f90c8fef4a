"""What the scripts share: argument groups, devices, the record written beside every output."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.jobs import requeue_when_asked

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


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --seed."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--seed", type=int, default=42, help="seed of the noise; image i draws from (seed, i, step)")


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
