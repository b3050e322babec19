"""Reproduce the paper's table in one go: images to matrices to scores to ensembled ROC-AUC.

Reads   DATASET_DIR/<class>/{train,validation,test}/...   (MVTec LOCO AD, or another layout)
Writes  DATA_DIR/<mvtype>/*.npy                           (as data_to_matrices.py)
        RESULTS_DIR/<version>_pyramid_lvl_<level>/...     (as sinbad_single_layer.py)
        OUT/{table.md,metrics.json,scores.csv,*.csv,*.png}

    python reproduce_paper.py --dataset_dir ../dataset_loco
    python reproduce_paper.py --dataset_dir ../dataset_loco --seeds 0 1 2 3 4

The numbers are those of the step-by-step scripts, to the bit. Finished matrices and scores are
skipped; a run that was killed is started again with the same command. Scores of seed k > 0 lie
under the version name <version>_seed<k>. Where there is no validation folder, training images are
taken for it, the same for all seeds: those of data_to_matrices.py with its default seed.
"""

import argparse
import multiprocessing
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from threading import Thread

import torch

from data_to_matrices import make_matrices
from sinbad import backbones, cli, ensembles, errors, layouts, loco, report, score_plans
from sinbad_single_layer import score_and_save


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    groups = (
        cli.network_flags(),
        cli.scoring_flags(),
        cli.results_flags(),
        cli.report_flags(),
        cli.workers_flag(),
    )
    parser = cli.ScriptParser(__doc__, groups)
    add = parser.add_argument
    add("--mvtype", nargs="+", help="data sets, classes, loco, struct or all; default: all found")
    add(
        "--seeds",
        type=cli.integer_from(0),
        nargs="+",
        default=[0],
        help="several give mean and std",
    )
    cli.add_level_flag(parser, default=[*loco.PAPER_LEVELS, loco.PIXEL_LEVEL])
    add(
        "--rep_num_224",
        type=cli.integer_from(1),
        default=loco.PIXEL_SETTINGS.n_reps,
        help="raw-pixel repetitions",
    )
    add(
        "--device",
        nargs="+",
        default=["auto"],
        help="auto, cpu, cuda or cuda:<i>; several share the classes",
    )
    add("--data_dir", type=Path, help="default: DATASET_DIR/data_matrices")
    layouts.add_valid_share_flag(parser)
    add("--out", type=Path, default=loco.DEFAULT_RUNS_DIR / "paper", help="tables and pictures")
    add("--overwrite", action="store_true", help="make finished outputs again")
    ensembles.add_ensemble_flags(parser)
    return parser.parse_args(argv)


def version_of_seed(version: str, seed: int) -> str:
    """Return the version name that a seed's scores lie under; seed 0 is the plain one."""
    return version if seed == 0 else f"{version}_seed{seed}"


def paper_tasks(
    mvtypes: list[str], levels: list[int], seeds: list[int], n_pixel_reps: int, version: str
) -> list[score_plans.ScoreTask]:
    """Return every file of scores of the paper's settings."""
    return [
        score_plans.ScoreTask(mvtype, level, ratio, seed, rep, version_of_seed(version, seed))
        for mvtype in mvtypes
        for level in dict.fromkeys(levels)
        for ratio in loco.level_settings(level).crop_ratios
        for seed in dict.fromkeys(seeds)
        for rep in range(
            n_pixel_reps if level == loco.PIXEL_LEVEL else loco.level_settings(level).n_reps
        )
    ]


def end_with_parent() -> None:
    """Let a worker end with the process that it works for, however that one ends."""
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def score_on_devices(plan: score_plans.ScorePlan, devices: list[torch.device]) -> None:
    """Score a plan's tasks; several devices take turns by class, each in its own process."""
    if len(devices) == 1:
        score_and_save(plan, devices[0])
        return
    by_class: dict[str, list[score_plans.ScoreTask]] = defaultdict(list)
    for task in plan.tasks:
        by_class[loco.split_mvtype(task.mvtype)[0]].append(task)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ExitStack() as stack:
        workers = [
            (device, stack.enter_context(ProcessPoolExecutor(1, context, end_with_parent)))
            for device in devices
        ]
        runs = [
            process.submit(score_and_save, replace(plan, tasks=tuple(tasks)), device)
            for tasks, (device, process) in zip(by_class.values(), cycle(workers), strict=False)
        ]
        for run in runs:
            run.result()


def load_runs(
    args: argparse.Namespace, mvtypes: list[str]
) -> dict[str, list[ensembles.DataSetScores]]:
    """Read the scores of every seed and ensemble them."""
    runs = {}
    for seed in dict.fromkeys(args.seeds):
        version = version_of_seed(args.version_name, seed)
        folder = str(args.results_dir / f"{version}_pyramid_lvl_#")
        n_reps = args.rep_num_224 if loco.PIXEL_LEVEL in args.pyramid_level else 0
        options = ensembles.EnsembleOptions(
            folder,
            folder,
            loco.network_levels(args.pyramid_level),
            0,
            n_reps,
            args.lambda_factor,
            args.crop_norm,
            args.crop_pool,
        )
        runs[f"seed {seed}"] = [ensembles.load_data_set(options, mvtype) for mvtype in mvtypes]
    return runs


def main(argv: list[str] | None = None) -> None:
    """Make matrices, score, ensemble, report."""
    args = parse_args(argv)
    if "#" in f"{args.results_dir}{args.version_name}":
        raise errors.UserError(
            f"results_dir and version_name must be without #, which stands for a level, got "
            f"{args.results_dir} and {args.version_name}; choose others"
        )
    devices = [backbones.choose_device(name) for name in args.device]
    report_settings = report.report_options(args, args.out)
    if loco.network_levels(args.pyramid_level):
        backbones.load_weights(
            args.net, args.weights
        )  # if they cannot be had, say so before the long work
    mvtypes = layouts.choose_subsets(args.dataset_dir, args.mvtype)
    data_dir = args.data_dir or args.dataset_dir / "data_matrices"
    tasks = paper_tasks(
        mvtypes, args.pyramid_level, args.seeds, args.rep_num_224, args.version_name
    )
    score_plan = score_plans.ScorePlan.of(args, tasks, data_dir)
    make_matrices(
        args.dataset_dir,
        data_dir,
        mvtypes,
        args.initial_res,
        args.num_workers,
        args.overwrite,
        args.valid_share,
    )
    score_on_devices(score_plan, devices)
    print(report.write_report(load_runs(args, mvtypes), report_settings))


if __name__ == "__main__":
    errors.run_script(main)
