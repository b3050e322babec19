"""Another method's scores, read from CSV and added to the ensemble."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import sinbad_utils
from sinbad import errors, settings
from sinbad_utils import Scores

IMAGE_COLUMN, SCORE_COLUMN = "image_path", "score"
VALIDATION_FOLDERS = ("validation", "valid", "val")


@dataclass(frozen=True)
class ExtraScores:
    """Another method's scores, how they are normalised and what they weigh.

    Attributes
    ----------
    path : of the CSV file
    by_image : every end of an image's path -> its lines in the file, and the scores there
    norm : "mean" (divided by the validation mean) or "std" (standardised by validation)
    """

    path: Path
    by_image: dict[str, list[tuple[int, float]]]
    weight: float
    norm: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def score_of(self, image: str) -> float:
        """Return the score of <category>/<path of the image>; UserError if it has several."""
        (line, score), *others = self.by_image[image]
        if others:
            raise repeated(self.path, image, line, others[0][0])
        return score


class ScoreRow(NamedTuple):
    """A line of a CSV file of scores.

    Attributes
    ----------
    line : its number, from 1
    ends : every end of the image's path with its category at least, the longest first
    data_set, label : "" where the file has no such column
    """

    line: int
    ends: list[str]
    score: float
    data_set: str
    label: str


def repeated(path: Path, image: str, line: int, other_line: int) -> errors.UserError:
    """Return the error of an image with two scores."""
    return errors.UserError(
        f"{path} must hold one score of {image}, got lines {line} and {other_line}"
    )


def read_extra_scores(path: Path, weight: float, norm: str) -> ExtraScores:
    """Read a CSV file of image paths and scores (see `read_score_rows`)."""
    by_image: dict[str, list[tuple[int, float]]] = {}
    for row in read_score_rows(path):
        for end in row.ends:
            by_image.setdefault(end, []).append((row.line, row.score))
    return ExtraScores(path, by_image, weight, norm)


def read_score_rows(path: Path) -> list[ScoreRow]:
    """Read the lines of a CSV file of image paths and scores (higher = more anomalous).

    Of a path its end counts: <category>/<path of the image in it>. With a header line its columns
    `image_path` and `score` are taken, so our own scores.csv is read too; without one the file has
    these two columns. Numbers are plain decimals.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise errors.UserError(
            f"{path} must be CSV in UTF-8, got {error}; save it again"
        ) from error
    columns = [IMAGE_COLUMN, SCORE_COLUMN]
    if rows and set(columns) <= set(rows[0][1]):
        columns = rows.pop(0)[1]
    image, value = columns.index(IMAGE_COLUMN), columns.index(SCORE_COLUMN)
    score_rows = []
    for number, row in rows:
        is_whole = len(row) == len(columns) and re.fullmatch(settings.DECIMAL, row[value].strip())
        parts = Path(row[image]).parts if is_whole else ()
        if len(parts) < 2 or not math.isfinite(float(row[value])):
            raise errors.UserError(
                f"{path} line {number} must be <category>/<path of an image>,<plain decimal "
                f"number>, got {','.join(row)}; the first line may be {IMAGE_COLUMN},{SCORE_COLUMN}"
            )
        ends = ["/".join(parts[i:]) for i in range(len(parts) - 1)]
        others = dict(zip(columns, row, strict=True))
        data_set, label = (others.get(name, "") for name in ("data_set", "label"))
        score_rows.append(ScoreRow(number, ends, float(row[value]), data_set, label))
    if not score_rows:
        raise errors.UserError(f"{path} must hold lines <image path>,<score>, got none")
    return score_rows


def normalise(extra: ExtraScores, category: str, image_paths: list[str]) -> Scores:
    """Return another method's scores of test images, normalised by validation; ranks stay.

    UserError if the file lacks a test image, or all validation images of the category (no file can
    have those of a layout without such a folder), or cannot be normalised so.
    """
    images = [f"{category}/{path}" for path in image_paths]
    missing = [image for image in images if image not in extra.by_image]
    if missing:
        raise errors.UserError(
            f"extra_scores must hold every test image of {category}, got no {missing[0]} "
            f"({len(missing)} of {len(images)} are missing)"
        )
    prefixes = tuple(f"{category}/{folder}/" for folder in VALIDATION_FOLDERS)
    valid = np.array([extra.score_of(i) for i in extra.by_image if i.startswith(prefixes)])
    if not len(valid):
        raise errors.UserError(
            f"extra_scores must hold the validation images, got none of {prefixes[0]}; scores are "
            "normalised by theirs, so a category without that folder takes none"
        )
    test = np.array([extra.score_of(image) for image in images])
    lowest, mean, spread = min(test.min(), valid.min()), valid.mean(), valid.std()
    if extra.norm == "mean":
        if lowest < 0 or mean <= 0:
            raise errors.UserError(
                "extra_scores that are divided by their validation mean must not be negative, nor "
                f"that mean 0, got a lowest of {lowest:g} and a mean of {mean:g}; pass "
                "--extra_norm std"
            )
        return sinbad_utils.normalise_scores(test, valid)
    if not spread > 0:
        raise errors.UserError(
            "extra_scores must vary over the validation images for --extra_norm std, got "
            f"{len(valid)} equal ones; pass --extra_norm mean"
        )
    return (test - mean) / spread
