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
import logging
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from sinbad import backbones, cli, errors, loco, matrices, score_files, score_plans, scoring

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    groups = cli.network_flags(), cli.scoring_flags(), cli.results_flags(), cli.device_flags()
    parser = cli.ScriptParser(__doc__, groups)
    add = parser.add_argument
    add("--mvtype", nargs="+", required=True, help="data sets, classes, loco, struct or all")
    cli.add_level_flag(parser, default=[7])
    add(
        "--crop_size_ratio",
        type=cli.ratio_type,
        nargs="+",
        default=[loco.DEFAULT_CROP_RATIO],
        help="side of a crop as a share of the image's, above 0 and below 1",
    )
    add(
        "--rep",
        type=cli.integer_ranges,
        nargs="+",
        default=[[0]],
        help="repetitions, as 3 or 0-99 (default: 0)",
    )
    add("--seed", type=cli.integer_from(0), default=0, help="of the random directions")
    add("--data_dir", type=Path, default=loco.DEFAULT_DATA_DIR, help="matrices")
    add("--overwrite", action="store_true", help="compute finished outputs again")
    return parser.parse_args(argv)


def plan_scores(args: argparse.Namespace) -> score_plans.ScorePlan:
    """Return the plan of what the flags ask for."""
    found = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    score_tasks = [
        score_plans.ScoreTask(mvtype, level, ratio, args.seed, rep, args.version_name)
        for mvtype in loco.choose_mvtypes(args.mvtype, found)
        for level in dict.fromkeys(args.pyramid_level)
        for ratio in dict.fromkeys(args.crop_size_ratio)
        for rep in cli.flatten(args.rep)
    ]
    return score_plans.ScorePlan.of(args, score_tasks, args.data_dir)


def load_data_sets(plan: score_plans.ScorePlan) -> dict[str, matrices.MatrixSet]:
    """Map the matrices of every data set of a plan."""
    data_sets = {}
    for mvtype in dict.fromkeys(task.mvtype for task in plan.tasks):
        own = data_sets[mvtype] = matrices.load_matrices(plan.data_dir, mvtype)
        if own.im_size != plan.initial_res:
            raise errors.UserError(
                f"initial_res must be the side of the matrices of {mvtype}, {own.im_size}, got "
                f"{plan.initial_res}; pass --initial_res {own.im_size}"
            )
        n_same = len(set(own.sha256("train")) & set(own.sha256("valid")))
        if n_same:
            log.warning(
                f"{n_same} validation images of {mvtype} are training images too: they "
                "score about 0, what is divided by their mean is too high"
            )
    return data_sets


def unfinished(
    plan: score_plans.ScorePlan, runs: dict[score_plans.ScoreTask, score_files.Run]
) -> dict[str, list[score_plans.ScoreTask]]:
    """Return class -> tasks that are not finished yet; say which are."""
    todo: dict[str, list[score_plans.ScoreTask]] = defaultdict(list)
    for task in plan.tasks:
        path = plan.output(task)
        if not plan.overwrite and score_files.is_finished(path, runs[task]):
            log.info(f"finished already: {path}")
        else:
            todo[loco.split_mvtype(task.mvtype)[0]].append(task)
    return todo


def score_and_save(plan: score_plans.ScorePlan, device: torch.device) -> list[Path]:
    """Score every task of a plan that is not finished yet; save each as soon as it is complete.

    Returns
    -------
    The file of every task
    """
    data_sets = load_data_sets(plan)
    needs_network = loco.network_levels(task.level for task in plan.tasks)
    weights = backbones.load_weights(plan.net, plan.weights) if needs_network else None
    runs = {
        t: score_plans.run_record(plan, t, data_sets[t.mvtype], weights, device) for t in plan.tasks
    }
    todo = unfinished(plan, runs)
    levels = loco.network_levels(sorted(task.level for tasks in todo.values() for task in tasks))
    extractor = None
    if weights is not None and levels:
        backbone = backbones.build_backbone(plan.net, weights, levels)
        extractor = backbones.FeatureExtractor(backbone, device, plan.precision, plan.compile)
    for class_tasks in todo.values():
        own = {task.mvtype: data_sets[task.mvtype] for task in class_tasks}
        with ThreadPoolExecutor(1) as writer:  # writing stays off the critical path
            writes: list[Future[None]] = []
            for task, test, valid in scoring.ClassScorer(plan, own, extractor, device).score(
                class_tasks
            ):
                of = own[task.mvtype]
                names = of.paths["test"] if of.settings else []
                scores = score_files.LevelScores(test, valid, of.labels, names, runs[task])
                writes.append(writer.submit(score_files.save_scores, plan.output(task), scores))
                for write in filter(Future.done, writes):
                    write.result()  # a full disk stops the run at once
            for write in writes:
                write.result()
    return [plan.output(task) for task in plan.tasks]


def main(argv: list[str] | None = None) -> None:
    """Score the data sets asked for and print the files written."""
    args = parse_args(argv)
    plan = plan_scores(args)
    for path in score_and_save(plan, backbones.choose_device(args.device)):
        print(path)


if __name__ == "__main__":
    errors.run_script(main)
