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
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || {
  echo "error: $python lacks the project's packages: run 'bash scripts/quickstart.sh', or pip install -r requirements.txt in a virtual environment" >&2
  exit 1
}
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m ldm data prepare "$@"
