"""Metrics of ensembled scores: AUROC, its interval, average precision, F1; classes and means."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import sinbad_utils
from sinbad import ensembles, loco

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
INTERVAL = [2.5, 97.5]  # percentiles
NETWORK = "network levels"
ENSEMBLE = "ensemble"
NOTHING = "-"

Metrics = dict[str, Any]
Defects = dict[str, dict[str, list[int]]]  # data set -> defect -> test images that show it


def percent(values: Sequence[float | None]) -> str:
    """Return a share as percent with one decimal; of several runs mean and standard deviation."""
    numbers = [100 * value for value in values if value is not None]
    spread = f" +- {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.1f}{spread}" if numbers else NOTHING


def auroc(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> float | None:
    """Return the area under the ROC curve, a share; None where only one label is present."""
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) > 1 else None


def auroc_against(good: sinbad_utils.Scores, anomalous: sinbad_utils.Scores) -> float | None:
    """Return the AUROC of the scores of good images against those of anomalous ones."""
    labels = np.repeat([0.0, 1.0], [len(good), len(anomalous)])
    return auroc(labels, np.concatenate([good, anomalous]))


def f1_max(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> float:
    """Return the best F1 over all thresholds, a share."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.max(2 * precision * recall / np.where(total > 0, total, 1.0)))


def bootstrap_interval(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> list[float]:
    """Return the 95 % interval of the AUROC over test images drawn with replacement.

    Good and anomalous images are drawn apart, so every sample has both.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    good, bad = scores[labels == 0], scores[labels == 1]
    sampled = []
    for _ in range(BOOTSTRAP_SAMPLES):
        ordered, drawn = np.sort(rng.choice(good, len(good))), rng.choice(bad, len(bad))
        wins = np.searchsorted(ordered, drawn, "left") + np.searchsorted(ordered, drawn, "right")
        sampled.append(wins.mean() / (2 * len(good)))  # pairs in order; ties count half
    return np.percentile(sampled, INTERVAL).tolist()


def columns_of(scores: ensembles.DataSetScores) -> dict[str, sinbad_utils.Scores]:
    """Return what the table has a column for: name -> (n_test,) scores, single levels first."""
    columns = {f"level {level}": values for level, values in scores.levels.items()}
    if scores.network is not None and len(set(scores.levels) - {loco.PIXEL_LEVEL}) > 1:
        columns[NETWORK] = scores.network
    columns[ENSEMBLE] = scores.ensemble
    for name, values in scores.extra.items():
        columns[f"extra {name}"] = values
        columns[f"{ENSEMBLE} + {name}"] = scores.final
    return columns


def data_set_metrics(scores: ensembles.DataSetScores, defects: dict[str, list[int]]) -> Metrics:
    """Return every figure of one data set; shares in [0, 1]."""
    labels, final = scores.labels, scores.final
    good = final[labels == 0]
    has_both = len(set(labels.tolist())) > 1
    recorded = next((f.settings["n_images"] for f in scores.files if f.settings), {})
    return {
        "auroc": {name: auroc(labels, values) for name, values in columns_of(scores).items()},
        "auroc_by_grid": {
            f"level {level}, {n_crops} crops": auroc(labels, grid.test)
            for (level, n_crops), grid in scores.grids.items()
        },
        "auroc_by_defect": {
            name: {"auroc": auroc_against(good, final[images]), "n_images": len(images)}
            for name, images in defects.items()
        },
        "average_precision": float(average_precision_score(labels, final)) if has_both else None,
        "f1_max": f1_max(labels, final) if has_both else None,
        "auroc_interval_95": bootstrap_interval(labels, final) if has_both else None,
        "n_train": recorded.get("train"),
        "n_validation": recorded.get("valid"),
        "n_good": len(good),
        "n_anomalous": int((labels == 1).sum()),
    }


def pooled_auroc(sets: Iterable[ensembles.DataSetScores]) -> float | None:
    """Return a class' AUROC of good against logical and structural images together, or None.

    The good images are those of the first of the two sets.
    """
    pair = [scores for scores in sets if loco.split_mvtype(scores.mvtype)[1] in loco.KINDS]
    if len(pair) < len(loco.KINDS):
        return None
    bad = np.concatenate([scores.final[scores.labels == 1] for scores in pair])
    return auroc_against(pair[0].final[pair[0].labels == 0], bad)


def group_by_class(
    sets: Iterable[ensembles.DataSetScores],
) -> dict[str, list[ensembles.DataSetScores]]:
    """Return class -> its data sets."""
    classes: dict[str, list[ensembles.DataSetScores]] = defaultdict(list)
    for scores in sets:
        classes[loco.split_mvtype(scores.mvtype)[0]].append(scores)
    return classes


def all_metrics(sets: Sequence[ensembles.DataSetScores], defects: Defects) -> Metrics:
    """Return the figures of all data sets, their classes and the means over classes.

    The mean of a method is half the sum of logical and structural, means over classes first. Keys
    under `classification` are those of the official evaluation of MVTec LOCO AD.
    """
    data_sets = {s.mvtype: data_set_metrics(s, defects.get(s.mvtype, {})) for s in sets}
    columns = list(columns_of(sets[0]))
    classes = {
        class_name: {
            "classification": {"auc_roc": _kind_means(own, data_sets, columns[-1])},
            "pooled_auroc": pooled_auroc(own),
        }
        for class_name, own in group_by_class(sets).items()
    }
    means = {column: _kind_means(sets, data_sets, column) for column in columns}
    mean = {
        "classification": {"auc_roc": means[columns[-1]]},
        "auc_roc_by_column": means,
        "pooled_auroc": _mean([entry["pooled_auroc"] for entry in classes.values()]),
    }
    return {"data_sets": data_sets, "classes": classes, "mean": mean}


def _kind_means(
    sets: Iterable[ensembles.DataSetScores], data_sets: dict[str, Metrics], column: str
) -> dict[str, float | None]:
    """Return the mean AUROC of each kind of data set, and of LOCO's two if both are there."""
    by_kind: dict[str, list[float | None]] = defaultdict(list)
    for scores in sets:
        kind = loco.split_mvtype(scores.mvtype)[1]
        by_kind[kind].append(data_sets[scores.mvtype]["auroc"][column])
    is_loco = by_kind.keys() <= loco.KINDS.keys()
    kinds = loco.KINDS if is_loco else by_kind
    means = {loco.KINDS.get(kind, kind): _mean(by_kind[kind]) for kind in kinds}
    are_like = None not in means.values() and (is_loco or len(kinds) == 1)
    return {**means, "mean": _mean(means.values()) if are_like else None}


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, None if none is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
