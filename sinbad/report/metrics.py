"""Metrics of ensembled scores: image-level AUROC, its interval, average precision, F1, means."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import sinbad_utils
from sinbad import loco, score_files, settings

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
INTERVAL = [2.5, 97.5]  # percentiles
NETWORK = "network levels"
ENSEMBLE = "ensemble"
NOTHING = "-"

Metrics = dict[str, Any]
Defects = dict[str, dict[str, list[int]]]  # data set -> defect -> indices of its test images


def percent(values: Sequence[float | None]) -> str:
    """Format a fraction as percent, several (one of each run) as mean and standard deviation."""
    numbers = [100 * value for value in values if value is not None]
    deviation = f" +- {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.1f}{deviation}" if numbers else NOTHING


def auroc(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> float | None:
    """Return the area under the ROC curve, in [0, 1]; None if all labels are equal."""
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) > 1 else None


def auroc_against(normal: sinbad_utils.Scores, anomalous: sinbad_utils.Scores) -> float | None:
    """Return the AUROC of the scores of normal images against those of anomalous ones."""
    labels = np.repeat([0.0, 1.0], [len(normal), len(anomalous)])
    return auroc(labels, np.concatenate([normal, anomalous]))


def f1_max(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> float:
    """Return the best F1 over all thresholds, in [0, 1]."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.max(2 * precision * recall / np.where(total > 0, total, 1.0)))


def bootstrap_interval(labels: sinbad_utils.Scores, scores: sinbad_utils.Scores) -> list[float]:
    """Return the 95 % interval of the AUROC over test images sampled with replacement.

    Normal and anomalous images are sampled separately, so every sample has both.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    aurocs = []
    for _ in range(BOOTSTRAP_SAMPLES):
        sample, anomalous_sample = (rng.choice(x, len(x)) for x in (normal, anomalous))
        sample.sort()
        wins = sum(np.searchsorted(sample, anomalous_sample, side) for side in ("left", "right"))
        aurocs.append(wins.mean() / (2 * len(normal)))  # ordered pairs; ties count half
    return np.percentile(aurocs, INTERVAL).tolist()


def score_columns(scores: score_files.SubsetScores) -> dict[str, sinbad_utils.Scores]:
    """Return the columns of the score table: name -> (n_test,) scores, single levels first."""
    columns = {f"level {level}": values for level, values in scores.ensemble.levels.items()}
    network_levels = scores.ensemble.levels.keys() - {settings.PIXEL_LEVEL}
    if scores.ensemble.network is not None and len(network_levels) > 1:
        columns[NETWORK] = scores.ensemble.network
    columns[ENSEMBLE] = scores.ensemble.final
    for name, values in scores.extra.items():
        columns |= {f"extra {name}": values, f"{ENSEMBLE} + {name}": scores.final}
    return columns


def data_set_metrics(scores: score_files.SubsetScores, defects: dict[str, list[int]]) -> Metrics:
    """Return all metrics of one data set, in [0, 1]; None where one is not defined."""
    labels, final = scores.labels, scores.final
    normal = final[labels == 0]
    has_both = len(set(labels.tolist())) > 1
    n_images = next((f.recorded["n_images"] for f in scores.files if f.recorded), {})
    return {
        "auroc": {name: auroc(labels, values) for name, values in score_columns(scores).items()},
        "auroc_by_grid": {
            f"level {level}, {n_crops} crops": auroc(labels, grid.test)
            for (level, n_crops), grid in scores.ensemble.grids.items()
        },
        "auroc_by_defect": {
            name: {"auroc": auroc_against(normal, final[images]), "n_images": len(images)}
            for name, images in defects.items()
        },
        "average_precision": float(average_precision_score(labels, final)) if has_both else None,
        "f1_max": f1_max(labels, final) if has_both else None,
        "auroc_interval_95": bootstrap_interval(labels, final) if has_both else None,
        "n_train": n_images.get("train"),
        "n_validation": n_images.get("valid"),
        "n_good": len(normal),
        "n_anomalous": int((labels == 1).sum()),
    }


def pooled_auroc(sets: Iterable[score_files.SubsetScores]) -> float | None:
    """Return a category's AUROC of normal against logical and structural images together.

    None unless both data sets are given; the normal images are those of the first.
    """
    pair = [scores for scores in sets if loco.split_mvtype(scores.mvtype)[1] in loco.KINDS]
    if len(pair) < len(loco.KINDS):
        return None
    anomalous = np.concatenate([scores.final[scores.labels == 1] for scores in pair])
    return auroc_against(pair[0].final[pair[0].labels == 0], anomalous)


def group_by_category(
    sets: Iterable[score_files.SubsetScores],
) -> dict[str, list[score_files.SubsetScores]]:
    """Return category -> its data sets."""
    categories: dict[str, list[score_files.SubsetScores]] = defaultdict(list)
    for scores in sets:
        categories[loco.split_mvtype(scores.mvtype)[0]].append(scores)
    return categories


def all_metrics(sets: Sequence[score_files.SubsetScores], defects: Defects) -> Metrics:
    """Return the metrics of all data sets, their categories and the means over categories.

    The mean of a method is half the sum of logical and structural, means over categories first.
    Keys under `classification` are those of the official evaluation of MVTec LOCO AD.
    """
    data_sets = {s.mvtype: data_set_metrics(s, defects.get(s.mvtype, {})) for s in sets}
    columns = list(score_columns(sets[0]))
    categories = {
        name: {
            "classification": {"auc_roc": _means_by_type(members, data_sets, columns[-1])},
            "pooled_auroc": pooled_auroc(members),
        }
        for name, members in group_by_category(sets).items()
    }
    means = {column: _means_by_type(sets, data_sets, column) for column in columns}
    mean = {
        "classification": {"auc_roc": means[columns[-1]]},
        "auc_roc_by_column": means,
        "pooled_auroc": _mean([entry["pooled_auroc"] for entry in categories.values()]),
    }
    return {"data_sets": data_sets, "classes": categories, "mean": mean}


def _means_by_type(
    sets: Iterable[score_files.SubsetScores], data_sets: dict[str, Metrics], column: str
) -> dict[str, float | None]:
    """Return the mean AUROC of each anomaly type, and their mean where both of LOCO's are given."""
    by_type: dict[str, list[float | None]] = defaultdict(list)
    for scores in sets:
        kind = loco.split_mvtype(scores.mvtype)[1]
        by_type[kind].append(data_sets[scores.mvtype]["auroc"][column])
    is_loco = by_type.keys() <= loco.KINDS.keys()
    kinds = loco.KINDS if is_loco else by_type
    means = {loco.KINDS.get(kind, kind): _mean(by_type[kind]) for kind in kinds}
    is_comparable = None not in means.values() and (is_loco or len(kinds) == 1)
    return {**means, "mean": _mean(means.values()) if is_comparable else None}


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
