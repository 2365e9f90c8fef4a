#!/usr/bin/env bash
# Every figure of BayesFlow on one data set: flow, diffusion twin, posteriors, figures. What exists is kept.
#   bash scripts/bayesflow_plots.sh --data NAME [--logs DIR] [--draws R] [--fit N] [WORDS] [-- OPTIONS]
# NAME: a config of configs/flow-matching (digits, mnist, fashion-mnist, kmnist, cifar10)
# DIR: where runs, posteriors and figures go (default logs); R: noise draws an image of a fit (default 4);
# N: images to fit to (default: all); WORDS a.b=c change the trainings' config, paths.data_root for example;
# OPTIONS go to decu laplace plots, see its --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data="" logs=logs draws=4 fit="" words=()
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=$2; shift 2 ;;
        --logs) logs=$2; shift 2 ;;
        --draws) draws=$2; shift 2 ;;
        --fit) fit=$2; shift 2 ;;
        *.*=*) words+=("$1"); shift ;;
        --) shift; break ;;
        *) sed -n '2,7p' "$0" >&2; exit 2 ;;
    esac
done
config=configs/flow-matching/$data.yaml
[ -n "$data" ] && [ -f "$config" ] || { echo "error: --data names a config of configs/flow-matching, got '$data'" >&2; exit 2; }

newest() { { ls -d "$logs"/*_"$1" 2>/dev/null || true; } | sort | tail -n 1; }

trained() { # name, further configs: train it, or go on where it stopped, or take it
    local name=$1 run; shift
    run=$(newest "$name")
    if [ -n "$run" ] && [ -f "$run/finished.json" ]; then
        echo "using the finished run $run"
    elif [ -n "$run" ] && [ -f "$run/checkpoints/last.ckpt" ]; then
        python main.py --resume "$run" -t --gpus 0,
    else
        python main.py --base "$config" "$@" -t --gpus 0, --scale_lr False --name "$name" --logdir "$logs" ${words[@]+"${words[@]}"}
    fi
}

fitted() { # name: fit the posterior of its run, if there is none
    local out=$logs/posteriors/$1
    [ -f "$out/laplace.yaml" ] || python -m ldm laplace fit --run "$(newest "$1")" --draws "$draws" ${fit:+--n "$fit"} --out "$out"
}

trained "$data-flow"
trained "$data-diffusion" configs/flow-matching/diffusion-twin.yaml
fitted "$data-flow"
fitted "$data-diffusion"
python -m ldm laplace plots --flow "$(newest "$data-flow")" --flow_posterior "$logs/posteriors/$data-flow" \
    --diffusion "$(newest "$data-diffusion")" --diffusion_posterior "$logs/posteriors/$data-diffusion" \
    --out "$logs/bayesflow/$data" "$@"
