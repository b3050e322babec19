"""Files of scores with a record, of few images, for the tests of the ensemble and the reports."""

import csv
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

import calc_anom_ensm
from sinbad import errors, loco, score_files, score_tasks, settings

SIDE = 64  # pixels
RATIOS = (0.5, 0.99)  # 9 crops and 1
N_VALID, N_GOOD, N_BAD = 3, 4, 3
N_TEST = N_GOOD + N_BAD
VALUES = settings.Settings(initial_res=SIDE, net="resnet18", n_projections=10, shrinkage_factor=0.1)
MATRICES = {"im_size": SIDE, "width": SIDE, "height": 37, "pillow": "13.0.0"}
MADE_WITH = {"torch": "2.10.0", "device": "cpu"}


def refused(match: str) -> AbstractContextManager[pytest.ExceptionInfo[errors.UserError]]:
    """Expect an error of the user's input whose message matches."""
    return pytest.raises(errors.UserError, match=match)


def image_paths(mvtype: str) -> list[str]:
    """Return the test images of a toy test subset."""
    bad = loco.KINDS[loco.split_mvtype(mvtype)[1]]
    good = [f"test/good/{i:03d}.png" for i in range(N_GOOD)]
    return good + [f"test/{bad}/{i:03d}.png" for i in range(N_BAD)]


def make_file(
    root: Path,
    mvtype: str = "pushpins_loco",
    level: int = 14,
    ratio: float = RATIOS[0],
    rep: int = 0,
    **changes: object,
) -> score_files.ScoreFile:
    """Return a file of random scores; `changes` are of its record."""
    task = score_tasks.ScoreTask(mvtype, level, ratio, 0, rep, "ver1")
    recorded = VALUES.recorded(level) | {
        "mvtype": mvtype,
        "pyramid_level": level,
        "crop_size_ratio": ratio,
        "rep": rep,
        "images_sha256": f"images of {mvtype}",
        "n_images": {"train": 9, "valid": N_VALID, "test": N_TEST},
        "matrices": MATRICES,
    }
    if level != settings.PIXEL_LEVEL:
        recorded["weights_sha256"] = "abc"
    n_crops = len(VALUES.grid(ratio))
    rng = np.random.default_rng([level, n_crops, rep, len(mvtype)])
    paths = image_paths(mvtype)
    labels = np.array([float("good" not in path) for path in paths])
    test = rng.uniform(0.5, 1.5, (n_crops, N_TEST)) * (1.0 + 0.5 * labels)
    valid = rng.uniform(0.5, 1.5, (n_crops, N_VALID))
    record = {"settings": recorded | changes, "made_with": MADE_WITH}
    return score_files.ScoreFile(task.path(root, VALUES), level, test, valid, labels, paths, record)


def make_files(
    root: Path, mvtype: str = "pushpins_loco", rep: int = 0, **changes: object
) -> list[score_files.ScoreFile]:
    """Return the scores of levels 7, 14 and two repetitions of raw pixels."""
    parts = [(level, ratio, rep) for level in (7, 14) for ratio in RATIOS]
    parts += [(settings.PIXEL_LEVEL, 0.999, pixel_rep) for pixel_rep in (0, 1)]
    return [make_file(root, mvtype, *part, **changes) for part in parts]


def write_subset(
    root: Path, mvtype: str = "pushpins_loco", rep: int = 0, **changes: object
) -> None:
    """Write the files of `make_files`."""
    for file in make_files(root, mvtype, rep, **changes):
        score_files.write_scores(file)


def select(root: Path, **changes: object) -> score_files.Selection:
    """Return the selection of what `write_subset` writes."""
    version = str(root / "ver1_pyramid_lvl_#")
    fields = {"version": version, "version_224": version, "levels": (7, 14), "rep": 0}
    return score_files.Selection(**{**fields, "rep_num_224": 2, **changes})  # type: ignore[arg-type]


def load(
    root: Path,
    mvtype: str = "pushpins_loco",
    values: settings.Settings = VALUES,
    **selected: object,
) -> score_files.SubsetScores:
    """Read and ensemble what `write_subset` wrote."""
    return score_files.load_subset(select(root, **selected), mvtype, values)


def load_toy(
    root: Path, mvtype: str = "pushpins_loco", **selected: object
) -> score_files.SubsetScores:
    """Write a toy test subset and ensemble it."""
    write_subset(root, mvtype)
    return load(root, mvtype, **selected)  # type: ignore[arg-type]


def ensemble(version: str, out: Path, *flags: str) -> list[dict[str, str]]:
    """Run the script; return the rows of its (first) scores.csv."""
    paths = ["--version", version, "--version_224", version, "--out", str(out), "--no-figures"]
    calc_anom_ensm.main([*paths, *flags])
    with open(min(out.glob("scores*.csv")), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
