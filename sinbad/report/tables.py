"""The paper's tables as text, Markdown and CSV, per-image scores, and a report's provenance."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sinbad import layouts, loco, score_files
from sinbad.report import metrics

ENSEMBLE_SETTINGS = ("lambda_factor", "crop_norm", "crop_pool")
IMAGE_SETTINGS = ("n_images", "images_sha256", "matrices")
FILE_SETTINGS = ("mvtype", "pyramid_level")
LOW_AUROC = 0.4  # below it a data set has a note: chance is 0.5
TYPE_NAMES = {loco.KINDS[kind]: name for kind, name in loco.KIND_NAMES.items()}
# Columns of published figures: of SINBAD, and the mean of its ensemble, which is computed here.
PUBLISHED = ("SINBAD (2302.12245)", "SINBAD Ens (2311.14773)")

Row = list[str]


def is_whole(mvtype: str, entry: metrics.Metrics) -> bool:
    """Tell whether the recorded sizes of all splits of a data set are LOCO's."""
    keys = ("n_train", "n_validation", "n_good", "n_anomalous")
    expected = [list(counts.values()) for counts in layouts.loco_counts(mvtype)]
    return [entry[key] for key in keys] in expected


def score_table(runs: Sequence[metrics.Metrics]) -> list[Row]:
    """Return the paper's table: header, one row per data set, the means; AUROC in percent.

    Published figures are shown beside complete LOCO data sets only, and in a column per paper:
    the figures of each data set are not those of the ensemble.

    Parameters
    ----------
    runs : `all_metrics` of each seed or repetition, of the same data sets; the interval is of the
        first
    """
    data_sets, columns = runs[0]["data_sets"], list(runs[0]["mean"]["auc_roc_by_column"])
    whole = {mvtype for mvtype, entry in data_sets.items() if is_whole(mvtype, entry)}
    rows = [["data set", *columns, "95 % interval", *PUBLISHED]]
    for mvtype, first in data_sets.items():
        category, kind = loco.split_mvtype(mvtype)
        low_high = first["auroc_interval_95"]
        interval = " to ".join(f"{100 * end:.1f}" for end in low_high or []) or metrics.NOTHING
        published = loco.PUBLISHED_LOCO[kind][category] if mvtype in whole else metrics.NOTHING
        aurocs = [run["data_sets"][mvtype]["auroc"] for run in runs]
        values = [metrics.percent([auroc[column] for auroc in aurocs]) for column in columns]
        rows.append([mvtype, *values, interval, str(published), metrics.NOTHING])
    means = {loco.KINDS[kind]: figures["mean"] for kind, figures in loco.PUBLISHED_LOCO.items()}
    means["mean"] = round(sum(means.values()) / len(means), 1)
    for key in _shown_means(runs[0]["mean"]["auc_roc_by_column"][metrics.ENSEMBLE]):
        kinds = [kind for kind in loco.KINDS if key in (loco.KINDS[kind], "mean")]
        complete = whole >= {f"{name}_{kind}" for name in loco.LOCO_CLASSES for kind in kinds}
        by_column = [run["mean"]["auc_roc_by_column"] for run in runs]
        values = [metrics.percent([run[column][key] for run in by_column]) for column in columns]
        published = [metrics.NOTHING] * 2
        if complete and key in means:
            published[0] = str(means[key])
            published[1] = str(loco.PUBLISHED_ENSEMBLE_MEAN) if key == "mean" else metrics.NOTHING
        if set(values) != {metrics.NOTHING}:
            name = f"mean {TYPE_NAMES[key]}" if key in TYPE_NAMES else key
            rows.append([name, *values, metrics.NOTHING, *published])
    return rows


def other_tables(runs: Sequence[metrics.Metrics]) -> dict[str, list[Row]]:
    """Return the tables of categories, other metrics and defects, each with its header; percent.

    The pooled AUROC is of the normal images against both anomaly types of the category together,
    as some publications report it; it is not the mean of the two.
    """
    kinds = _shown_means(k for c in runs[0]["classes"].values() for k in _by_type(c))
    classes = [["class", *(TYPE_NAMES.get(kind, kind) for kind in kinds), "pooled"]]
    details = [["data set", "images good", "anomalous", "average precision", "F1-max"]]
    defects = [["data set", "defect", "images", "AUROC"]]
    groups = {name: [run["classes"][name] for run in runs] for name in runs[0]["classes"]}
    for name, entries in {**groups, "mean": [run["mean"] for run in runs]}.items():
        columns = [[_by_type(entry).get(kind) for entry in entries] for kind in kinds]
        columns.append([entry["pooled_auroc"] for entry in entries])
        classes.append([name, *map(metrics.percent, columns)])
    for mvtype, first in runs[0]["data_sets"].items():
        entries = [run["data_sets"][mvtype] for run in runs]
        columns = [[entry[key] for entry in entries] for key in ("average_precision", "f1_max")]
        counts = str(first["n_good"]), str(first["n_anomalous"])
        details.append([mvtype, *counts, *map(metrics.percent, columns)])
        for name, defect in first["auroc_by_defect"].items():
            values = [entry["auroc_by_defect"][name]["auroc"] for entry in entries]
            defects.append([mvtype, name, str(defect["n_images"]), metrics.percent(values)])
    return {"classes": classes, "details": details, "defects": defects}


