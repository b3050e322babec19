"""The paper's tables as text, Markdown and CSV, and the files of a report."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
from result_metrics import ENSEMBLE, Metrics
from sinbad_utils import Scores

NOTHING = "-"
DETAIL_KEYS = ("average_precision", "f1_max")

Row = list[str]


def percent(values: Sequence[float | None]) -> str:
    """Return a share as percent with one decimal; of several runs mean and standard deviation."""
    numbers = [100 * value for value in values if value is not None]
    if not numbers:
        return NOTHING
    text = f"{np.mean(numbers):.1f}"
    return f"{text} +- {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else text


def is_whole(mvtype: str, entry: Metrics) -> bool:
    """Tell whether a data set has as many test images as LOCO's of that name."""
    class_name, kind = split_mvtype(mvtype)
    facts = LOCO_CLASSES.get(class_name)
    if facts is None:
        return False
    n_anomalous = facts.logical if kind == "loco" else facts.structural
    return (entry["n_good"], entry["n_anomalous"]) == (facts.good, n_anomalous)


def score_table(runs: Sequence[Metrics]) -> list[Row]:
    """Return the paper's table: header, a row a data set, the means; AUROC in percent.

    Parameters
    ----------
    runs : `all_metrics` of each seed or repetition, of the same data sets
        The interval is of the first run. Published figures (of SINBAD's ensemble) stand beside
        whole data sets only.
    """
    columns = list(runs[0]["mean"]["auc_roc_by_column"])
    rows = [["data set", *columns, "95 % interval", "published", "difference"]]
    whole = set()
    for mvtype, first in runs[0]["data_sets"].items():
        entries = [run["data_sets"][mvtype]["auroc"] for run in runs]
        class_name, kind = split_mvtype(mvtype)
        interval = first["auroc_interval_95"]
        between = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else NOTHING
        if is_whole(mvtype, first):
            whole.add(mvtype)
        published = PUBLISHED_LOCO[kind][class_name] if mvtype in whole else None
        rows.append(_score_row(mvtype, entries, columns, between, published))
    for key, name in [*((KINDS[k], f"mean {KIND_NAMES[k]}") for k in KINDS), ("mean", "mean")]:
        entries = [
            {column: kinds[key] for column, kinds in run["mean"]["auc_roc_by_column"].items()}
            for run in runs
        ]
        kinds = [kind for kind in KINDS if KINDS[kind] == key] or list(KINDS)
        complete = whole >= {f"{c}_{kind}" for c in LOCO_CLASSES for kind in kinds}
        known = PUBLISHED_ENSEMBLE_MEAN if key == "mean" else PUBLISHED_LOCO[kinds[0]]["mean"]
        if any(value is not None for entry in entries for value in entry.values()):
            rows.append(_score_row(name, entries, columns, NOTHING, known if complete else None))
    return rows


def _score_row(
    name: str,
    entries: Sequence[dict[str, float | None]],
    columns: list[str],
    between: str,
    published: float | None,
) -> Row:
    """Return one row of the score table; `entries` is column -> AUROC of each run."""
    cells = [percent([entry[column] for entry in entries]) for column in columns]
    ours = [entry[ENSEMBLE] for entry in entries]
    against = [NOTHING, NOTHING]
    if published is not None:
        there = [100 * value for value in ours if value is not None]
        against = [f"{published:.1f}", f"{np.mean(there) - published:+.1f}" if there else NOTHING]
    return [name, *cells, between, *against]


def detail_table(runs: Sequence[Metrics]) -> list[Row]:
    """Return the other figures of the final scores; percent.

    Pooled AUROC is of the good images against both kinds of anomalies of the class at once, as some
    publications report it; it is not the mean of the two.
    """
    rows = [["data set", "images good", "anomalous", "average precision", "F1-max"]]
    for mvtype, first in runs[0]["data_sets"].items():
        entries = [run["data_sets"][mvtype] for run in runs]
        figures = [percent([entry[key] for entry in entries]) for key in DETAIL_KEYS]
        rows.append([mvtype, str(first["n_good"]), str(first["n_anomalous"]), *figures])
    return rows


def class_table(runs: Sequence[Metrics]) -> list[Row]:
    """Return AUROC per class as the official evaluation does, and pooled; percent."""
    rows = [["class", "logical", "structural", "mean", "pooled"]]
    entries = {name: [run["classes"][name] for run in runs] for name in runs[0]["classes"]}
    for name, own in [*entries.items(), ("mean", [run["mean"] for run in runs])]:
        by_kind = [entry["classification"]["auc_roc"] for entry in own]
        figures = [percent([k[key] for k in by_kind]) for key in (*KINDS.values(), "mean")]
        rows.append([name, *figures, percent([entry["pooled_auroc"] for entry in own])])
    return rows


def defect_table(runs: Sequence[Metrics]) -> list[Row]:
    """Return AUROC per kind of defect; percent. Only the header where no masks are known."""
    rows = [["data set", "defect", "images", "AUROC"]]
    for mvtype, first in runs[0]["data_sets"].items():
        for name, entry in first["auroc_by_defect"].items():
            values = [run["data_sets"][mvtype]["auroc_by_defect"][name]["auroc"] for run in runs]
            rows.append([mvtype, name, str(entry["n_images"]), percent(values)])
    return rows


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
    extra = list(dict.fromkeys(name for scores in sets for name in scores.extra))
    names = [*(f"level_{level}" for level in levels), *extra]
    rows: list[list[object]] = [["data_set", "image_path", "label", "score", *names]]
    for scores in sets:
        class_name = split_mvtype(scores.mvtype)[0]
        columns: list[Scores | None] = [scores.levels.get(level) for level in levels]
        columns += [scores.extra.get(name) for name in extra]
        for i, path in enumerate(scores.image_paths):
            single = ["" if values is None else values[i] for values in columns]
            label = int(scores.labels[i])
            rows.append([scores.mvtype, f"{class_name}/{path}", label, scores.final[i], *single])
    return rows


def write_tables(
    out: Path, sets_of_runs: dict[str, list[DataSetScores]], metrics: dict[str, Metrics]
) -> list[Row]:
    """Write tables (table.md, *.csv), metrics.json and scores.csv; return the score table.

    Parameters
    ----------
    out : folder, made if missing
    sets_of_runs : name of a run (such as "rep 0") -> its data sets
    metrics : name of a run -> its `all_metrics`
    """
    runs = list(metrics.values())
    tables = {
        "table": score_table(runs),
        "classes": class_table(runs),
        "details": detail_table(runs),
        "defects": defect_table(runs),
    }
    tables = {name: rows for name, rows in tables.items() if len(rows) > 1}
    for name, rows in tables.items():
        write_atomic(out / f"{name}.csv", csv_text(rows).encode())
    text = "\n\n".join(markdown(rows) for rows in tables.values())
    write_atomic(out / "table.md", (text + "\n").encode())
    single = len(metrics) == 1
    write_atomic(
        out / "metrics.json", (to_json(runs[0] if single else {"runs": metrics}) + "\n").encode()
    )
    for name, sets in sets_of_runs.items():
        file_name = "scores.csv" if single else f"scores_{name.replace(' ', '_')}.csv"
        write_atomic(out / file_name, csv_text(image_rows(sets)).encode())
    return tables["table"]
