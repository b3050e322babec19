"""Scores of another method, added to the ensemble: how SINBAD + EfficientAD was published."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from command_line import UserError
from ensembles import DataSetScores
from loco_datasets import split_mvtype
from result_metrics import columns_of
from sinbad_utils import normalise_scores

IMAGE_COLUMN, SCORE_COLUMN = "image_path", "score"
N_PARTS = 4  # class / split / good or kind of anomaly / image


@dataclass(frozen=True)
class ExtraScores:
    """Another method's scores: name of the method, image -> score, weight in the ensemble."""

    name: str
    by_image: dict[str, float]
    weight: float


def read_extra_scores(path: Path, weight: float) -> ExtraScores:
    """Read a CSV file of image paths and scores (higher = more anomalous).

    Of a path the last four parts count: <class>/<split>/<kind>/<image>. With a header line its
    columns `image_path` and `score` are taken, so our own scores.csv is read too; without one the
    first two columns.

    Raises
    ------
    UserError
        If a line has no path of four parts or no finite number; names file and line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} must be CSV in UTF-8, got {error}; save it so") from error
    columns = (0, 1)
    start = 0
    if rows and {IMAGE_COLUMN, SCORE_COLUMN} <= set(rows[0]):
        columns = (rows[0].index(IMAGE_COLUMN), rows[0].index(SCORE_COLUMN))
        start = 1
    by_image = {}
    for number, row in enumerate(rows[start:], start=start + 1):
        if not row:
            continue
        try:
            parts, score = Path(row[columns[0]]).parts[-N_PARTS:], float(row[columns[1]])
        except (IndexError, ValueError):
            parts, score = (), float("nan")
        if len(parts) < N_PARTS or not np.isfinite(score):
            raise UserError(
                f"{path} line {number} must be <class>/<split>/<kind>/<image>,<number>, got "
                f"{','.join(row)}; the first line may be {IMAGE_COLUMN},{SCORE_COLUMN}"
            )
        by_image["/".join(parts)] = score
    if not by_image:
        raise UserError(f"{path} must hold lines <image path>,<score>, got none")
    return ExtraScores(path.stem, by_image, weight)


def add_extra_scores(scores: DataSetScores, extra: ExtraScores) -> DataSetScores:
    """Add weight * another method's scores, normalised by its validation mean as ours are.

    Raises
    ------
    UserError
        If the file lacks a test image of the data set, or all validation images of its class.
    """
    class_name = split_mvtype(scores.mvtype)[0]
    images = [f"{class_name}/{path}" for path in scores.image_paths]
    missing = [image for image in images if image not in extra.by_image]
    if missing:
        raise UserError(
            f"extra_scores must hold every test image of {scores.mvtype}, got no {missing[0]} "
            f"({len(missing)} of {len(images)} are missing)"
        )
    before = f"{class_name}/validation/"
    valid = [score for image, score in extra.by_image.items() if image.startswith(before)]
    if not valid:
        raise UserError(
            f"extra_scores must hold the validation images, got none of {before}; their mean is "
            "what scores are divided by"
        )
    test = np.array([extra.by_image[image] for image in images])
    if extra.name in columns_of(scores):
        raise UserError(
            f"extra_scores must not be named as a column of the table, got {extra.name}; rename "
            "the file"
        )
    normalised = normalise_scores(test, np.array(valid))
    return replace(
        scores,
        extra={extra.name: normalised},
        final=scores.ensemble + extra.weight * normalised,
    )
