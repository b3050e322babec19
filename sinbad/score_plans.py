"""What a run of scoring computes and how, and the record of it that every file of scores holds."""

import argparse
import functools
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from sinbad import backbones, loco, matrices, score_files

# Crops of one forward pass; many small batches would keep a GPU waiting for the next one.
BATCH_SIZES = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class ScoreTask:
    """One file of scores: a data set, a level, a crop grid, a seed, a repetition, its version."""

    mvtype: str
    level: int
    ratio: float
    seed: int
    rep: int
    version: str


@dataclass(frozen=True)
class Descriptor:
    """How a level is described and scored."""

    n_projections: int
    n_quantiles: int
    shrinkage: float


@dataclass(frozen=True)
class ScorePlan:
    """What a run of scoring computes, and how; the names are those of the flags.

    `n_projections`, `shrinkage_factor`, `batch_size` None stand for the level's and the device's
    own.
    """

    tasks: tuple[ScoreTask, ...]
    data_dir: Path
    results_dir: Path
    net: str
    weights: str
    precision: str
    compile: bool
    batch_size: int | None
    n_projections: int | None
    n_quantiles: int
    shrinkage_factor: float | None
    crop_num_edge: int
    initial_res: int
    official: bool
    num_workers: int
    overwrite: bool

    @classmethod
    def of(
        cls, args: argparse.Namespace, tasks: Iterable[ScoreTask], data_dir: Path
    ) -> "ScorePlan":
        """Make the plan of parsed flags; stop if two tasks would write the same file."""
        own = {"tasks": tuple(tasks), "data_dir": data_dir}
        plan = cls(**{f.name: getattr(args, f.name, None) for f in fields(cls)} | own)
        for level in {task.level for task in plan.tasks}:
            ratios = [task.ratio for task in plan.tasks if task.level == level]
            loco.ratios_by_file(level, plan.initial_res, ratios, plan.crop_num_edge)
        return plan

    def descriptor(self, level: int) -> Descriptor:
        """Return how a level is described."""
        default = loco.level_settings(level)
        return Descriptor(
            self.n_projections or default.n_projections,
            self.n_quantiles,
            self.shrinkage_factor or default.shrinkage,
        )

    def output(self, task: ScoreTask) -> Path:
        """Return the file that a task writes."""
        name = loco.scores_file_name(task.level, self.initial_res, task.ratio, self.crop_num_edge)
        folder = loco.scores_folder(
            self.results_dir, task.version, task.level, task.rep, task.mvtype
        )
        return folder / name

    def batch_size_on(self, device: torch.device) -> int:
        """Return the crops of one forward pass."""
        return self.batch_size or BATCH_SIZES[device.type]


# ---------------------------------------------------------------- the record


def run_record(
    plan: ScorePlan,
    task: ScoreTask,
    data_set: matrices.MatrixSet,
    weights: backbones.Weights | None,
    device: torch.device,
) -> score_files.Run:
    """Return what determines a task's numbers, and (not compared later) what they were made on."""
    descriptor = plan.descriptor(task.level)
    settings: dict[str, Any] = {
        "mvtype": task.mvtype,
        "pyramid_level": task.level,
        "crop_size_ratio": task.ratio,
        "crop_num_edge": plan.crop_num_edge,
        "rep": task.rep,
        "seed": task.seed,
        "n_projections": descriptor.n_projections,
        "n_quantiles": descriptor.n_quantiles,
        "shrinkage_factor": descriptor.shrinkage,
        "official": plan.official,
        "initial_res": plan.initial_res,
        "matrices": data_set.settings,
        "images_sha256": data_set.digest(),
        "n_images": {split: len(images) for split, images in data_set.images.items()},
    }
    if weights is not None and task.level != loco.PIXEL_LEVEL:
        settings["net"] = plan.net
        settings["weights_sha256"] = weights.sha256
        settings["precision"] = plan.precision
        if plan.compile:  # files of earlier versions are without it
            settings["compile"] = True
    return {"settings": settings, "made_with": made_with(plan.batch_size_on(device), device)}


@functools.cache
def made_with(batch_size: int, device: torch.device) -> dict[str, object]:
    """Return versions, device, threads and git commit: they may change last bits, or nothing."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
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
