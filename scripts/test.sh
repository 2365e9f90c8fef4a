#!/usr/bin/env bash
# Install what the tests need and run them, slow ones included. Further words go to pytest:
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh -m "not slow"        the quick part
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/install.sh" dev,lsun,wandb,diffusers

ruff check .
ruff format --check .
python -m mypy
OMP_NUM_THREADS=1 python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal --durations 10 "$@"
