#!/usr/bin/env bash
# Fetch data sets and pretrained networks; see `bash prep_data.sh --help` for names and options.
#   bash prep_data.sh --dataset mnist
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${VIRTUAL_ENV:-}" ]; then
  python=$VIRTUAL_ENV/bin/python
elif [ -x "$here/.venv/bin/python" ]; then
  python=$here/.venv/bin/python
else
  python=$(command -v python3 || command -v python)
fi
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$here/scripts/prep_data.py" "$@"
