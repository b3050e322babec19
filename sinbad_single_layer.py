"""Score the images of test subsets at one or more pyramid levels.

Reads   DATA_DIR/<mvtype>/{train,valid,test}_data.npy   (from data_to_matrices.py)
Writes  RESULTS_DIR/<version>_pyramid_lvl_<level>/rep_num_<rep>/<mvtype>/

    python sinbad_single_layer.py --mvtype pushpins_loco --pyramid_level 7
    python sinbad_single_layer.py --mvtype all --pyramid_level 7 14 --crop_size_ratio .25 .5 .7 .99
    python sinbad_single_layer.py --mvtype all --pyramid_level 224 --rep 0-99

Levels 7, 14, 28, 56 are stages of the network, 224 the raw pixels. What shares a forward pass is
computed together. Finished outputs are skipped; after a crash, run the same command again.
"""

import argparse
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sinbad import (
    atomic,
    backbones,
    cli,
    devices,
    errors,
    image_pool,
    loco,
    matrices,
    score_files,
    scoring,
    settings,
)
from sinbad.score_tasks import ScoreTask, check_tasks

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    names = "mvtype", "data_dir", "results_dir", "version_name", "overwrite"
    cli.add_shared(parser, *names, mvtype={"required": True})
    levels = "pyramid_level", "crop_size_ratio"
    cli.add_settings(parser, levels, pyramid_level=(7,), crop_size_ratio=(0.999,))
    cli.add_shared(parser, "rep")
    cli.add_settings(parser, cli.TASK_FLAGS)
    return parser.parse_args(argv)


def requested_tasks(args: argparse.Namespace, values: settings.Settings) -> list[ScoreTask]:
    """Return the files of scores that the flags ask for."""
    present = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    return [
        ScoreTask(mvtype, level, ratio, values.seed, rep, args.version_name)
        for mvtype in loco.choose_mvtypes(args.mvtype, present)
        for level in values.pyramid_level
        for ratio in values.crop_size_ratio
        for rep in cli.sorted_unique(args.rep)
    ]


def load_subsets(
    tasks: Sequence[ScoreTask], data_dir: Path, values: settings.Settings
) -> dict[str, matrices.MatrixSet]:
    """Map the preprocessed images of every test subset of some tasks."""
    subsets = {}
    for mvtype in dict.fromkeys(task.mvtype for task in tasks):
        subset = subsets[mvtype] = matrices.load_matrices(data_dir, mvtype)
        if subset.im_size != values.initial_res:
            raise errors.UserError(
                f"initial_res must be the side of the matrices of {mvtype}, {subset.im_size}, got "
                f"{values.initial_res}; pass --initial_res {subset.im_size}"
            )
        train = set(subset.sha256("train"))
        n_repeated = len(subset.sha256("train")) - len(train)
        if len(train) < 2 and not values.official:
            raise errors.UserError(
                f"training images of {mvtype} must be at least 2 different ones, got "
                f"{len(train)}; add others"
            )
        if n_repeated:
            log.warning(f"{n_repeated} training images of {mvtype} are repeated")
        test = subset.sha256("test")
        good, bad = ({test[i] for i in (subset.labels == n).nonzero()[0]} for n in (0, 1))
        if good & bad:
            log.warning(f"{len(good & bad)} test images of {mvtype} are both good and anomalous")
        n_known = len(train & set(test))
        if n_known:
            log.warning(
                f"{n_known} test images of {mvtype} are training images too: they score near 0"
            )
        n_shared = len(train & set(subset.sha256("valid")))
        if n_shared:
            log.warning(
                f"{n_shared} validation images of {mvtype} are training images too: they score "
                "near 0, so scores normalised by the validation mean are inflated"
            )
    return subsets


def task_settings(
    task: ScoreTask,
    subsets: dict[str, matrices.MatrixSet],
    values: settings.Settings,
    weights: backbones.Weights | None,
) -> dict[str, Any]:
    """Return what determines a task's scores."""
    subset = subsets[task.mvtype]
    recorded = values.recorded(task.level) | {
        "mvtype": task.mvtype,
        "pyramid_level": task.level,
        "crop_size_ratio": task.ratio,
        "rep": task.rep,
        "seed": task.seed,
        "matrices": subset.settings,
        "images_sha256": subset.digest,
        "n_images": {split: len(array) for split, array in subset.images.items()},
    }
    if task.level != settings.PIXEL_LEVEL:
        recorded["weights_sha256"] = weights.sha256
    return recorded


