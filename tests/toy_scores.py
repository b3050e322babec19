"""Files of scores with a record, of few images, for the tests of the ensemble and the reports."""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import calc_anom_ensm
from sinbad import ensembles, loco, score_files

SIDE = 64  # pixels
RATIOS = (0.5, 0.99)  # 9 crops and 1
N_VALID, N_GOOD, N_BAD = 3, 4, 3
MADE_WITH = {"torch": "2.10.0", "device": "cpu"}

Edit = Callable[[dict[str, Any]], object]


def image_paths(mvtype: str) -> list[str]:
    """Return the test images of a toy data set."""
    bad = loco.KINDS[loco.split_mvtype(mvtype)[1]]
    return [f"test/good/{i:03d}.png" for i in range(N_GOOD)] + [
        f"test/{bad}/{i:03d}.png" for i in range(N_BAD)
    ]


def settings_of(mvtype: str, level: int, ratio: float, rep: int) -> dict[str, Any]:
    """Return what a file of scores of toy images records."""
    settings: dict[str, Any] = {
        "mvtype": mvtype,
        "pyramid_level": level,
        "crop_size_ratio": ratio,
        "crop_num_edge": 4,
        "rep": rep,
        "seed": 0,
        "n_projections": 10,
        "n_quantiles": 5,
        "shrinkage_factor": 0.1,
        "official": False,
        "initial_res": SIDE,
        "images_sha256": f"images of {mvtype}",
        "n_images": {"train": 9, "valid": N_VALID, "test": N_GOOD + N_BAD},
        "matrices": {"im_size": SIDE, "width": SIDE, "height": 37, "pillow": "13.0.0"},
    }
    if level != loco.PIXEL_LEVEL:
        settings |= {"net": "resnet18", "weights_sha256": "abc", "precision": "fp32"}
    return settings


def write_file(
    root: Path, mvtype: str, level: int, ratio: float, rep: int = 0, edit: Edit | None = None
) -> Path:
    """Write one file of scores; `edit` changes its record."""
    settings = copy.deepcopy(settings_of(mvtype, level, ratio, rep))
    if edit is not None:
        edit(settings)
    name = loco.scores_file_name(level, SIDE, ratio, 4)
    n_crops = 1 if level == loco.PIXEL_LEVEL else int(name.split("_")[0])
    rng = np.random.default_rng([level, n_crops, rep, len(mvtype)])
    paths = image_paths(mvtype)
    labels = np.array([float("good" not in path) for path in paths])
    test = rng.uniform(0.5, 1.5, (n_crops, len(paths))) * (1.0 + 0.5 * labels)
    valid = rng.uniform(0.5, 1.5, (n_crops, N_VALID))
    path = loco.scores_folder(root, "ver1", level, rep, mvtype) / name
    run = {"settings": settings, "made_with": MADE_WITH}
    score_files.save_scores(path, score_files.LevelScores(test, valid, labels, paths, run))
    return path


def write_data_set(root: Path, mvtype: str, rep: int = 0, edit: Edit | None = None) -> None:
    """Write the scores of levels 7, 14 and two repetitions of raw pixels."""
    for level in (7, 14):
        for ratio in RATIOS:
            write_file(root, mvtype, level, ratio, rep, edit)
    for pixel_rep in (0, 1):
        write_file(root, mvtype, loco.PIXEL_LEVEL, 0.999, pixel_rep, edit)


def options_of(root: Path, **changes: object) -> ensembles.EnsembleOptions:
    """Return how `write_data_set` is ensembled."""
    version = str(root / "ver1_pyramid_lvl_#")
    wanted = {
        "version": version,
        "version_224": version,
        "levels": (7, 14),
        "rep": 0,
        "rep_num_224": 2,
        "lambda_factor": 0.1,
        **changes,
    }
    return ensembles.EnsembleOptions(**wanted)  # type: ignore[arg-type]


def load_toy(root: Path, mvtype: str, **changes: object) -> ensembles.DataSetScores:
    """Write a toy data set and ensemble it."""
    write_data_set(root, mvtype)
    return ensembles.load_data_set(options_of(root, **changes), mvtype)


def ensemble(version: str, out: Path, *flags: str) -> list[dict[str, str]]:
    """Run the script on all that is there; return the rows of its scores.csv."""
    where = ["--version", version, "--version_224", version, "--out", str(out), "--no-figures"]
    calc_anom_ensm.main([*where, *flags])
    path = next(iter(sorted(out.glob("scores*.csv"))))
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
