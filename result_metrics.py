"""Metrics of ensembled scores: AUROC, its interval, average precision, F1; classes and means."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from ensembles import DataSetScores
from loco_datasets import KINDS, PIXEL_LEVEL, split_mvtype
from sinbad_utils import Scores

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
CONFIDENCE = 95.0  # percent
RESNET = "ResNet levels"
ENSEMBLE = "ensemble"

Metrics = dict[str, Any]
Defects = dict[str, dict[str, list[int]]]  # data set -> defect -> test images that show it


def auroc(labels: Scores, scores: Scores) -> float | None:
    """Return the area under the ROC curve, a share; None where only one label is present."""
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) > 1 else None


def f1_max(labels: Scores, scores: Scores) -> float:
    """Return the best F1 over all thresholds, a share."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.max(2 * precision * recall / np.where(total > 0, total, 1.0)))


def bootstrap_interval(labels: Scores, scores: Scores) -> list[float]:
    """Return the 95 % interval of the AUROC over test images drawn with replacement.

    Good and anomalous images are drawn apart, so every sample has both.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    good, bad = scores[labels == 0], scores[labels == 1]
    sampled = [
        _auroc_of(rng.choice(good, len(good)), rng.choice(bad, len(bad)))
        for _ in range(BOOTSTRAP_SAMPLES)
    ]
    tail = (100.0 - CONFIDENCE) / 2.0
    return [float(value) for value in np.percentile(sampled, [tail, 100.0 - tail])]


def _auroc_of(good: Scores, bad: Scores) -> float:
    """Return the AUROC as the share of (good, bad) pairs in order, ties counted half."""
    ordered = np.sort(good)
    wins = np.searchsorted(ordered, bad, "left") + np.searchsorted(ordered, bad, "right")
    return float(wins.mean() / (2 * len(good)))


def columns_of(scores: DataSetScores) -> dict[str, Scores]:
    """Return what the table has a column for: name -> (n_test,) scores, single levels first."""
    columns = {f"level {level}": values for level, values in scores.levels.items()}
    if scores.resnet is not None and len(set(scores.levels) - {PIXEL_LEVEL}) > 1:
        columns[RESNET] = scores.resnet
    columns[ENSEMBLE] = scores.ensemble
    for name, values in scores.extra.items():
        columns[name] = values
        columns[f"{ENSEMBLE} + {name}"] = scores.final
    return columns


def data_set_metrics(scores: DataSetScores, defects: dict[str, list[int]]) -> Metrics:
    """Return every figure of one data set; shares in [0, 1]."""
    labels, final = scores.labels, scores.final
    has_both = len(set(labels.tolist())) == 2
    return {
        "auroc": {name: auroc(labels, values) for name, values in columns_of(scores).items()},
        "auroc_by_grid": {
            f"level {level}, {n_crops} crops": auroc(labels, grid.joined)
            for (level, n_crops), grid in scores.grids.items()
        },
        "auroc_by_defect": {
            name: {"auroc": auroc_of_defect(scores, images), "n_images": len(images)}
            for name, images in defects.items()
        },
        "average_precision": float(average_precision_score(labels, final)) if has_both else None,
        "f1_max": f1_max(labels, final) if has_both else None,
        "auroc_interval_95": bootstrap_interval(labels, final) if has_both else None,
        "n_good": int((labels == 0).sum()),
        "n_anomalous": int((labels == 1).sum()),
    }


def auroc_of_defect(scores: DataSetScores, images: list[int]) -> float | None:
    """Return the AUROC of the good images against some anomalous ones."""
    good = scores.final[scores.labels == 0]
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(images))])
    return auroc(labels, np.concatenate([good, scores.final[images]]))


def pooled_auroc(sets: Sequence[DataSetScores]) -> float | None:
    """Return a class' AUROC of good against both kinds of anomalies together, None without both.

    The good images are those of the first set.
    """
    if len(sets) < len(KINDS):
        return None
    first = sets[0]
    scores = [first.final[first.labels == 0], *(s.final[s.labels == 1] for s in sets)]
    labels = [np.zeros(len(scores[0])), *(np.ones(len(part)) for part in scores[1:])]
    return auroc(np.concatenate(labels), np.concatenate(scores))


def all_metrics(sets: Sequence[DataSetScores], defects: Defects) -> Metrics:
    """Return the figures of all data sets, their classes and the means over classes.

    The mean of a method is half the sum of logical and structural, means over classes first. Keys
    under `classification` are those of the official evaluation of MVTec LOCO AD.
    """
    data_sets = {s.mvtype: data_set_metrics(s, defects.get(s.mvtype, {})) for s in sets}
    final = list(columns_of(sets[0]))[-1]
    by_class: dict[str, list[DataSetScores]] = defaultdict(list)
    for scores in sets:
        by_class[split_mvtype(scores.mvtype)[0]].append(scores)
    classes = {}
    for class_name, own in by_class.items():
        by_kind = {split_mvtype(s.mvtype)[1]: data_sets[s.mvtype]["auroc"][final] for s in own}
        classes[class_name] = {
            "classification": {"auc_roc": _kinds_and_mean(by_kind)},
            "pooled_auroc": pooled_auroc(own),
        }
    means = {
        column: _kinds_and_mean(_kind_means(data_sets, column))
        for column in columns_of(sets[0])
        if all(column in entry["auroc"] for entry in data_sets.values())
    }
    return {
        "data_sets": data_sets,
        "classes": classes,
        "mean": {
            "classification": {"auc_roc": means[final]},
            "auc_roc_by_column": means,
            "pooled_auroc": _mean([entry["pooled_auroc"] for entry in classes.values()]),
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there, None if none is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _kind_means(data_sets: dict[str, Metrics], column: str) -> dict[str, float | None]:
    """Return the mean over classes of each kind: "loco", "struct"."""
    by_kind: dict[str, list[float | None]] = defaultdict(list)
    for mvtype, entry in data_sets.items():
        by_kind[split_mvtype(mvtype)[1]].append(entry["auroc"][column])
    return {kind: _mean(values) for kind, values in by_kind.items()}


def _kinds_and_mean(by_kind: dict[str, float | None]) -> dict[str, float | None]:
    """Name the kinds as the official evaluation does; the mean needs both kinds."""
    named: dict[str, float | None] = {KINDS[kind]: by_kind.get(kind) for kind in KINDS}
    complete = all(value is not None for value in named.values())
    return {**named, "mean": _mean(list(named.values())) if complete else None}
