#!/usr/bin/env bash
# Install what the tests need, check style and types, and run the tests. Further words go to pytest:
#   bash scripts/test.sh                        all but the slow tests
#   bash scripts/test.sh -m slow                the slow tests: whole trainings, several processes, another device
#   bash scripts/test.sh -m "slow or not slow"  every test
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/install.sh" dev,docs,lsun,wandb,diffusers,text

ruff check .
ruff format --check .
python -m mypy
OMP_NUM_THREADS=1 python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal --durations 10 -m "not slow" "$@"
