"""Write a training's weights as a trunk for components: averaged weights where the run kept them, nothing else.

Examples:
  python scripts/export_trunk.py --run logs/2026-01-01T00-00-00_digits --out logs/pretrained/digits/trunk.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.checkpoint import averaged, load_state_dict, save_checkpoint
from ldm.cli import HelpFormatter, run_script
from ldm.records import write_record
from ldm.training.runs import find_run


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", required=True, help="run directory, or a checkpoint in one")
    parser.add_argument("--epoch", type=int, help="the checkpoint that --run kept of this epoch instead of its last")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    run, checkpoint = find_run(options.run, options.epoch)
    out = Path(options.out)
    save_checkpoint({"state_dict": averaged(load_state_dict(checkpoint))}, out, options.overwrite)
    write_record(out.with_suffix(".json"), vars(options), overwrite=True, run=run.path.name, checkpoint=checkpoint.name)
    print(out)
    return out


if __name__ == "__main__":
    run_script(main)
