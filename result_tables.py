"""Metrics of ensembled scores, and the tables made of them: text, Markdown, CSV, JSON."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from ensembles import DataSetScores
from loco_datasets import (
    KIND_NAMES,
    KINDS,
    LOCO_CLASSES,
    PUBLISHED_ENSEMBLE_MEAN,
    PUBLISHED_LOCO,
    split_mvtype,
)
from result_files import to_json, write_atomic
from sinbad_utils import Scores

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
CONFIDENCE = 95.0  # percent
FINAL = "ensemble"
RESNET = "ResNet levels"

Metrics = dict[str, Any]
Row = list[str]


def auroc(labels: Scores, scores: Scores) -> float:
    """Return the area under the ROC curve, a share; NaN where only one label is present."""
    if len(set(labels.tolist())) < 2:
        return float("nan")
    return float(roc_auc_score(labels, scores))


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
    if scores.resnet is not None and len(scores.levels) > 1:
        columns[RESNET] = scores.resnet
    columns[FINAL] = scores.final
    return columns


def data_set_metrics(scores: DataSetScores) -> Metrics:
    """Return every figure of one data set; shares in [0, 1]."""
    labels, final = scores.labels, scores.final
    has_both = len(set(labels.tolist())) == 2
    return {
        "auroc": {name: auroc(labels, values) for name, values in columns_of(scores).items()},
        "auroc_by_grid": {
            f"level {level}, {n_crops} crops": auroc(labels, grid.joined)
            for (level, n_crops), grid in scores.grids.items()
        },
        "average_precision": float(average_precision_score(labels, final)) if has_both else None,
        "f1_max": f1_max(labels, final) if has_both else None,
        "auroc_interval_95": bootstrap_interval(labels, final) if has_both else None,
        "n_good": int((labels == 0).sum()),
        "n_anomalous": int((labels == 1).sum()),
    }


def pooled_auroc(sets: Sequence[DataSetScores]) -> float:
    """Return a class' AUROC of good against both kinds of anomalies together.

    The good images are those of the first set.
    """
    first = sets[0]
    scores = [first.final[first.labels == 0], *(s.final[s.labels == 1] for s in sets)]
    labels = [np.zeros(len(scores[0])), *(np.ones(len(part)) for part in scores[1:])]
    return auroc(np.concatenate(labels), np.concatenate(scores))


def all_metrics(
    sets: Sequence[DataSetScores],
    defects: Callable[[DataSetScores], dict[str, list[int]]] | None = None,
) -> Metrics:
    """Return the figures of all data sets, their classes and the means over classes.

    The mean of a method is half the sum of logical and structural, means over classes first. Keys
    under `classification` are those of the official evaluation of MVTec LOCO AD.

    Parameters
    ----------
    sets : data sets, of any classes and kinds
    defects : data set -> {defect: test images that show it}, if there are ground truth masks
    """
    by_class: dict[str, list[DataSetScores]] = defaultdict(list)
    for scores in sets:
        by_class[split_mvtype(scores.mvtype)[0]].append(scores)
    data_sets = {scores.mvtype: data_set_metrics(scores) for scores in sets}
    classes = {}
    for class_name, own in by_class.items():
        by_kind = {s.mvtype.rpartition("_")[2]: data_sets[s.mvtype]["auroc"][FINAL] for s in own}
        classes[class_name] = {
            "classification": {"auc_roc": _kinds_and_mean(by_kind)},
            "pooled_auroc": pooled_auroc(own),
        }
        if defects is not None:
            classes[class_name]["auroc_by_defect"] = {
                name: auroc_of_defect(s, images) for s in own for name, images in defects(s).items()
            }
    means = {
        column: _kinds_and_mean(_kind_means(data_sets, column))
        for column in _shared_columns(data_sets)
    }
    pooled = [entry["pooled_auroc"] for entry in classes.values()]
    return {
        "data_sets": data_sets,
        "classes": classes,
        "mean": {
            "classification": {"auc_roc": means[FINAL]},
            "auc_roc_by_column": means,
            "pooled_auroc": float(np.mean(pooled)),
        },
    }


def auroc_of_defect(scores: DataSetScores, images: list[int]) -> float:
    """Return the AUROC of the good images against some anomalous ones."""
    good = scores.final[scores.labels == 0]
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(images))])
    return auroc(labels, np.concatenate([good, scores.final[images]]))


def _shared_columns(data_sets: dict[str, Metrics]) -> list[str]:
    """Return the columns that every data set has, in the first one's order."""
    entries = list(data_sets.values())
    return [name for name in entries[0]["auroc"] if all(name in e["auroc"] for e in entries)]


