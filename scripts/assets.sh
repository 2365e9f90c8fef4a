#!/usr/bin/env bash
# Draws the pictures of README and docs again, into assets/. Each belongs to a group, which trains what it needs and does not find
# in logs/ (LOGS=DIR names another folder); pages in docs/ show the same commands, and say what the pictures are of.
#   bash scripts/assets.sh                     lists the groups with their pictures
#   bash scripts/assets.sh GROUP [GROUP ...]   draws theirs; `all` draws every one
# Minutes are of one CPU core; those of groups marked ~ are estimates from the parts that were timed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs=${LOGS:-logs}
work=$logs/assets # posteriors, classifiers, features: kept
drawn=$(mktemp -d)
trap 'rm -rf "$drawn"' EXIT

groups="
quickstart     members classes pixels rollout_certain rollout_uncertain    2 min; the ensemble of scripts/quickstart.sh
shapes         shapes_pixels shapes_by_images                              36 min
toy            toy                                                         1 min
laplace        bayesdiff_steps bayesdiff_sweep                             3 min; the base model of scripts/quickstart.sh
acting         acting_promises acting_intervals acting_attribution acting_trainings    12 min; the same
value          acting_value                                                3 min
ood            acting_ood                                                  2 min; data/mnist, data/omniglot, data/cifar10
steering       acting_steering                                             1 min
recipes        recipes_averages recipes_guidance                           ~20 min
benchmark      benchmark_detection                                         24 min
controls       same_class number_of_members                                ~60 min
flow           two_kinds bayesflow_methods bayesflow_classes bayesflow_grid flow_ensemble    ~20 min
digits_vq      digits_latent                                               ~15 min
captions       captions                                                    ~20 min
inpainting     inpainting_digits                                           ~5 min
omniglot       omniglot                                                    ~60 min; data/omniglot
mnist          mnist_latent bayesdiff_mnist                                ~60 min; data/mnist
evaluation     evaluation_sizes evaluation_distortions                     3 min; data/mnist
exposure       exposure_norms exposure_delta                               ~15 min; data/mnist
guidance       classifier_guidance                                         ~15 min; data/mnist
features       ddae_mnist ddae_contrastive ddae_noise                      22 min; data/mnist
"