def comparison_table(comparison: metrics.Metrics) -> list[Row]:
    """Return the table of `comparison.compare_runs`: one row per data set, the mean; percent."""
    rows = [["data set", "this run", "other run", "difference", "95 % interval"]]
    entries = comparison["data_sets"]
    for name, entry in {**entries, **({"mean": comparison["mean"]} if entries else {})}.items():
        aurocs = [metrics.percent([entry[key]]) for key in ("auroc", "auroc_other")]
        interval = [f"{100 * end:+.1f}" for end in entry["difference_interval_95"]]
        rows.append([name, *aurocs, f"{100 * entry['difference']:+.1f}", " to ".join(interval)])
    return rows


def low_auroc_notes(runs: Sequence[metrics.Metrics]) -> list[str]:
    """Return one line for each data set with a column of `score_table` below LOW_AUROC.

    Far below chance, what tells the images apart is not the anomalies.
    """
    notes = []
    for mvtype, first in runs[0]["data_sets"].items():
        values = {
            column: [run["data_sets"][mvtype]["auroc"][column] for run in runs]
            for column in first["auroc"]
        }
        low = [column for column, a in values.items() if None not in a and np.mean(a) < LOW_AUROC]
        if not low:
            continue
        shown = ", ".join(f"{column} ({metrics.percent(values[column])})" for column in low)
        levels = [column for column in values if column.startswith("level ")]
        low_levels = [column.removeprefix("level ") for column in levels if column in low]
        note = (
            f"{mvtype}: AUROC below {100 * LOW_AUROC:.0f} of {shown}: the good test images are "
            "further from the training images than the anomalous ones are (other light, other "
            "camera, swapped labels?)."
        )
        if low_levels and len(low_levels) < len(levels):
            note += f" To leave out: --pyramid_level without {' and '.join(low_levels)}"
            note += " (calc_anom_ensm.py: --rep_num_224 0 for 224)" * ("224" in low_levels) + "."
        notes.append(legible(note))
    return notes


def _shown_means(kinds: Iterable[str]) -> list[str]:
    """Return each anomaly type once, "mean" last; not `all` where it is the only one."""
    names = [name for name in dict.fromkeys(kinds) if name != "mean"]
    return [*(names if names != [loco.ALL] else []), "mean"]


def _by_type(entry: metrics.Metrics) -> dict[str, float | None]:
    """Return anomaly type -> AUROC, of a category or of the mean over categories."""
    return entry["classification"]["auc_roc"]


def image_rows(sets: Sequence[score_files.SubsetScores]) -> list[list[object]]:
    """Return per-image scores: data set, image, label, final score, each level's normalised."""
    names = [f"level_{level}" for level in sets[0].ensemble.levels]
    names += [f"extra_{name}" for name in sets[0].extra]
    rows: list[list[object]] = [["data_set", "image_path", "label", "score", *names]]
    for scores in sets:
        category = loco.split_mvtype(scores.mvtype)[0]
        columns = scores.final, *scores.ensemble.levels.values(), *scores.extra.values()
        for path, label, *values in zip(scores.image_paths, scores.labels, *columns, strict=True):
            rows.append([scores.mvtype, f"{category}/{path}", int(label), *values])
    return rows


# ---------------------------------------------------------------- provenance

Provenance = dict[str, dict[str, list[Any]]]  # part of a report -> setting -> its distinct values


def report_provenance(runs: dict[str, list[score_files.SubsetScores]]) -> Provenance:
    """Return which settings, images and versions the scores of a report come from.

    Without a record (the authors' files) only grids and repetitions of a level are known.
    """
    sets = [scores for run_sets in runs.values() for scores in run_sets]
    files = [file for scores in sets for file in scores.files]
    n_without = sum(not file.recorded for file in files)
    options = {name: [getattr(sets[0].values, name)] for name in ENSEMBLE_SETTINGS}
    parts = {"report": {"runs": list(runs), **options, "files_without_record": [n_without]}}
    for level in dict.fromkeys(file.level for file in files):
        skipped = *IMAGE_SETTINGS, *FILE_SETTINGS
        parts[f"level {level}"] = _distinct(
            {"n_crops": len(file.test), "rep": int(file.path.parts[-3].split("_")[-1])}
            | {name: value for name, value in file.recorded.items() if name not in skipped}
            for file in files
            if file.level == level
        )
    for scores in sets:
        records = [file.recorded for file in scores.files if file.recorded]
        parts[scores.mvtype] = _distinct({key: r[key] for key in IMAGE_SETTINGS} for r in records)
    parts["made with"] = _distinct(file.record.get("made_with", {}) for file in files)
    return parts


def _distinct(records: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return name -> its distinct values in some records."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return values


def provenance_text(provenance: Provenance) -> str:
    """Return `report_provenance` as a list in Markdown, one line per part."""
    lines = []
    for part, settings in provenance.items():
        text = "; ".join(f"{name} {', '.join(map(str, v))}" for name, v in settings.items())
        lines.append(f"- {cell(part)}: {cell(text) or 'no record'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- text


def legible(text: str) -> str:
    """Return text with characters that cannot be printed (not UTF-8, line ends) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return legible(text).replace("|", r"\|")


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as an aligned Markdown table; the first row is its header."""
    rows = [[cell(text) for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    form = " | ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(f"| {form.format(*row)} |" for row in rows)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")
