"""How far scores on a device, and in a reduced precision, are from those of the CPU in fp32."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from score_runs import RunOptions, score_tasks

from sinbad.flags import PRECISIONS
from sinbad.results import read_scores
from sinbad.scoring import BATCH_SIZES, ScoreTask

Scores = dict[ScoreTask, NDArray[np.float64]]


def agreement(
    tasks: dict[ScoreTask, str], options: RunOptions, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the figures of every precision on the device, and of half the batch size.

    Parameters
    ----------
    tasks : task -> version name
    options : RunOptions
        Its precision is not used.
    device : torch.device
    """
    cpu = torch.device("cpu")
    options = replace(options, precision="fp32", batch_size=BATCH_SIZES[device.type])
    reference = _scores(tasks, options, cpu)
    half = replace(options, batch_size=BATCH_SIZES[device.type] // 2)
    runs = [("half the batch size", half)]
    runs += [(precision, replace(options, precision=precision)) for precision in PRECISIONS]
    for name, own in runs:
        if device == cpu and name == "tf32":
            continue  # the same as fp32 there
        yield {"run": name, **_differences(reference, _scores(tasks, own, device))}


def _scores(tasks: dict[ScoreTask, str], options: RunOptions, device: torch.device) -> Scores:
    """Return the scores (n_crops, n_test + n_valid) of every task."""
    paths = score_tasks(tasks, options, device)
    read = {task: read_scores(path) for task, path in paths.items()}
    return {task: np.concatenate([own.test, own.valid], axis=1) for task, own in read.items()}


def _differences(reference: Scores, found: Scores) -> dict[str, float]:
    """Return the largest relative difference, and the smallest rank correlation of a crop."""
    relative, correlations = [], []
    for task, expected in reference.items():
        for a, b in zip(expected, found[task], strict=True):
            if a.any():  # padding only scores 0
                relative.append(np.abs(b / a - 1).max())
                correlations.append(spearmanr(a, b).statistic)
    return {
        "largest_relative_difference": float(max(relative)),
        "smallest_rank_correlation": float(min(correlations)),
    }
