#!/bin/sh
# The three steps on a small drawn data set, with a small net; everything written lies in demo/. The
# paths that a step prints are left out: the last step's table is what there is to see.
# Called by `make demo`; PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
TORCH_HOME=$PWD/demo/torch
export TORCH_HOME
reps=20

if "$python" -c 'import sys; from sinbad.backbones import load_weights
from sinbad.errors import UserError
try:
    load_weights("resnet18", "imagenet")
except UserError as error:
    sys.exit(f"note: {error}")'; then
    weights=imagenet
else
    weights=random
    echo "*********************************************************************" >&2
    echo "** WARNING: no ImageNet weights here, the demo goes on with RANDOM **" >&2
    echo "** weights. Its figures say nothing about the method.              **" >&2
    echo "*********************************************************************" >&2
fi

set -x
"$python" make_demo_dataset.py --out_dir demo/dataset --n_train 24
"$python" data_to_matrices.py --dataset_dir demo/dataset --out_dir demo/matrices --im_size 256 \
    --mvtype juice_bottle pushpins
"$python" sinbad_single_layer.py --mvtype juice_bottle pushpins --pyramid_level 7 14 \
    --crop_size_ratio .25 .5 .7 .99 --net resnet18 --weights "$weights" --initial_res 256 \
    --version_name "$weights" --data_dir demo/matrices --results_dir demo/results >/dev/null
"$python" sinbad_single_layer.py --mvtype juice_bottle pushpins --pyramid_level 224 \
    --rep "0-$((reps - 1))" --initial_res 256 --version_name "$weights" \
    --data_dir demo/matrices --results_dir demo/results >/dev/null
"$python" calc_anom_ensm.py --mvtype juice_bottle pushpins \
    --version "demo/results/${weights}_pyramid_lvl_#" --version_224 "demo/results/${weights}_pyramid_lvl_#" \
    --rep_num_224 "$reps" --dataset_dir demo/dataset --out demo/tables
