#!/usr/bin/env bash
# DECU on the digits that scikit-learn carries, from nothing: install, base model, five members, ensemble, samples,
# rollouts, uncertainty per class and per pixel, and the page that shows them. What exists is kept: a second run only
# fills in what is missing.
#   bash scripts/quickstart.sh [DIR]          DIR: where the members and results go (default logs)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/install.sh"

python -m ldm uncertainty study --config configs/latent-diffusion/digits.yaml --logdir "${1:-logs}"
