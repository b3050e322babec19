"""Two runs on the same images: the difference of their AUROC and its paired bootstrap interval."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinbad import errors, extra_scores, loco, score_files
from sinbad.report import metrics
from sinbad_utils import Scores

log = logging.getLogger(__name__)

CURE = "compare runs on the same images"
SAMPLES = 10_000  # ends of the interval then vary by about 0.1 points with the seed, of 67 images


@dataclass(frozen=True)
class OtherRun:
    """Another run's scores, or another method's (see `extra_scores.read_score_rows`)."""

    path: Path
    rows: list[extra_scores.ScoreRow]


def compare_runs(sets: Sequence[score_files.SubsetScores], other: OtherRun) -> metrics.Metrics:
    """Compare the final scores of data sets with another run's of the same images.

    Data sets that only the other run has are left out, and so are those without normal or without
    anomalous images.

    Returns
    -------
    `data_sets` and `mean` (None for no data set): AUROC of both runs, the difference, this run
    minus the other, and its 95 % interval, all in [0, 1]

    Raises
    ------
    UserError
        If the images of a data set or their labels are not the same in both runs.
    """
    names = {scores.mvtype for scores in sets}
    left_out = dict.fromkeys(row.data_set for row in other.rows if row.data_set not in {*names, ""})
    if left_out:
        log.info(f"note: not compared, this run lacks them: {', '.join(left_out)}")
    entries, differences = {}, []
    for scores in sets:
        other_scores = match_scores(scores, other)
        aurocs = [metrics.auroc(scores.labels, values) for values in (scores.final, other_scores)]
        if None not in aurocs:
            differences.append(sample_differences(scores, other_scores))
            entries[scores.mvtype] = _entry(*aurocs, differences[-1])
    mean = None
    if entries:
        columns = ([entry[key] for entry in entries.values()] for key in ("auroc", "auroc_other"))
        mean = _entry(*(float(np.mean(c)) for c in columns), np.mean(differences, axis=0))
    return {"other": str(other.path), "n_samples": SAMPLES, "data_sets": entries, "mean": mean}


def _entry(auroc: float, auroc_other: float, sampled: NDArray[np.float64]) -> metrics.Metrics:
    return {
        "auroc": auroc,
        "auroc_other": auroc_other,
        "difference": auroc - auroc_other,
        "difference_interval_95": np.percentile(sampled, metrics.INTERVAL).tolist(),
    }


def sample_differences(
    scores: score_files.SubsetScores, other_scores: Scores
) -> NDArray[np.float64]:
    """Return the difference of AUROC over samples of the test images, (SAMPLES,).

    Images are sampled with replacement, normal and anomalous ones separately, and the same for both
    runs. The normal images that the data sets of a category share are sampled once, so that samples
    of several data sets can be averaged.
    """
    normal, anomalous = scores.labels == 0, scores.labels == 1
    wins = [  # (n_normal, n_anomalous), of each pair of images; the AUROC is the mean
        (values[normal, None] < values[anomalous]) + (values[normal, None] == values[anomalous]) / 2
        for values in (scores.final, other_scores)
    ]
    category = loco.split_mvtype(scores.mvtype)[0]
    normal_counts = _sample_counts(category, int(normal.sum()))
    anomalous_counts = _sample_counts(scores.mvtype, int(anomalous.sum()))
    sums = (normal_counts @ (wins[0] - wins[1]) * anomalous_counts).sum(1)
    return sums / wins[0].size


def _sample_counts(name: str, n: int) -> NDArray[np.float64]:
    """Return how often each of `n` images is in a sample, (SAMPLES, n); the name is the seed."""
    rng = np.random.default_rng([metrics.BOOTSTRAP_SEED, *name.encode(errors="backslashreplace")])
    return rng.multinomial(n, np.full(n, 1 / n), SAMPLES).astype(np.float64)


def match_scores(scores: score_files.SubsetScores, other: OtherRun) -> Scores:
    """Return another run's scores of a data set's test images, in their order.

    Images are matched by <category>/<path>, and by the data set where the file names it. Where it
    does not, images of other folders than this run's (validation, other categories) are skipped.

    Raises
    ------
    UserError
        If an image is missing, twice, not this run's, or has another label.
    """
    rows = _rows_of_images(scores, other)
    missing = [image for image, row in rows.items() if row is None]
    if missing:
        raise errors.UserError(
            f"{other.path} must hold every test image of this run's {scores.mvtype}, got no "
            f"{missing[0]} ({len(missing)} of {len(rows)} are missing); {CURE}, or choose data "
            "sets by --mvtype"
        )
    for (image, row), label in zip(rows.items(), scores.labels.astype(int), strict=True):
        if row.label not in ("", str(label)):
            raise errors.UserError(
                f"{other.path} line {row.line} must have the label {label} of this run for {image}"
                f", got {row.label}; {CURE}"
            )
    return np.array([row.score for row in rows.values()])


def _rows_of_images(
    scores: score_files.SubsetScores, other: OtherRun
) -> dict[str, extra_scores.ScoreRow | None]:
    """Return image -> its row in the other run's file, None where it is missing."""
    category = loco.split_mvtype(scores.mvtype)[0]
    names = (f"{category}/{path}" for path in scores.image_paths)
    rows: dict[str, extra_scores.ScoreRow | None]
    rows = {name.encode(errors="backslashreplace").decode(): None for name in names}  # as in a CSV
    folders = {image.rpartition("/")[0] for image in rows}
    for row in other.rows:
        if row.data_set not in ("", scores.mvtype):
            continue
        image = next((end for end in row.ends if end in rows), None)
        if image is None:
            if row.data_set or any(end.rpartition("/")[0] in folders for end in row.ends):
                raise errors.UserError(
                    f"{other.path} line {row.line} must be of a test image of this run's "
                    f"{scores.mvtype}, got {row.ends[0]}; {CURE}"
                )
        elif rows[image] is not None:
            raise extra_scores.repeated(other.path, image, rows[image].line, row.line)
        else:
            rows[image] = row
    return rows
