"""Score the images of data sets at one or more pyramid levels.

Reads   DATA_DIR/<mvtype>/{train,valid,test}_data.npy   (from data_to_matrices.py)
Writes  RESULTS_DIR/<version>_pyramid_lvl_<level>/rep_num_<rep>/<mvtype>/

    python sinbad_single_layer.py --mvtype pushpins_loco --pyramid_level 7
    python sinbad_single_layer.py --mvtype all --pyramid_level 7 14 --crop_size_ratio .25 .5 .7 .99
    python sinbad_single_layer.py --mvtype all --pyramid_level 224 --rep 0-99

Levels 7, 14, 28, 56 are a ResNet's stages, 224 the raw pixels. What shares a forward pass is
computed in one. Finished outputs are skipped; a run that was killed is started again with the same
command.
"""

import argparse
import os
from pathlib import Path

from command_line import (
    ScriptParser,
    add_rep_flag,
    flatten,
    integer_from,
    number_between,
    run_script,
)
from crop_descriptors import Descriptor
from crop_scores import ScoreTask
from loco_datasets import (
    CROP_NUM_EDGE,
    DEFAULT_CROP_RATIO,
    DEFAULT_DATA_DIR,
    DEFAULT_RESULTS_DIR,
    DEFAULT_VERSION,
    IM_SIZE,
    LEVELS,
    NETWORK_DEFAULTS,
    PRECISIONS,
    RESNET_SETTINGS,
    choose_mvtypes,
    crop_corners,
    level_settings,
)
from score_runs import RunOptions, score_tasks
from sinbad_utils import choose_device


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how scores are computed, not which."""
    parser.add_argument(
        "--net", default=NETWORK_DEFAULTS["net"], help="a ResNet or ResNeXt of torchvision"
    )
    parser.add_argument(
        "--weights",
        default=NETWORK_DEFAULTS["weights"],
        help="imagenet (downloaded once), random, or a state_dict file",
    )
    parser.add_argument(
        "--crop_num_edge", type=integer_from(1), default=CROP_NUM_EDGE, help="stride = side / this"
    )
    parser.add_argument(
        "--batch_size",
        type=integer_from(1),
        help="crops of one forward pass; default 32, on a GPU 256",
    )
    parser.add_argument("--results_dir", type=Path, default=DEFAULT_RESULTS_DIR, help="scores")
    parser.add_argument("--version_name", default=DEFAULT_VERSION, help="start of the folder names")
    parser.add_argument(
        "--initial_res",
        type=integer_from(8),
        default=IM_SIZE,
        help="side of the matrices in pixels",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=NETWORK_DEFAULTS["precision"],
        help="of the network alone; tf32 acts on CUDA only",
    )
    parser.add_argument(
        "--num_workers",
        type=integer_from(1),
        default=os.cpu_count() or 1,
        help="threads that read images",
    )
    parser.add_argument(
        "--official",
        action="store_true",
        help="the authors' numerics: ranges of each split's own images, C^-1 for C^(-1/2)",
    )
    parser.add_argument("--overwrite", action="store_true", help="compute finished outputs again")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--mvtype", nargs="+", required=True, help="data sets, classes, loco, struct or all"
    )
    parser.add_argument(
        "--pyramid_level",
        type=int,
        nargs="+",
        choices=LEVELS,
        default=[7],
        help="7, 14, 28, 56: ResNet stages, by the side of their feature map; 224: raw pixels",
    )
    parser.add_argument(
        "--crop_size_ratio",
        type=number_between(0, 1, low_open=True, high_open=True),
        nargs="+",
        default=[DEFAULT_CROP_RATIO],
        help="side of a crop as a share of the image's, above 0 and below 1",
    )
    parser.add_argument(
        "--n_projections", type=integer_from(1), help="directions; default 1000, level 224: 10"
    )
    parser.add_argument(
        "--n_quantiles",
        type=integer_from(1),
        default=RESNET_SETTINGS.n_quantiles,
        help="thresholds of a direction",
    )
    parser.add_argument(
        "--shrinkage_factor",
        type=number_between(0, 1, low_open=True),
        help="of the covariance, above 0 to 1; default .1, level 224: 1",
    )
    add_rep_flag(parser, "repetitions, as 3 or 0-99")
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of the random directions")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="matrices")
    add_run_flags(parser)
    return parser.parse_args(argv)


def run_options(
    args: argparse.Namespace, data_dir: Path, descriptors: dict[int, Descriptor]
) -> RunOptions:
    """Collect the flags of `add_run_flags`, the matrices' folder and the levels' descriptors."""
    names = set(RunOptions.__dataclass_fields__) - {"data_dir", "descriptors"}
    flags = {name: getattr(args, name) for name in names}
    return RunOptions(**flags, data_dir=data_dir, descriptors=descriptors)


def main(argv: list[str] | None = None) -> None:
    """Score the data sets asked for and print the files written."""
    args = parse_args(argv)
    descriptors = {}
    for level in args.pyramid_level:
        defaults = level_settings(level)
        descriptors[level] = Descriptor(
            args.n_projections or defaults.n_projections,
            args.n_quantiles,
            args.shrinkage_factor or defaults.shrinkage,
        )
    found = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    tasks = {
        ScoreTask(mvtype, level, ratio, args.seed, rep): args.version_name
        for mvtype in choose_mvtypes(args.mvtype, found)
        for level in args.pyramid_level
        for ratio in args.crop_size_ratio
        for rep in flatten(args.rep)
    }
    for ratio in args.crop_size_ratio:
        crop_corners(args.initial_res, ratio, args.crop_num_edge)  # stops if there is no such grid
    device = choose_device(args.device)
    options = run_options(args, args.data_dir, descriptors)
    for path in score_tasks(tasks, options, device).values():
        print(path)


if __name__ == "__main__":
    run_script(main)
