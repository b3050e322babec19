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
import logging
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from threading import Thread

from data_to_matrices import make_matrices
from sinbad import backbones, cli, devices, errors, layouts, loco, report, score_files, settings
from sinbad.score_tasks import ScoreTask, check_tasks
from sinbad_single_layer import score_and_save

log = logging.getLogger("sinbad")

SETTINGS = ("rep_num_224", *cli.DESCRIPTOR_FLAGS, *cli.GRID_FLAGS, "official", *cli.ENSEMBLE_FLAGS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    default_all = {"help": f"{cli.SUBSETS} (default: all found)"}
    data_dir = {"default": None, "help": "preprocessed images (default: DATASET_DIR/data_matrices)"}
    out = {"default": cli.RUNS_DIR / "paper"}
    cli.add_shared(
        parser,
        "dataset_dir",
        "mvtype",
        "out",
        "data_dir",
        mvtype=default_all,
        data_dir=data_dir,
        out=out,
    )
    cli.add_shared(parser, "results_dir", "version_name", "overwrite", *cli.REPORT_FLAGS)
    cli.add_settings(parser, ["pyramid_level"])
    parser.group(settings.COMPUTED).add_argument(
        "--seeds",
        type=cli.int_at_least(0),
        nargs="+",
        default=[0],
        metavar="N",
        help="seeds of the random projections; several give mean and std",
    )
    cli.add_settings(parser, SETTINGS)
    cli.add_shared(parser, "valid_share")
    cli.add_settings(parser, cli.BACKBONE_FLAGS)
    parser.group(settings.MACHINE).add_argument(
        "--device",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="auto, cpu, cuda or cuda:<i>; several share the categories",
    )
    cli.add_settings(parser, ["num_workers"])
    return parser.parse_args(argv)


def version_of_seed(version: str, seed: int) -> str:
    """Return the version name that a seed's scores lie under; seed 0 is the plain one."""
    return version if seed == 0 else f"{version}_seed{seed}"


def paper_tasks(
    mvtypes: Sequence[str], values: settings.Settings, seeds: Sequence[int], version: str
) -> list[ScoreTask]:
    """Return every file of scores of the paper's settings."""
    tasks = []
    for level in values.pyramid_level:
        defaults = settings.level_defaults(level)
        n_reps = values.rep_num_224 if level == settings.PIXEL_LEVEL else defaults.n_reps
        tasks += [
            ScoreTask(mvtype, level, ratio, seed, rep, version_of_seed(version, seed))
            for mvtype in mvtypes
            for ratio in defaults.crop_ratios
            for seed in dict.fromkeys(seeds)
            for rep in range(n_reps)
        ]
    return tasks


def start_worker() -> None:
    """Show a worker's messages, and end it with the process it works for, however that ends."""
    errors.log_to_stderr()
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def score_on_devices(
    tasks: list[ScoreTask],
    values: settings.Settings,
    devices: Sequence[str],
    data_dir: Path,
    results_dir: Path,
    overwrite: bool,
) -> None:
    """Score tasks; several devices take turns by category, each in its own process."""
    where = data_dir, results_dir, overwrite
    if len(devices) == 1:
        score_and_save(tasks, replace(values, device=devices[0]), *where)
        return
    by_category: dict[str, list[ScoreTask]] = defaultdict(list)
    for task in tasks:
        by_category[loco.split_mvtype(task.mvtype)[0]].append(task)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ExitStack() as stack:
        workers = [
            (device, stack.enter_context(ProcessPoolExecutor(1, context, start_worker)))
            for device in devices
        ]
        runs = [
            process.submit(score_and_save, category_tasks, replace(values, device=device), *where)
            for category_tasks, (device, process) in zip(
                by_category.values(), cycle(workers), strict=False
            )
        ]
        finished, pending = wait(runs, return_when=FIRST_EXCEPTION)
        failed = [error for run in finished if (error := run.exception())]
        if failed and not all([run.cancel() for run in pending]):
            log.error(f"{failed[0]}; the categories that are being scored are completed first")
        for error in failed:
            raise error


def load_runs(
    args: argparse.Namespace, values: settings.Settings, mvtypes: Sequence[str]
) -> dict[str, list[score_files.SubsetScores]]:
    """Read the scores of every seed and ensemble them."""
    runs = {}
    n_reps = values.rep_num_224 if settings.PIXEL_LEVEL in values.pyramid_level else 0
    for seed in dict.fromkeys(args.seeds):
        version = version_of_seed(args.version_name, seed)
        folder = str(args.results_dir / f"{version}_pyramid_lvl_#")
        levels = settings.backbone_levels(values.pyramid_level)
        selection = score_files.Selection(folder, folder, levels, 0, n_reps)
        runs[f"seed {seed}"] = [
            score_files.load_subset(selection, mvtype, values) for mvtype in mvtypes
        ]
    return runs


def main(argv: list[str] | None = None) -> None:
    """Preprocess, score, ensemble, report."""
    args = parse_args(argv)
    if "#" in f"{args.results_dir}{args.version_name}":
        raise errors.UserError(
            f"results_dir and version_name must be without #, which stands for a level, got "
            f"{args.results_dir} and {args.version_name}; choose others"
        )
    values = cli.settings_of(args, device="auto")
    for device in args.device:
        devices.choose_device(device)
    options = report.report_options(args, args.out)
    levels = settings.backbone_levels(values.pyramid_level)
    if levels:  # errors now, before the long work
        weights = backbones.load_weights(values.net, values.weights)
        backbones.build_backbone(values.net, weights, levels)
    mvtypes = layouts.choose_subsets(args.dataset_dir, args.mvtype)
    data_dir = args.data_dir or args.dataset_dir / "data_matrices"
    tasks = paper_tasks(mvtypes, values, args.seeds, args.version_name)
    check_tasks(tasks, values)
    make_matrices(
        args.dataset_dir,
        data_dir,
        mvtypes,
        values.initial_res,
        values.n_workers,
        args.overwrite,
        args.valid_share,
    )
    score_on_devices(tasks, values, args.device, data_dir, args.results_dir, args.overwrite)
    print(report.write_report(load_runs(args, values, mvtypes), options))


if __name__ == "__main__":
    errors.run_script(main)