def _kind_means(data_sets: dict[str, Metrics], column: str) -> dict[str, float]:
    """Return the mean over classes of each kind: "loco", "struct"."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for mvtype, entry in data_sets.items():
        by_kind[split_mvtype(mvtype)[1]].append(entry["auroc"][column])
    return {kind: float(np.mean(values)) for kind, values in by_kind.items()}


def _kinds_and_mean(by_kind: dict[str, float]) -> dict[str, float | None]:
    """Name the kinds as the official evaluation does; the mean needs both kinds."""
    named: dict[str, float | None] = {KINDS[kind]: by_kind.get(kind) for kind in KINDS}
    both = [value for value in named.values() if value is not None]
    named["mean"] = float(np.mean(both)) if len(both) == len(KINDS) else None
    return named


# ---------------------------------------------------------------- tables


def published(mvtype: str) -> float | None:
    """Return the paper's AUROC of a LOCO data set (SINBAD, arXiv 2302.12245), percent."""
    class_name, kind = split_mvtype(mvtype)
    return PUBLISHED_LOCO[kind].get(class_name)


def percent(values: Sequence[float | None]) -> str:
    """Return a share as percent with one decimal; of several runs mean and standard deviation."""
    numbers = [value for value in values if value is not None and not np.isnan(value)]
    if not numbers:
        return "-"
    text = f"{100 * float(np.mean(numbers)):.1f}"
    return f"{text} +- {100 * float(np.std(numbers, ddof=1)):.1f}" if len(numbers) > 1 else text


def table_rows(runs: Sequence[Metrics]) -> list[Row]:
    """Return the paper's table: header, a row a data set, the means; percent.

    Parameters
    ----------
    runs : `all_metrics` of each seed or repetition, of the same data sets
    """
    columns = list(runs[0]["mean"]["auc_roc_by_column"])
    rows = [["data set", *columns, "95 % interval", "published", "difference"]]
    for mvtype in runs[0]["data_sets"]:
        entries = [run["data_sets"][mvtype] for run in runs]
        interval = entries[0]["auroc_interval_95"]
        cells = [percent([entry["auroc"][column] for entry in entries]) for column in columns]
        between = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "-"
        rows.append([mvtype, *cells, between, *_against(cells[-1], published(mvtype))])
    by_column = [run["mean"]["auc_roc_by_column"] for run in runs]
    whole = {mvtype for mvtype in runs[0]["data_sets"] if split_mvtype(mvtype)[0] in LOCO_CLASSES}
    for key, name in [
        *((KINDS[kind], f"mean {KIND_NAMES[kind]}") for kind in KINDS),
        ("mean", "mean"),
    ]:
        cells = [percent([means[column][key] for means in by_column]) for column in columns]
        kinds = [kind for kind in KINDS if KINDS[kind] == key] or list(KINDS)
        complete = whole >= {f"{c}_{kind}" for c in LOCO_CLASSES for kind in kinds}
        value = PUBLISHED_ENSEMBLE_MEAN if key == "mean" else PUBLISHED_LOCO[kinds[0]]["mean"]
        rows.append([name, *cells, "-", *_against(cells[-1], value if complete else None)])
    pooled = percent([run["mean"]["pooled_auroc"] for run in runs])
    rows.append(
        ["mean pooled (good against both)", *["-"] * (len(columns) - 1), pooled, *["-"] * 3]
    )
    return rows


def _against(ours: str, value: float | None) -> list[str]:
    """Return the published figure and the difference to ours."""
    if value is None:
        return ["-", "-"]
    return [f"{value:.1f}", "-" if ours == "-" else f"{float(ours.split()[0]) - value:+.1f}"]


def markdown(rows: list[Row]) -> str:
    """Return rows as an aligned Markdown table; the first row is its header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    ruler = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(ruler), *(line(row) for row in rows[1:])])


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def image_rows(sets: Sequence[DataSetScores]) -> list[list[object]]:
    """Return per-image scores: data set, image, label, final score, each level's normalised."""
    levels = list(dict.fromkeys(level for scores in sets for level in scores.levels))
    rows: list[list[object]] = [
        ["data_set", "image_path", "label", "score", *(f"level_{level}" for level in levels)]
    ]
    for scores in sets:
        class_name = split_mvtype(scores.mvtype)[0]
        for i, path in enumerate(scores.image_paths):
            values = [scores.levels[level][i] if level in scores.levels else "" for level in levels]
            rows.append(
                [
                    scores.mvtype,
                    f"{class_name}/{path}",
                    int(scores.labels[i]),
                    scores.final[i],
                    *values,
                ]
            )
    return rows


def write_results(
    out: Path, sets_of_runs: dict[str, list[DataSetScores]], metrics: dict[str, Metrics]
) -> list[Row]:
    """Write table.md, table.csv, metrics.json and scores.csv; return the table's rows.

    Parameters
    ----------
    out : folder, made if missing
    sets_of_runs : name of a run (such as "rep 0") -> its data sets
    metrics : name of a run -> its `all_metrics`
    """
    rows = table_rows(list(metrics.values()))
    single = len(metrics) == 1
    figures = next(iter(metrics.values())) if single else {"runs": metrics}
    write_atomic(out / "table.md", (markdown(rows) + "\n").encode())
    write_atomic(out / "table.csv", csv_text(rows).encode())
    write_atomic(out / "metrics.json", (to_json(figures) + "\n").encode())
    for name, sets in sets_of_runs.items():
        file_name = "scores.csv" if single else f"scores_{name.replace(' ', '_')}.csv"
        write_atomic(out / file_name, csv_text(image_rows(sets)).encode())
    return rows
