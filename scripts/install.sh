# Sourced by quickstart.sh and test.sh: an environment with everything the project needs.
# Uses the active virtual environment, else makes .venv; installs only when requirements changed. $1: extras ("dev,lsun"); with
# "dev" among them, also what tests compare with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    python=""
    for candidate in python3.12 python3.11 python3.13 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || { echo "error: Python 3.10 to 3.13 with venv is needed" >&2; exit 1; }
    [ -f .venv/bin/activate ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

extra=${1:-}
stamp="$VIRTUAL_ENV/.decu-$(cat pyproject.toml setup.py requirements.txt scripts/install.sh | cksum | cut -d' ' -f1)-$extra"
if [ ! -f "$stamp" ]; then
    echo "installing into $VIRTUAL_ENV (several minutes the first time)"
    began=$SECONDS
    if ! command -v nvidia-smi >/dev/null 2>&1 && ! python -c 'import torch' 2>/dev/null; then
        # Without an NVIDIA GPU the CPU build of torch, a tenth of the size; what pip finds by itself where that fails.
        PIP_CONFIG_FILE=/dev/null python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 \
            --timeout 15 --index-url https://download.pytorch.org/whl/cpu \
            "$(sed -n 's/^ *"\(torch>=[^"]*\)",$/\1/p' pyproject.toml)" 2>/dev/null || true
    fi
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt ${extra:+-e ".[$extra]"}
    # The package asks for torchvision, which breaks beside a CPU build of torch and is not needed for its quantiser.
    python -m pip install --quiet --disable-pip-version-check --no-deps taming-transformers-rom1504==0.0.6
    case ",$extra," in *,dev,*)
        # The names of the extra `laplace`, which declare torchvision too and do not need it.
        python -m pip install --quiet --disable-pip-version-check --no-deps \
            -r <(sed -n '/^laplace = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml)
        # In a folder apart, for tests alone: see tests/comparisons.py.
        apart="$(python -c 'import sys; print(sys.prefix)')/comparisons"
        python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$apart" \
            'torch-fidelity>=0.3' 'transformers>=4.40'
        python -m pip install --quiet --disable-pip-version-check -r <(PYTHONPATH=$apart python -c '
from importlib.metadata import requires
print(*(name for name in requires("transformers") if "extra ==" not in name), sep="\n")')
        ;;
    esac
    touch "$stamp"
    echo "installed in $((SECONDS - began)) s, $(du -sh "$VIRTUAL_ENV" | cut -f1)"
fi
