#!/usr/bin/env bash
# DECU on the digits that scikit-learn carries, from nothing: install, base model, five members, ensemble, samples,
# rollouts, uncertainty per class and per pixel. What exists is kept: a second run only fills in what is missing.
#   bash scripts/quickstart.sh [DIR]          DIR: where the members and results go (default logs)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/install.sh"

logs=${1:-logs}
config=configs/latent-diffusion/digits.yaml
base=logs/pretrained/digits/trunk.ckpt
ensemble=$logs/bootstrapped_digits_5
began=$SECONDS
step() { printf '\n[%3d s] %s\n' "$((SECONDS - began))" "$*"; }
newest() { { ls -d "$1"/*_"$2" 2>/dev/null || true; } | sort | tail -n 1; }

if [ ! -f "$base" ]; then
    step "training the base model"
    run=$(newest logs digits_trunk)
    if [ -n "$run" ] && [ -f "$run/finished.json" ]; then
        echo "using the finished run $run"
    elif [ -n "$run" ] && [ -f "$run/checkpoints/last.ckpt" ]; then
        python main.py --resume "$run" -t --gpus 0,
    else
        python main.py --base $config -t --gpus 0, --scale_lr False --name digits_trunk
    fi
    python -m ldm export --run "$(newest logs digits_trunk)" --out "$base"
fi

[ -f data/digits_bins/subsets_binned_classes.yaml ] || python -m ldm data bins --base $config

if [ ! -f "$ensemble/ensemble.yaml" ]; then
    step "training the five members"
    run=$(newest "$logs" digits_bootstrappedall)
    if [ -n "$run" ] && [ -f "$run/finished.json" ]; then
        echo "using the finished run $run"
    elif [ -n "$run" ] && [ -f "$run/checkpoints/last.ckpt" ]; then
        python main.py --resume "$run" -t --gpus 0,
    else
        python main.py --base $config -t --gpus 0, --scale_lr False --start_from_pretrained --logdir "$logs" \
            --seed 0 --component all --members 5 --ensemble_name bootstrapped
    fi
    step "gathering the ensemble"
    python save_ensemble.py --path "$logs" --ensemble_name bootstrapped --ensemble_comps 5
fi

step "samples, rollouts, uncertainty per class and per pixel"
python sample_model.py --path "$ensemble" --overwrite
python sample_model_rollout.py --path "$ensemble" --branch_at 0.5 --overwrite
python get_unc_synsets.py --path "$ensemble"
python get_unc_pixels.py --path "$ensemble" --overwrite

step "done; look at"
find "$ensemble" -name '*.png' -o -name '*.csv' | sort
