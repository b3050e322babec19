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
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from backbones import PRECISIONS, Backbone, FeatureExtractor, Weights, load_weights
from command_line import (
    ScriptParser,
    UserError,
    flatten,
    integer_from,
    integer_ranges,
    number_between,
    run_script,
    say,
)
from crop_scores import ClassScorer, Descriptor, ScoreTask, Settings
from loco_datasets import (
    CROP_NUM_EDGE,
    DEFAULT_CROP_RATIO,
    DEFAULT_DATA_DIR,
    DEFAULT_RESULTS_DIR,
    DEFAULT_VERSION,
    IM_SIZE,
    LEVELS,
    PIXEL_LEVEL,
    RESNET_SETTINGS,
    crop_corners,
    expand_mvtypes,
    level_settings,
    scores_file_name,
    scores_folder,
    split_mvtype,
)
from matrix_files import MatrixSet, check_im_size, load_matrices
from result_files import LevelScores, Run, is_finished, save_scores, sweep
from sinbad_utils import choose_device

DEFAULT_NET = "wide_resnet50_2"


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its tasks; the names are those of the flags."""

    net: str
    weights: str
    initial_res: int
    crop_num_edge: int
    descriptors: dict[int, Descriptor]
    batch_size: int
    precision: str
    official: bool
    num_workers: int
    data_dir: Path
    results_dir: Path
    overwrite: bool

    def scorer_settings(self) -> Settings:
        """Return what `ClassScorer` needs of these."""
        return Settings(
            self.descriptors, self.crop_num_edge, self.official, self.batch_size, self.num_workers
        )


def output_path(options: RunOptions, version: str, task: ScoreTask) -> Path:
    """Return the file that a task writes."""
    folder = scores_folder(options.results_dir, version, task.level, task.rep, task.mvtype)
    name = scores_file_name(task.level, options.initial_res, task.ratio, options.crop_num_edge)
    return folder / name


def check_distinct_files(tasks: Iterable[ScoreTask], paths: Iterable[Path]) -> None:
    """Stop if two crop ratios would write the same file."""
    owners: dict[Path, ScoreTask] = {}
    for task, path in zip(tasks, paths, strict=True):
        other = owners.setdefault(path, task)
        if other != task:
            raise UserError(
                f"crop_size_ratio must give files of different names, got {other.ratio} and "
                f"{task.ratio}, which both write {path.name}; run them under two --version_name"
            )


def run_record(
    options: RunOptions, task: ScoreTask, data_set: MatrixSet, weights: Weights | None
) -> Run:
    """Return what determines a task's numbers, and (not compared later) what they were made on."""
    descriptor = options.descriptors[task.level]
    settings: dict[str, Any] = {
        "mvtype": task.mvtype,
        "pyramid_level": task.level,
        "crop_size_ratio": task.ratio,
        "crop_num_edge": options.crop_num_edge,
        "rep": task.rep,
        "seed": task.seed,
        "n_projections": descriptor.n_projections,
        "n_quantiles": descriptor.n_quantiles,
        "shrinkage_factor": descriptor.shrinkage,
        "official": options.official,
        "initial_res": options.initial_res,
        "matrices": data_set.settings,
        "n_images": {split: len(images) for split, images in data_set.images.items()},
    }
    if weights is not None:
        settings["net"] = options.net
        settings["weights_sha256"] = weights.sha256
        settings["precision"] = options.precision
    return {"settings": settings, "made_with": made_with(options.batch_size)}


