"""Runs of sinbad_single_layer.py on the synthetic data set."""

from pathlib import Path

from conftest import IM_SIZE

import sinbad_single_layer
from sinbad import score_files

N_PROJECTIONS = 8
FLAGS = [
    *("--net", "resnet18", "--weights", "random", "--device", "cpu"),
    *("--initial_res", str(IM_SIZE), "--n_projections", str(N_PROJECTIONS), "--batch_size", "5"),
]


def score(data_dir: Path, results: Path, *flags: str) -> None:
    """Run the script."""
    paths = ["--data_dir", str(data_dir), "--results_dir", str(results)]
    sinbad_single_layer.main([*paths, *FLAGS, *flags])


def read(path: Path) -> score_files.ScoreFile:
    """Read a file of scores of the level in its folder's name."""
    return score_files.read_scores(path, int(path.parents[2].name.rpartition("_")[2]))


def single(data_dir: Path, results: Path, *flags: str) -> score_files.ScoreFile:
    """Run the script for one file of scores and read it."""
    score(data_dir, results, *flags)
    (path,) = results.rglob("*.npz")
    return read(path)
