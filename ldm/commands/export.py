"""`decu export`: the weights of a training as a base checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ldm.options import option


@dataclass(frozen=True)
class Export:
    """Write the weights of a training as a base checkpoint for members: averaged where the run kept averages.

    Examples:
      decu export --run logs/2026-01-01T00-00-00_digits --out logs/pretrained/digits/base.ckpt

    The file holds nothing but weights; a record of their origin goes beside it.
    """

    source: Annotated[str, option(name="run", metavar="DIR")]
    """The run directory of a training, or a checkpoint in one."""
    out: str
    """The file to write."""
    epoch: Annotated[int | None, option(metavar="N", default="the last checkpoint")] = None
    """The checkpoint that --run kept of this epoch."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self) -> Path:
        """Write the file, and return its path."""
        from ldm.checkpoint import averaged, load_state_dict, save_checkpoint
        from ldm.records import write_record
        from ldm.training.runs import find_run

        run, checkpoint = find_run(self.source, self.epoch)
        out = Path(self.out)
        save_checkpoint({"state_dict": averaged(load_state_dict(checkpoint))}, out, self.overwrite)
        write_record(out.with_suffix(".json"), self, overwrite=True, run=run.path.name, checkpoint=checkpoint.name)
        print(out)
        return out
