"""Score the images of data sets at one or more pyramid levels.

Reads   DATA_DIR/<mvtype>/{train,valid,test}_data.npy   (from data_to_matrices.py)
Writes  RESULTS_DIR/<version>_pyramid_lvl_<level>/rep_num_<rep>/<mvtype>/

    python sinbad_single_layer.py --mvtype pushpins_loco --pyramid_level 7
    python sinbad_single_layer.py --mvtype all --pyramid_level 7 14 --crop_size_ratio .25 .5 .7 .99
    python sinbad_single_layer.py --mvtype all --pyramid_level 224 --rep 0-99

Levels 7, 14, 28, 56 are stages of the network, 224 the raw pixels. What shares a forward pass is
computed in one. Finished outputs are skipped; a run that was killed is started again with the same
command.
"""

import argparse
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from sinbad.backbones import FeatureExtractor, build_backbone, choose_device, load_weights
from sinbad.datasets import (
    DEFAULT_CROP_RATIO,
    DEFAULT_DATA_DIR,
    choose_mvtypes,
    network_levels,
    split_mvtype,
)
from sinbad.errors import UserError, run_script, say
from sinbad.files import folder_beside, remove_left_overs
from sinbad.flags import (
    ScriptParser,
    add_level_flag,
    device_flags,
    flatten,
    integer_from,
    integer_ranges,
    network_flags,
    ratio_type,
    results_flags,
    scoring_flags,
)
from sinbad.matrices import MatrixSet, load_matrices
from sinbad.plan import ScorePlan, ScoreTask, run_record
from sinbad.results import LevelScores, Run, is_finished, save_scores
from sinbad.scoring import ClassScorer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    groups = network_flags(), scoring_flags(), results_flags(), device_flags()
    parser = ScriptParser(__doc__, groups)
    add = parser.add_argument
    add("--mvtype", nargs="+", required=True, help="data sets, classes, loco, struct or all")
    add_level_flag(parser, default=[7])
    add("--crop_size_ratio", type=ratio_type, nargs="+", default=[DEFAULT_CROP_RATIO],
        help="side of a crop as a share of the image's, above 0 and below 1")  # fmt: skip
    add("--rep", type=integer_ranges, nargs="+", default=[[0]],
        help="repetitions, as 3 or 0-99 (default: 0)")  # fmt: skip
    add("--seed", type=integer_from(0), default=0, help="of the random directions")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="matrices")
    add("--overwrite", action="store_true", help="compute finished outputs again")
    return parser.parse_args(argv)


def plan_scores(args: argparse.Namespace) -> ScorePlan:
    """Return the plan of what the flags ask for."""
    found = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    tasks = [
        ScoreTask(mvtype, level, ratio, args.seed, rep, args.version_name)
        for mvtype in choose_mvtypes(args.mvtype, found)
        for level in dict.fromkeys(args.pyramid_level)
        for ratio in dict.fromkeys(args.crop_size_ratio)
        for rep in flatten(args.rep)
    ]
    return ScorePlan.of(args, tasks, args.data_dir)


def load_data_sets(plan: ScorePlan) -> dict[str, MatrixSet]:
    """Map the matrices of every data set of a plan."""
    data_sets = {}
    for mvtype in dict.fromkeys(task.mvtype for task in plan.tasks):
        own = data_sets[mvtype] = load_matrices(plan.data_dir, mvtype)
        if own.im_size != plan.initial_res:
            raise UserError(
                f"initial_res must be the side of the matrices of {mvtype}, {own.im_size}, got "
                f"{plan.initial_res}; pass --initial_res {own.im_size}"
            )
        n_same = len(set(own.sha256("train")) & set(own.sha256("valid")))
        if n_same:
            say(f"warning: {n_same} validation images of {mvtype} are training images too: they "
                "score about 0, what is divided by their mean is too high")  # fmt: skip
    return data_sets


def unfinished(plan: ScorePlan, runs: dict[ScoreTask, Run]) -> dict[str, list[ScoreTask]]:
    """Return class -> tasks that are not finished yet; say which are."""
    todo: dict[str, list[ScoreTask]] = defaultdict(list)
    for task in plan.tasks:
        path = plan.output(task)
        if path.parent.exists():
            remove_left_overs(folder_beside(path.parent))
        if not plan.overwrite and is_finished(path, runs[task]):
            say(f"finished already: {path}")
        else:
            todo[split_mvtype(task.mvtype)[0]].append(task)
    return todo


def score_and_save(plan: ScorePlan, device: torch.device) -> list[Path]:
    """Score every task of a plan that is not finished yet; save each as soon as it is complete.

    Returns
    -------
    The file of every task
    """
    data_sets = load_data_sets(plan)
    needs_network = network_levels(task.level for task in plan.tasks)
    weights = load_weights(plan.net, plan.weights) if needs_network else None
    runs = {t: run_record(plan, t, data_sets[t.mvtype], weights, device) for t in plan.tasks}
    todo = unfinished(plan, runs)
    levels = network_levels(sorted(task.level for tasks in todo.values() for task in tasks))
    extractor = None
    if weights is not None and levels:
        backbone = build_backbone(plan.net, weights, levels)
        extractor = FeatureExtractor(backbone, device, plan.precision, plan.compile)
    for tasks in todo.values():
        own = {task.mvtype: data_sets[task.mvtype] for task in tasks}
        with ThreadPoolExecutor(1) as writer:  # writing stays off the critical path
            writes: list[Future[None]] = []
            for task, test, valid in ClassScorer(plan, own, extractor, device).score(tasks):
                of = own[task.mvtype]
                names = of.paths["test"] if of.settings else []
                scores = LevelScores(test, valid, of.labels, names, runs[task])
                writes.append(writer.submit(save_scores, plan.output(task), scores))
                for write in filter(Future.done, writes):
                    write.result()  # a full disk stops the run at once
            for write in writes:
                write.result()
    return [plan.output(task) for task in plan.tasks]


def main(argv: list[str] | None = None) -> None:
    """Score the data sets asked for and print the files written."""
    args = parse_args(argv)
    plan = plan_scores(args)
    for path in score_and_save(plan, choose_device(args.device)):
        print(path)


if __name__ == "__main__":
    run_script(main)