def score_and_save(
    tasks: Sequence[ScoreTask],
    values: settings.Settings,
    data_dir: Path,
    results_dir: Path,
    overwrite: bool,
) -> list[Path]:
    """Score every task that is not finished yet; save each as soon as it is complete.

    Returns
    -------
    The file of every task
    """
    check_tasks(tasks, values)
    atomic.check_writable(results_dir / "scores")
    device = devices.choose_device(values.device)
    subsets = load_subsets(tasks, data_dir, values)
    needs_network = settings.backbone_levels(task.level for task in tasks)
    weights = backbones.load_weights(values.net, values.weights) if needs_network else None
    info = score_files.environment_info(scoring.batch_size_on(device, values), device)
    records: dict[ScoreTask, score_files.Record] = {}
    for task in tasks:
        path = task.path(results_dir, values)
        recorded = task_settings(task, subsets, values, weights)
        if not overwrite and score_files.is_finished(path, recorded):
            log.info(f"finished already: {path}")
        else:
            records[task] = {"settings": recorded, "made_with": info}
    files = score_subsets(records, subsets, values, weights, results_dir)
    with ThreadPoolExecutor(1) as writer:  # writing stays off the critical path
        writes: deque[Future[None]] = deque()
        for file in files:
            writes.append(writer.submit(score_files.write_scores, file))
            while writes and writes[0].done():
                writes.popleft().result()  # a full disk stops the run at once
        for write in writes:
            write.result()
    return [task.path(results_dir, values) for task in tasks]


def score_subsets(
    records: dict[ScoreTask, score_files.Record],
    subsets: dict[str, matrices.MatrixSet],
    values: settings.Settings,
    weights: backbones.Weights | None,
    results_dir: Path,
) -> Iterator[score_files.ScoreFile]:
    """Yield the scores of every task as soon as its last crop is scored, category by category."""
    device, extractor = devices.choose_device(values.device), None
    levels = settings.backbone_levels(sorted(task.level for task in records))
    if levels:
        backbone = backbones.build_backbone(values.net, weights, levels)
        extractor = backbones.FeatureExtractor(backbone, device, values.precision, values.compile)
    categories: dict[str, dict[ScoreTask, score_files.Record]] = defaultdict(dict)
    for task, task_record in records.items():
        categories[loco.split_mvtype(task.mvtype)[0]][task] = task_record

    def pool_images(category: str) -> tuple[image_pool.ImagePool, dict[tuple[str, str], list[int]]]:
        mvtypes = dict.fromkeys(task.mvtype for task in categories[category])
        return matrices.pool_subsets([subsets[m] for m in mvtypes], device, values.n_workers)

    # While one category is scored, the images of the next are copied to the GPU.
    for category, (pool, ids) in scoring.map_ahead(pool_images, categories, n_ahead=2, n_threads=1):
        scorer = scoring.CropScorer(pool, values, extractor, category)
        yield from score_category(categories[category], scorer, ids, subsets, results_dir)


def score_category(
    records: dict[ScoreTask, score_files.Record],
    scorer: scoring.CropScorer,
    ids: dict[tuple[str, str], list[int]],
    subsets: dict[str, matrices.MatrixSet],
    results_dir: Path,
) -> Iterator[score_files.ScoreFile]:
    """Yield the scores of one category's tasks; test subsets with equal training images at once.

    `ids` : (mvtype, split) -> numbers of the images that `scorer` scores
    """
    train_sets = {tuple(part): None for (_, split), part in ids.items() if split == "train"}
    for train_ids in train_sets:
        splits = {
            key: split_ids
            for key, split_ids in ids.items()
            if tuple(ids[key[0], "train"]) == train_ids and key[1] != "train"
        }
        files: dict[scoring.GridTask, list[ScoreTask]] = defaultdict(list)
        for task in records:
            if (task.mvtype, "test") in splits:
                repetition = scoring.Repetition(task.level, task.seed, task.rep)
                files[scoring.GridTask(task.ratio, repetition)].append(task)
        for grid_task, split_scores in scorer.score_grids(
            list(files), train_ids, list(splits.values())
        ):
            scores = dict(zip(splits, split_scores, strict=True))
            for task in files[grid_task]:
                subset = subsets[task.mvtype]
                yield score_files.ScoreFile(
                    task.path(results_dir, scorer.values),
                    task.level,
                    scores[task.mvtype, "test"],
                    scores[task.mvtype, "valid"],
                    subset.labels,
                    subset.paths["test"] if subset.settings else [],
                    records[task],
                )


def main(argv: list[str] | None = None) -> None:
    """Score the test subsets asked for and print the files written."""
    args = parse_args(argv)
    values = cli.settings_of(args)
    tasks = requested_tasks(args, values)
    for path in score_and_save(tasks, values, args.data_dir, args.results_dir, args.overwrite):
        print(path)


if __name__ == "__main__":
    errors.run_script(main)
