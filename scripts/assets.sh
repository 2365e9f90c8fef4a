#!/usr/bin/env bash
# Draws the pictures of README and docs again whose models scripts/quickstart.sh trains, into assets/:
#   members, classes, pixels, rollout_certain, rollout_uncertain     from the quickstart's ensemble
#   toy                                                              of Gaussian classes in the plane, without training
# The other pictures show models that the quickstart does not train: the commands beside each picture in docs/ train and draw them.
#   bash scripts/assets.sh [DIR]          DIR: where the quickstart's results are (default logs)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ensemble=${1:-logs}/bootstrapped_digits_5
assets=$here/assets
drawn=$(mktemp -d)
trap 'rm -rf "$drawn"' EXIT

python -m ldm sample members --path "$ensemble" --out "$drawn/samples"
cp "$drawn/samples/members_branch0.png" "$assets/members.png"

python -m ldm rollout --path "$ensemble" --branch_at 0.5 --out "$drawn/rollouts"
# The first class with one image, and the first with all of its images.
cp "$(ls "$drawn"/rollouts/rollout_bin1_*.png | head -n 1)" "$assets/rollout_uncertain.png"
cp "$(ls "$drawn"/rollouts/rollout_binall_*.png | head -n 1)" "$assets/rollout_certain.png"

python -m ldm uncertainty classes --path "$ensemble" --out "$drawn/classes"
cp "$drawn/classes/uncertainty.png" "$assets/classes.png"

python -m ldm uncertainty pixels --path "$ensemble" --out "$drawn/pixels"
cp "$drawn/pixels/pixel_unc_branch0_0.png" "$assets/pixels.png"

python -m ldm uncertainty toy --out "$drawn/toy"
cp "$drawn/toy/toy.png" "$assets/toy.png"