@cache
def made_with(batch_size: int) -> dict[str, object]:
    """Return versions, threads and git commit: they may change last bits, or nothing."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "batch_size": batch_size,
        "commit": commit,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "machine": platform.machine(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def score_tasks(
    tasks: dict[ScoreTask, str], options: RunOptions, device: torch.device
) -> dict[ScoreTask, Path]:
    """Score every task that is not finished yet and save it as soon as it is complete.

    Parameters
    ----------
    tasks : task -> version name of its folder
    options, device

    Returns
    -------
    task -> its file of scores
    """
    paths = {task: output_path(options, version, task) for task, version in tasks.items()}
    check_distinct_files(paths, paths.values())
    data_sets = {}
    for mvtype in dict.fromkeys(task.mvtype for task in tasks):
        data_sets[mvtype] = load_matrices(options.data_dir, mvtype)
        check_im_size(data_sets[mvtype], options.initial_res)
    resnet = any(task.level != PIXEL_LEVEL for task in tasks)
    weights = load_weights(options.net, options.weights) if resnet else None
    runs = {
        task: run_record(
            options, task, data_sets[task.mvtype], None if task.level == PIXEL_LEVEL else weights
        )
        for task in tasks
    }
    sweep(options.results_dir)
    todo: dict[str, list[ScoreTask]] = defaultdict(list)
    for task, path in paths.items():
        if not options.overwrite and is_finished(path, runs[task]):
            say(f"finished already: {path}")
        else:
            todo[split_mvtype(task.mvtype)[0]].append(task)
    extractor = _make_extractor(todo, options, weights, device)
    for wanted in todo.values():
        own = {task.mvtype: data_sets[task.mvtype] for task in wanted}
        scorer = ClassScorer(own, extractor, options.scorer_settings(), device)
        for task, test, valid in scorer.score(wanted):
            data_set = own[task.mvtype]
            names = data_set.paths["test"] if data_set.settings else []
            scores = LevelScores(test, valid, data_set.labels, names, runs[task])
            save_scores(paths[task], scores, options.results_dir)
    return paths


def _make_extractor(
    todo: dict[str, list[ScoreTask]],
    options: RunOptions,
    weights: Weights | None,
    device: torch.device,
) -> FeatureExtractor | None:
    """Return the network down to the deepest level that is still to do, None if none is."""
    levels = {task.level for tasks in todo.values() for task in tasks} - {PIXEL_LEVEL}
    if not levels or weights is None:
        return None
    backbone = Backbone(options.net, weights, tuple(sorted(levels)))
    return FeatureExtractor(backbone, device, options.precision)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how scores are computed, not which."""
    parser.add_argument("--net", default=DEFAULT_NET, help="a ResNet or ResNeXt of torchvision")
    parser.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet (downloaded once), random, or a state_dict file",
    )
    parser.add_argument(
        "--batch_size", type=integer_from(1), default=32, help="crops of one forward pass"
    )
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="matrices")
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
        default="fp32",
        help="of the network alone; tf32 acts on CUDA only",
    )
    parser.add_argument(
        "--num_workers",
        type=integer_from(1),
        default=min(4, os.cpu_count() or 1),
        help="threads that read pixels",
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
    parser.add_argument("--pyramid_level", type=int, nargs="+", choices=LEVELS, default=[7])
    parser.add_argument(
        "--crop_size_ratio",
        type=number_between(0, 1, low_open=True, high_open=True),
        nargs="+",
        default=[DEFAULT_CROP_RATIO],
        help="side of a crop as a share of the image's, above 0 and below 1",
    )
    parser.add_argument(
        "--crop_num_edge", type=integer_from(1), default=CROP_NUM_EDGE, help="stride = side / this"
    )
    parser.add_argument(
        "--n_projections", type=integer_from(1), help="directions; default 1000, level 224: 10"
    )
    parser.add_argument("--n_quantiles", type=integer_from(1), default=RESNET_SETTINGS.n_quantiles)
    parser.add_argument(
        "--shrinkage_factor",
        type=number_between(0, 1, low_open=True),
        help="of the covariance, above 0 to 1; default .1, level 224: 1",
    )
    parser.add_argument("--rep", type=integer_ranges, nargs="+", default=[[0]], help="3 or 0-99")
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of the random directions")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    add_run_flags(parser)
    return parser.parse_args(argv)


def run_options(args: argparse.Namespace, descriptors: dict[int, Descriptor]) -> RunOptions:
    """Collect the flags of `add_run_flags` and the descriptors of the levels."""
    names = set(RunOptions.__dataclass_fields__) - {"descriptors", "crop_num_edge"}
    flags = {name: getattr(args, name) for name in names}
    crop_num_edge = getattr(args, "crop_num_edge", CROP_NUM_EDGE)
    return RunOptions(**flags, descriptors=descriptors, crop_num_edge=crop_num_edge)


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
    tasks = {
        ScoreTask(mvtype, level, ratio, args.seed, rep): args.version_name
        for mvtype in expand_mvtypes(args.mvtype)
        for level in args.pyramid_level
        for ratio in args.crop_size_ratio
        for rep in flatten(args.rep)
    }
    for ratio in args.crop_size_ratio:
        crop_corners(args.initial_res, ratio, args.crop_num_edge)  # stops if there is no such grid
    device = choose_device(args.device)
    for path in score_tasks(tasks, run_options(args, descriptors), device).values():
        print(path)


if __name__ == "__main__":
    run_script(main)
