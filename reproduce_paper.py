"""Reproduce the paper's table in one go: images to matrices to scores to ensembled ROC-AUC.

Reads   DATASET_DIR/<class>/{train,validation,test}/...   (MVTec LOCO AD, or a tree like it)
Writes  DATA_DIR/<mvtype>/*.npy                           (as data_to_matrices.py)
        RESULTS_DIR/<version>_pyramid_lvl_<level>/...     (as sinbad_single_layer.py)
        OUT/{table.md,metrics.json,scores.csv,*.csv,*.png}

    python reproduce_paper.py --dataset_dir ../dataset_loco
    python reproduce_paper.py --dataset_dir ../dataset_loco --seeds 0 1 2 3 4

The numbers are those of the step-by-step scripts, to the bit. Finished matrices and scores are
skipped; a run that was killed is started again with the same command. Scores of seed k > 0 lie
under the version name <version>_seed<k>.
"""

import argparse
import multiprocessing
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import torch

from backbones import load_weights
from command_line import ScriptParser, UserError, integer_from, run_script
from crop_descriptors import Descriptor
from crop_scores import ScoreTask
from data_to_matrices import make_matrices
from ensembles import DataSetScores, EnsembleOptions, load_data_set
from loco_datasets import (
    DEFAULT_RUNS_DIR,
    LEVELS,
    PAPER_RESNET_LEVELS,
    PIXEL_LEVEL,
    PIXEL_SETTINGS,
    level_settings,
    split_mvtype,
)
from loco_folders import choose_data_sets
from reports import add_report_flags, report_options, write_report
from score_runs import RunOptions, output_paths, score_tasks
from sinbad_single_layer import add_run_flags, run_options
from sinbad_utils import choose_device


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--mvtype", nargs="+", help="data sets, classes, loco, struct or all; default: all found"
    )
    parser.add_argument(
        "--seeds", type=integer_from(0), nargs="+", default=[0], help="several give mean and std"
    )
    parser.add_argument(
        "--pyramid_level",
        type=int,
        nargs="+",
        choices=LEVELS,
        default=[*PAPER_RESNET_LEVELS, PIXEL_LEVEL],
        help="7, 14, 28, 56: ResNet stages; 224: raw pixels",
    )
    parser.add_argument(
        "--rep_num_224",
        type=integer_from(1),
        default=PIXEL_SETTINGS.n_reps,
        help="raw-pixel repetitions",
    )
    parser.add_argument(
        "--device",
        nargs="+",
        default=["auto"],
        help="auto, cpu, cuda or cuda:<i>; several share the classes",
    )
    parser.add_argument("--data_dir", type=Path, help="default: DATASET_DIR/data_matrices")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_RUNS_DIR / "paper", help="tables and pictures"
    )
    add_run_flags(parser)
    add_report_flags(parser)
    return parser.parse_args(argv)


def paper_descriptor(level: int) -> Descriptor:
    """Return the paper's descriptor of a level."""
    settings = level_settings(level)
    return Descriptor(settings.n_projections, settings.n_quantiles, settings.shrinkage)


def version_of_seed(version: str, seed: int) -> str:
    """Return the version name that a seed's scores lie under; seed 0 is the plain one."""
    return version if seed == 0 else f"{version}_seed{seed}"


def paper_tasks(
    mvtypes: list[str], levels: list[int], seeds: list[int], n_pixel_reps: int, version: str
) -> dict[ScoreTask, str]:
    """Return every file of scores of the paper's settings -> its version name."""
    return {
        ScoreTask(mvtype, level, ratio, seed, rep): version_of_seed(version, seed)
        for mvtype in mvtypes
        for level in dict.fromkeys(levels)
        for ratio in level_settings(level).crop_ratios
        for seed in dict.fromkeys(seeds)
        for rep in range(n_pixel_reps if level == PIXEL_LEVEL else level_settings(level).n_reps)
    }


def score_on_devices(
    tasks: dict[ScoreTask, str], options: RunOptions, devices: list[torch.device]
) -> None:
    """Score tasks; several devices take class after class, each in a process of its own."""
    if len(devices) == 1:
        score_tasks(tasks, options, devices[0])
        return
    by_class: dict[str, dict[ScoreTask, str]] = defaultdict(dict)
    for task, version in tasks.items():
        by_class[split_mvtype(task.mvtype)[0]][task] = version
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ExitStack() as stack:
        free: SimpleQueue[tuple[torch.device, ProcessPoolExecutor]] = SimpleQueue()
        for device in devices:
            free.put((device, stack.enter_context(ProcessPoolExecutor(1, mp_context=context))))

        def score_class(name: str) -> None:
            device, process = free.get()
            try:
                process.submit(score_tasks, by_class[name], options, device).result()
            finally:
                free.put((device, process))

        with ThreadPoolExecutor(len(devices)) as threads:
            list(threads.map(score_class, by_class))


def load_runs(args: argparse.Namespace, mvtypes: list[str]) -> dict[str, list[DataSetScores]]:
    """Read the scores of every seed and ensemble them."""
    runs = {}
    for seed in dict.fromkeys(args.seeds):
        version = version_of_seed(args.version_name, seed)
        folder = str(args.results_dir / f"{version}_pyramid_lvl_#")
        options = EnsembleOptions(
            folder,
            folder,
            tuple(level for level in args.pyramid_level if level != PIXEL_LEVEL),
            0,
            args.rep_num_224 if PIXEL_LEVEL in args.pyramid_level else 0,
            args.lambda_factor,
        )
        runs[f"seed {seed}"] = [load_data_set(options, mvtype) for mvtype in mvtypes]
    return runs


def main(argv: list[str] | None = None) -> None:
    """Make matrices, score, ensemble, report."""
    args = parse_args(argv)
    if "#" in f"{args.results_dir}{args.version_name}":
        raise UserError(
            f"results_dir and version_name must be without #, which stands for a level, got "
            f"{args.results_dir} and {args.version_name}; choose others"
        )
    devices = [choose_device(name) for name in args.device]
    report = report_options(args, args.out)
    if set(args.pyramid_level) - {PIXEL_LEVEL}:
        load_weights(args.net, args.weights)  # if they cannot be had, say so before the long work
    mvtypes = choose_data_sets(args.dataset_dir, args.mvtype)
    data_dir = args.data_dir or args.dataset_dir / "data_matrices"
    descriptors = {level: paper_descriptor(level) for level in args.pyramid_level}
    options = run_options(args, data_dir, descriptors)
    tasks = paper_tasks(
        mvtypes, args.pyramid_level, args.seeds, args.rep_num_224, args.version_name
    )
    output_paths(options, tasks)
    make_matrices(
        args.dataset_dir, data_dir, mvtypes, args.initial_res, args.num_workers, args.overwrite
    )
    score_on_devices(tasks, options, devices)
    print(write_report(load_runs(args, mvtypes), report))


if __name__ == "__main__":
    run_script(main)
