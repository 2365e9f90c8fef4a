"""`decu report`: the page of results that exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldm.options import option


@dataclass(frozen=True)
class WritePage:
    """Write the page of results that exist: one HTML file with their tables and pictures, which opens offline.

    It says in sentences what was found, then shows classes by rank, a card for each class, tables that a click sorts,
    how the results were made and how they are read.

    Examples:
      decu report logs/bootstrapped_digits_5
      decu report results/laplace/digits results/metrics

    Writes {folder}/page.html, in place of an earlier one.
    """

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, option(metavar="DIR ...")]
    """Folders that commands wrote results to: ensembles, samples with variances, metrics, probes, exposure."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("name a folder that a command wrote results to")

    def run(self) -> list[Path]:
        """Write the pages; return their paths."""
        from ldm.report.pages import write_page

        pages = [write_page(folder) for folder in self.folders]
        print("\n".join(map(str, pages)))
        return pages


def write_own_page(command: Any) -> None:
    """Write the page of a command's results: in its folder, or of all that was measured of the ensemble.

    Where other processes work on their shares still, there are no results yet, and nothing is written.
    """
    from ldm.report.pages import write_page

    folder = getattr(command, "out", None) or command.ensemble.path
    if any(Path(folder).rglob("record*.json")):
        print(write_page(folder))
