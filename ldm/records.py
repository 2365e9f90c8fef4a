"""Records of what produced an output: command, options, revision, versions; and the refusal to replace outputs."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm.files import read_mapping
from ldm.options import option_values
from ldm.util import atomic_write

# The name under which the package is installed.
DISTRIBUTION = "decu-uncertainty"

# A line of a table: {column: value}.
Row = dict[str, Any]


def revision() -> str:
    """Return the git commit of the code, with `+` where files were changed.

    An installed package has no commit of its own, wherever it lies (in a virtual environment below somebody's own
    repository, say): it gives its name and version, "decu-uncertainty 0.2.0", and `unknown` if it has neither.
    """
    folder = Path(__file__).parents[1]
    try:
        if not (folder / ".git").exists():
            return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError, PackageNotFoundError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def record(options: Mapping[str, Any] | Any, **more: Any) -> dict[str, Any]:
    """Return what produced an output: command, options, revision, versions, time.

    Args:
        options: a command or another dataclass, or a mapping of names to values.
        more: further entries.
    """
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": _plain_options(options),
        "revision": revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def _plain_options(options: Mapping[str, Any] | Any) -> dict[str, Any]:
    given = option_values(options) if is_dataclass(options) else dict(options)
    return {
        key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
        for key, value in given.items()
    }


def made_alike(path: str | Path, options: Mapping[str, Any] | Any) -> bool:
    """Whether a record says that the same options made what lies beside it: another process of the same job, then."""
    if not Path(path).is_file():
        return False
    kept = read_mapping(path, "a command's record", "delete it").get("options")
    return kept == json.loads(json.dumps(_plain_options(options), default=str))


def write_record(path: str | Path, options: Mapping[str, Any] | Any, overwrite: bool = False, **more: Any) -> None:
    """Write `record(...)` as JSON beside an output."""
    with atomic_write(path, overwrite) as partial:
        partial.write_text(json.dumps(record(options, **more), indent=1, default=str) + "\n")


def refuse_existing(paths: Iterable[Path], overwrite: bool, option: str = "--out") -> None:
    """Before anything is computed, make sure that outputs may be written, whose place an option names.

    Raises:
        FileExistsError: naming the first that exists, unless `overwrite`.
    """
    found = next((path for path in paths if path.exists()), None)
    if found is not None and not overwrite:
        raise FileExistsError(f"{found} exists; choose another {option}, or add --overwrite")