refuse() { echo "error: $1" >&2; exit 2; }
decu() { python -m ldm "$@"; }
take() { cp "$1" "assets/$2.png" && echo "assets/$2.png"; }
newest() { { ls -d "$logs"/*_"$1" 2>/dev/null || true; } | sort | tail -n 1; }
data() { [ -d "data/$1" ] || refuse "the group $group reads data/$1, which is not there: fetch it as docs/data.md says"; }
quickstart() { [ -n "$(newest digits_base)" ] || refuse "the group $group shows what scripts/quickstart.sh trains: run it first"; }

train() { # NAME CONFIG ...: a finished run of this name below logs
    local name=$1; shift
    [ -f "$(newest "$name")/finished.json" ] && return
    decu train --base "$@" -t --gpus 0, --scale_lr False --name "$name" --logdir "$logs"
}

members() { # CONFIG BASE_RUN CHECKPOINT NAME COUNT: members of a base model, trained in one run and gathered
    [ -f "$3" ] || decu export --run "$(newest "$2")" --out "$3"
    ls -d "$logs/$4"_* >/dev/null 2>&1 && return
    decu train --base "$1" -t --gpus 0, --scale_lr False --start_from_pretrained --seed 0 --component all --members "$5" --ensemble_name "$4" --logdir "$logs"
    decu gather --path "$logs" --ensemble_name "$4" --ensemble_comps "$5"
}

fit() { # RUN NAME OPTION ...: a posterior of the last layer
    local run=$1 name=$2; shift 2
    [ -f "$work/$name/laplace.yaml" ] || decu laplace fit --run "$run" --out "$work/$name" "$@"
}

draw_quickstart() {
    quickstart
    decu sample members --path "$logs/bootstrapped_digits_5" --out "$drawn/members"
    take "$drawn/members/members_branch0.png" members
    decu uncertainty classes --path "$logs/bootstrapped_digits_5" --out "$drawn/classes"
    take "$drawn/classes/uncertainty.png" classes
    decu uncertainty pixels --path "$logs/bootstrapped_digits_5" --out "$drawn/pixels"
    take "$drawn/pixels/pixel_unc_branch0_0.png" pixels
    decu rollout --path "$logs/bootstrapped_digits_5" --branch_at 0.5 --out "$drawn/rollouts"
    take "$(ls "$drawn"/rollouts/rollout_bin1_*.png | head -n 1)" rollout_uncertain # the first class with one image
    take "$(ls "$drawn"/rollouts/rollout_binall_*.png | head -n 1)" rollout_certain # the first with all of its images
}

draw_shapes() {
    python -m benchmarks.shapes --out "$work/shapes"
    [ -f "$work/my.yaml" ] || decu new --data "$work/shapes" --size 32 --out "$work/my.yaml"
    decu uncertainty study --config "$work/my.yaml" --logdir "$logs" lightning.trainer.max_steps=900
    decu uncertainty pixels --path "$logs/bootstrapped_my_5" --classes yellow_square white_bars red_disc purple_star orange_triangle magenta_heart green_cross cyan_check brown_stripes blue_ring --out "$drawn/shapes"
    take "$drawn/shapes/pixel_unc_branch0_0.png" shapes_pixels
    take "$logs/bootstrapped_my_5/samps_uncs_branch0/by_images.png" shapes_by_images
}

draw_toy() {
    decu uncertainty toy --out "$drawn/toy"
    take "$drawn/toy/toy.png" toy
}

draw_laplace() {
    quickstart
    fit "$(newest digits_base)" digits --draws 4 --also sandwich
    decu laplace sample --run "$(newest digits_base)" --posterior "$work/digits" --n 8 --steps 10 --out "$drawn/samples"
    take "$drawn/samples/steps.png" bayesdiff_steps
    decu laplace sweep --run "$(newest digits_base)" --posterior "$work/digits" --n 8 --scale 1 --sigmas 0.01 0.1 1 \
        --precisions 0.1 10 1e3 1e5 1e7 1e9 --out "$drawn/sweep"
    take "$drawn/sweep/sweep.png" bayesdiff_sweep
}

draw_acting() {
    quickstart
    train digits_1 configs/latent-diffusion/digits.yaml --seed 1
    train digits_2 configs/latent-diffusion/digits.yaml --seed 2
    fit "$(newest digits_base)" trained_base --draws 4 --visits 4 --also sandwich
    fit "$(newest digits_1)" trained_1 --draws 4 --visits 4 --also sandwich
    fit "$(newest digits_2)" trained_2 --draws 4 --visits 4 --also sandwich
    for name in base 1 2; do
        decu laplace sample --run "$(newest "digits_$name")" --posterior "$work/trained_$name" --n 1500 --method path --steps 10 \
            --scale 1 --control_maps energy edges --seed 0 --out "$drawn/trained_$name"
    done
    [ -f "$work/digits.safetensors" ] || decu evaluate classifier --base configs/evaluation/digits.yaml --out "$work/digits.safetensors"
    python -m benchmarks.promises --samples "$drawn"/trained_{base,1,2} --judge "$work/digits.safetensors" --risk 0.05 --out "$drawn/promises"
    take "$drawn/promises/promises.png" acting_promises
    decu sample restore --run "$(newest digits_base)" --noise 0.5 --posterior "$work/trained_base" --risk 0.1 --confidence 0.9 --out "$drawn/restored"
    take "$drawn/restored/restored.png" acting_intervals
    decu attribute --run "$(newest digits_base)" --posterior "$work/trained_base" --samples "$drawn/trained_base" --scale 1 --steps 10 --seed 0 \
        --n 6 --out "$drawn/attribution"
    take "$drawn/attribution/attribution.png" acting_attribution
    decu evaluate reference --data target=ldm.data.digits.Digits params.split=train --features classifier --weights "$work/digits.safetensors" \
        --out "$drawn/digits-train"
    decu evaluate trainings --runs "$(newest digits_base)" "$(newest digits_1)" "$(newest digits_2)" --n 500 --steps 10 \
        --ref "$drawn/digits-train" --out "$drawn/trainings"
    take "$drawn/trainings/trainings.png" acting_trainings
}

draw_value() {
    python -m benchmarks.value --out "$drawn/value"
    take "$drawn/value/value.png" acting_value
}

draw_ood() {
    data mnist; data omniglot; data cifar10
    python -m benchmarks.ood --mnist data/mnist --omniglot data/omniglot --cifar data/cifar10 --out "$drawn/ood"
    take "$drawn/ood/ood.png" acting_ood
}

draw_steering() {
    python -m benchmarks.steering --out "$drawn/steering"
    take "$drawn/steering/steering.png" acting_steering
}

draw_recipes() {
    python -m benchmarks.recipes --out "$work/recipes" --parts small_data averages weights guidance
    take "$work/recipes/averages.png" recipes_averages
    take "$work/recipes/guidance.png" recipes_guidance
}

draw_benchmark() {
    decu benchmark --config configs/uncertainty/digits.yaml --out "$work/benchmark" benchmark.seeds=6
    take "$work/benchmark/detection.png" benchmark_detection
}

draw_controls() {
    python benchmarks/decu.py --base configs/latent-diffusion/digits.yaml --out "$work/controls"
    take "$work/controls/same_class_0.5.png" same_class
    take "$work/controls/members.png" number_of_members
}

draw_flow() {
    bash scripts/bayesflow_plots.sh --data digits --logs "$logs"
    take "$logs/bayesflow/digits/two_kinds.png" two_kinds
    take "$logs/bayesflow/digits/methods.png" bayesflow_methods
    take "$logs/bayesflow/digits/by_class.png" bayesflow_classes
    take "$logs/bayesflow/digits/grid_flow.png" bayesflow_grid
    [ -d data/digits_bins ] || decu data bins --base configs/flow-matching/digits.yaml
    members configs/flow-matching/digits.yaml digits-flow logs/pretrained/digits-flow/trunk.ckpt flows 5
    decu uncertainty classes --path "$logs/flows_digits_5" --distance wasserstein --branch_at 0.5 --out "$drawn/flows"
    take "$drawn/flows/uncertainty.png" flow_ensemble
}

draw_digits_vq() {
    train digits_vq configs/autoencoder/digits-vq.yaml
    [ -f logs/pretrained/digits/vq.ckpt ] || decu export --run "$(newest digits_vq)" --out logs/pretrained/digits/vq.ckpt
    train digits_latent configs/latent-diffusion/digits-vq.yaml
    decu evaluate recognise --run "$(newest digits_latent)" --n 50 --steps 20 --grid "$drawn/digits_latent.png"
    take "$drawn/digits_latent.png" digits_latent
}

draw_captions() {
    for digit in zero one two three four five six seven eight nine; do echo "a handwritten $digit"; done >"$drawn/prompts.txt"
    python -m benchmarks.captions --out "$work/captions" --words digits --seeds 0
    decu uncertainty classes --path "$work"/captions/digits_0/digits_*_5 --prompts "$drawn/prompts.txt" --n 8 --out "$drawn/captions"
    take "$drawn/captions/uncertainty.png" captions
}

draw_inpainting() {
    train inpainting configs/inpainting/digits.yaml
    [ -d data/digits_bins ] || decu data bins --base configs/inpainting/digits.yaml
    members configs/inpainting/digits.yaml inpainting logs/pretrained/digits-inpainting/trunk.ckpt holes 4
    python -m benchmarks.inpainting --path "$logs/holes_digits_4" --out "$drawn/inpainting.png"
    take "$drawn/inpainting.png" inpainting_digits
}

draw_omniglot() {
    data omniglot
    train omniglot configs/latent-diffusion/omniglot.yaml
    [ -d data/omniglot_bins ] || decu data bins --base configs/latent-diffusion/omniglot.yaml --classes_per_bin 1:60 3:60 8:60 all:62
    members configs/latent-diffusion/omniglot.yaml omniglot logs/pretrained/omniglot/trunk.ckpt characters 5
    decu uncertainty classes --path "$logs/characters_omniglot_5" --n 8 --steps 50 --out "$drawn/omniglot"
    take "$drawn/omniglot/distributions.png" omniglot
}

draw_mnist() {
    data mnist
    train mnist_vq configs/autoencoder/mnist-vq.yaml
    [ -f logs/pretrained/mnist/vq.ckpt ] || decu export --run "$(newest mnist_vq)" --out logs/pretrained/mnist/vq.ckpt
    train mnist_latent configs/latent-diffusion/mnist.yaml
    decu evaluate recognise --run "$(newest mnist_latent)" --n 50 --steps 20 --grid "$drawn/mnist_latent.png"
    take "$drawn/mnist_latent.png" mnist_latent
    fit "$(newest mnist_latent)" mnist --n 1000 --draws 2 --visits 2 --also sandwich
    decu laplace sample --run "$(newest mnist_latent)" --posterior "$work/mnist" --n 40 --steps 10 --draws 8 --out "$drawn/mnist"
    take "$drawn/mnist/maps.png" bayesdiff_mnist
}

draw_evaluation() {
    data mnist
    [ -f "$work/mnist.safetensors" ] || decu evaluate classifier --base configs/evaluation/mnist.yaml --out "$work/mnist.safetensors"
    decu evaluate reference --data target=ldm.data.idx.MNIST params.root=data/mnist --n 20000 --features classifier --weights "$work/mnist.safetensors" --out "$drawn/mnist-20k"
    decu evaluate metrics --data target=ldm.data.idx.MNIST params.root=data/mnist params.split=test --ref "$drawn/mnist-20k" --metrics fid kid cmmd cmmd_biased --sample_sizes 500 1000 2000 5000 10000 --resamples 100 --fid_resamples 10 --out "$drawn/sizes"
    take "$drawn/sizes/sample_sizes.png" evaluation_sizes
    decu evaluate metrics --data target=ldm.data.idx.MNIST params.root=data/mnist params.split=test --n 1000 --ref "$drawn/mnist-20k" --metrics fid kid cmmd is precision_recall density_coverage --resamples 100 --fid_resamples 10 --kid_subsets 0 --splits 1 --distortions blur noise swaps --out "$drawn/distortions"
    take "$drawn/distortions/distortions.png" evaluation_distortions
}

draw_exposure() {
    data mnist
    train mnist_adm configs/guided-diffusion/mnist.yaml
    decu exposure choose --method norms --run "$(newest mnist_adm)" --sampler DDPM --steps 10 --spacing respace --n 400 --rounds 2 --out "$drawn/norms"
    decu exposure measure --run "$(newest mnist_adm)" --sampler DDPM --steps 10 --spacing respace --n 600 --eps_schedule "$drawn/norms/schedule.yaml" --out "$drawn/by_norms"
    take "$drawn/by_norms/norms.png" exposure_norms
    decu exposure measure --run "$(newest mnist_adm)" --sampler DDPM --steps 10 --spacing respace --n 600 --eps_scaler 0.94 --out "$drawn/by_b"
    take "$drawn/by_b/delta.png" exposure_delta
}

draw_guidance() {
    data mnist
    train mnist_adm configs/guided-diffusion/mnist.yaml
    train mnist_guide configs/guided-diffusion/mnist-classifier.yaml
    for scale in 0 1 4; do
        decu evaluate recognise --run "$(newest mnist_adm)" --sampler DDPM --steps 20 --spacing respace --n 40 --classifier_config configs/guided-diffusion/mnist-classifier.yaml --classifier_ckpt "$(newest mnist_guide)/checkpoints/last.ckpt" --classifier_scale "$scale" --grid "$drawn/scale_$scale.png"
    done
    python - "$drawn" <<'PYTHON'
import sys
from PIL import Image
from matplotlib.figure import Figure
from ldm.images import save_figure

figure = Figure(figsize=(18, 7), layout="constrained")
for axes, scale in zip(figure.subplots(1, 3), (0, 1, 4)):
    axes.imshow(Image.open(f"{sys.argv[1]}/scale_{scale}.png"))
    axes.set_title(f"classifier_scale {scale}" if scale else "without a classifier")
    axes.set_axis_off()
save_figure(figure, f"{sys.argv[1]}/guidance.png")
Image.open(f"{sys.argv[1]}/guidance.png").convert("L").save(f"{sys.argv[1]}/guidance.png", optimize=True)  # half as large
PYTHON
    take "$drawn/guidance.png" classifier_guidance
}

draw_features() {
    data mnist
    train mnist_ddae configs/ddae/mnist.yaml
    decu features probe --run "$(newest mnist_ddae)" --grid --t 11 51 101 --n_train 5000 --out "$drawn/probe"
    take "$drawn/probe/trained.png" ddae_mnist
    decu features contrastive --run "$(newest mnist_ddae)" --t 51 --layers all --n 2000 --positives noise class --out "$drawn/contrastive"
    take "$drawn/contrastive/contrastive.png" ddae_contrastive
    decu features classifier --run "$(newest mnist_ddae)" --layers mid --pool 2 --precision bf16 --n_train 10000 --n_test 1000 --epochs 10 --batch_size 32 --seed 0 --out "$drawn/head on DDAE features, VP"
    decu features network --base configs/ddae/mnist.yaml --mode VP --depth 16 --width 1 --n_train 10000 --n_test 1000 --epochs 10 --warm_up 1 --seed 0 --out "$drawn/WRN-16-1, VP"
    decu features network --base configs/ddae/mnist.yaml --mode VE --depth 16 --width 1 --n_train 10000 --n_test 1000 --epochs 10 --warm_up 1 --seed 0 --beside "$drawn/head on DDAE features, VP/recognition.csv" "$drawn/WRN-16-1, VP/recognition.csv" --out "$drawn/WRN-16-1, VE"
    take "$drawn/WRN-16-1, VE/recognition.png" ddae_noise
}

names=$(echo "$groups" | awk 'NF { print $1 }')
[ $# -gt 0 ] || { echo "groups, their pictures, how long they take, and what they need:$groups"; exit 0; }
[ "$*" != all ] || set -- $names
for group in "$@"; do
    echo "$names" | grep -qx "$group" || refuse "there is no group '$group'; without a word the script lists them"
done
for group in "$@"; do "draw_$group"; done
