"""A run of scoring: which files of scores are still to be made, by what they are determined.

What `sinbad_single_layer.py` and `reproduce_paper.py` share above `crop_scores`.
"""

import platform
import subprocess
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from backbones import Backbone, FeatureExtractor, Weights, load_weights
from command_line import UserError, say
from crop_descriptors import Descriptor
from crop_scores import ClassScorer, ScoreTask, Settings
from loco_datasets import PIXEL_LEVEL, scores_file_name, scores_folder, split_mvtype
from matrix_files import MatrixSet, check_im_size, load_matrices
from result_files import LevelScores, Run, is_finished, save_scores, sweep

# Crops of one forward pass; many small batches would keep a GPU waiting for the next one.
BATCH_SIZES = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its tasks; the names are those of the flags.

    `batch_size` None stands for the device's own of BATCH_SIZES.
    """

    net: str
    weights: str
    initial_res: int
    crop_num_edge: int
    descriptors: dict[int, Descriptor]
    batch_size: int | None
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


def output_paths(options: RunOptions, tasks: dict[ScoreTask, str]) -> dict[ScoreTask, Path]:
    """Return the file of every task -> its version name; stop if two tasks have the same."""
    paths = {task: output_path(options, version, task) for task, version in tasks.items()}
    owners: dict[Path, ScoreTask] = {}
    for task, path in paths.items():
        other = owners.setdefault(path, task)
        if other != task:
            raise UserError(
                f"crop_size_ratio must give files of different names, got {other.ratio} and "
                f"{task.ratio}, which both write {path.name} at crop_num_edge "
                f"{options.crop_num_edge}; run them under two --version_name"
            )
    return paths


def run_record(
    options: RunOptions,
    task: ScoreTask,
    data_set: MatrixSet,
    weights: Weights | None,
    device: torch.device,
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
        "images_sha256": data_set.digest(),
        "n_images": {split: len(images) for split, images in data_set.images.items()},
    }
    if weights is not None and task.level != PIXEL_LEVEL:
        settings["net"] = options.net
        settings["weights_sha256"] = weights.sha256
        settings["precision"] = options.precision
    return {"settings": settings, "made_with": made_with(options.batch_size, device)}


@cache
def made_with(batch_size: int, device: torch.device) -> dict[str, object]:
    """Return versions, device, threads and git commit: they may change last bits, or nothing."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    on_gpu = device.type == "cuda"
    return {
        "batch_size": batch_size,
        "commit": commit,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
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
    options = replace(options, batch_size=options.batch_size or BATCH_SIZES[device.type])
    paths = output_paths(options, tasks)
    data_sets = {}
    for mvtype in dict.fromkeys(task.mvtype for task in tasks):
        data_sets[mvtype] = load_matrices(options.data_dir, mvtype)
        check_im_size(data_sets[mvtype], options.initial_res)
    resnet = any(task.level != PIXEL_LEVEL for task in tasks)
    weights = load_weights(options.net, options.weights) if resnet else None
    runs = {
        task: run_record(options, task, data_sets[task.mvtype], weights, device) for task in tasks
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
        with ThreadPoolExecutor(1) as writer:  # writing stays off the critical path
            writes: deque[Future[None]] = deque()
            for task, test, valid in scorer.score(wanted):
                data_set = own[task.mvtype]
                names = data_set.paths["test"] if data_set.settings else []
                scores = LevelScores(test, valid, data_set.labels, names, runs[task])
                writes.append(writer.submit(save_scores, paths[task], scores, options.results_dir))
                while writes and writes[0].done():
                    writes.popleft().result()  # a full disk stops the run at once
            for write in writes:
                write.result()
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
