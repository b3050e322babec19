"""The paper's tables as text, Markdown and CSV, per-image scores, and what all was made from."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sinbad.datasets import (
    ALL,
    KIND_NAMES,
    KINDS,
    LOCO_CLASSES,
    OTHER_COUNTS,
    PUBLISHED_ENSEMBLE_MEAN,
    PUBLISHED_LOCO,
    split_mvtype,
)
from sinbad.ensembles import DataSetScores
from sinbad.report.metrics import ENSEMBLE, LOCO_KINDS, NOTHING, Metrics, percent

JOINED_BY = ("lambda_factor", "crop_norm", "crop_pool")
OF_IMAGES = ("mvtype", "n_images", "images_sha256", "matrices", "pyramid_level")

Row = list[str]


def is_whole(mvtype: str, entry: Metrics) -> bool:
    """Tell whether all splits of a data set are recorded to be of LOCO's size."""
    class_name, kind = split_mvtype(mvtype)
    facts = LOCO_CLASSES.get(class_name)
    if facts is None or kind not in LOCO_KINDS:
        return False
    n_anomalous = facts.logical if kind == "loco" else facts.structural
    n_normal = {"train": facts.train, "validation": facts.validation}
    found = {"train": entry["n_train"], "validation": entry["n_validation"]}
    return (
        found in (n_normal, OTHER_COUNTS.get(class_name))
        and (entry["n_good"], entry["n_anomalous"]) == (facts.good, n_anomalous)
    )  # fmt: skip


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
        class_name, kind = split_mvtype(mvtype)
        published = None
        if is_whole(mvtype, first):
            whole.add(mvtype)
            published = PUBLISHED_LOCO[kind][class_name]
        entries = [run["data_sets"][mvtype]["auroc"] for run in runs]
        row = _score_row(mvtype, entries, columns, published)
        interval = first["auroc_interval_95"]
        if interval:
            row[-3] = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
        rows.append(row)
    published_means = {KINDS[k]: (PUBLISHED_LOCO[k]["mean"], {k}) for k in LOCO_KINDS}
    published_means["mean"] = PUBLISHED_ENSEMBLE_MEAN, set(LOCO_KINDS)
    for key in _means_shown(runs[0]["mean"]["auc_roc_by_column"][ENSEMBLE]):
        by_column = [run["mean"]["auc_roc_by_column"] for run in runs]
        entries = [{column: kinds[key] for column, kinds in run.items()} for run in by_column]
        known, kinds = published_means.get(key, (None, set()))
        complete = whole >= {f"{c}_{kind}" for c in LOCO_CLASSES for kind in kinds}
        names = {folder: f"mean {KIND_NAMES.get(kind, kind)}" for kind, folder in KINDS.items()}
        if any(value is not None for entry in entries for value in entry.values()):
            name = names.get(key, key)
            rows.append(_score_row(name, entries, columns, known if complete else None))
    return rows


def _score_row(
    name: str,
    entries: Sequence[dict[str, float | None]],
    columns: list[str],
    published: float | None,
) -> Row:
    """Return one row of the score table; `entries` is column -> AUROC of each run."""
    cells = [percent([entry[column] for entry in entries]) for column in columns]
    ours = [100 * entry[ENSEMBLE] for entry in entries if entry[ENSEMBLE] is not None]
    if published is None or not ours:
        return [name, *cells, NOTHING, NOTHING, NOTHING]
    return [name, *cells, NOTHING, f"{published:.1f}", f"{np.mean(ours) - published:+.1f}"]


def other_tables(runs: Sequence[Metrics]) -> dict[str, list[Row]]:
    """Return the tables of classes, other figures and defects, each with its header; percent.

    Pooled AUROC is of the good images against both kinds of anomalies of the class at once, as some
    publications report it; it is not the mean of the two.
    """
    kinds = _means_shown(k for c in runs[0]["classes"].values() for k in _by_kind(c))
    shown = {folder: KIND_NAMES.get(kind, kind) for kind, folder in KINDS.items()}
    classes = [["class", *(shown.get(kind, kind) for kind in kinds), "pooled"]]
    details = [["data set", "images good", "anomalous", "average precision", "F1-max"]]
    defects = [["data set", "defect", "images", "AUROC"]]
    groups = {name: [run["classes"][name] for run in runs] for name in runs[0]["classes"]}
    for name, own in {**groups, "mean": [run["mean"] for run in runs]}.items():
        figures = [percent([_by_kind(entry).get(kind) for entry in own]) for kind in kinds]
        classes.append([name, *figures, percent([entry["pooled_auroc"] for entry in own])])
    for mvtype, first in runs[0]["data_sets"].items():
        entries = [run["data_sets"][mvtype] for run in runs]
        figures = [percent([e[key] for e in entries]) for key in ("average_precision", "f1_max")]
        details.append([mvtype, str(first["n_good"]), str(first["n_anomalous"]), *figures])
        for name, entry in first["auroc_by_defect"].items():
            values = [e["auroc_by_defect"][name]["auroc"] for e in entries]
            defects.append([mvtype, name, str(entry["n_images"]), percent(values)])
    return {"classes": classes, "details": details, "defects": defects}


def _means_shown(kinds: Iterable[str]) -> list[str]:
    """Return each kind once, "mean" last; not `all` where it is the only one, hence the mean."""
    names = [name for name in dict.fromkeys(kinds) if name != "mean"]
    return [*(names if names != [ALL] else []), "mean"]


def _by_kind(entry: Metrics) -> dict[str, float | None]:
    """Return kind -> AUROC of a class or of the mean over classes."""
    return entry["classification"]["auc_roc"]


def image_rows(sets: Sequence[DataSetScores]) -> list[list[object]]:
    """Return per-image scores: data set, image, label, final score, each level's normalised."""
    levels = list(dict.fromkeys(level for scores in sets for level in scores.levels))
    extra = list(dict.fromkeys(name for scores in sets for name in scores.extra))
    names = [*(f"level_{level}" for level in levels), *(f"extra_{name}" for name in extra)]
    rows: list[list[object]] = [["data_set", "image_path", "label", "score", *names]]
    for scores in sets:
        class_name = split_mvtype(scores.mvtype)[0]
        columns = [scores.levels[level] for level in levels] + [scores.extra[n] for n in extra]
        for i, path in enumerate(scores.image_paths):
            row = [scores.mvtype, f"{class_name}/{path}", int(scores.labels[i]), scores.final[i]]
            rows.append([*row, *(values[i] for values in columns)])
    return rows


# ---------------------------------------------------------------- what it was made from


def made_from(runs: dict[str, list[DataSetScores]]) -> dict[str, dict[str, list[Any]]]:
    """Return what a report is made from: part of it -> setting -> its values, each once.

    Without a record (the authors' files) only grids and repetitions of a level are known.
    """
    sets = [scores for of_run in runs.values() for scores in of_run]
    files = [file for scores in sets for file in scores.files]
    n_without = sum(not file.settings for file in files)
    joined = {name: [getattr(sets[0].options, name)] for name in JOINED_BY}
    found = {"report": {"runs": list(runs), **joined, "files_without_record": [n_without]}}
    for level in dict.fromkeys(file.level for file in files):
        records = [
            {"n_crops": len(file.scores.test), "rep": int(file.path.parts[-3].split("_")[-1])}
            | {name: file.settings[name] for name in file.settings if name not in OF_IMAGES}
            for file in files
            if file.level == level
        ]
        found[f"level {level}"] = _distinct(records)
    for scores in sets:
        records = [file.settings for file in scores.files]
        own = [{k: r[k] for k in ("n_images", "images_sha256", "matrices") if r} for r in records]
        found[scores.mvtype] = _distinct(own)
    found["made with"] = _distinct([file.scores.run.get("made_with", {}) for file in files])
    return found


def _distinct(records: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return name -> the values it has in some records, each once."""
    found: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return found


def made_from_text(found: dict[str, dict[str, list[Any]]]) -> str:
    """Return `made_from` as a list in Markdown, a line a part."""
    lines = []
    for part, settings in found.items():
        values = [f"{name} {', '.join(map(str, own))}" for name, own in settings.items()]
        lines.append(f"- {cell(part)}: {cell('; '.join(values)) or 'no record'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- text


def legible(text: str) -> str:
    """Return text with what cannot be written or drawn (not UTF-8, line ends) as escapes."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def cell(text: str) -> str:
    """Return text as it may stand in a Markdown table."""
    return legible(text).replace("|", r"\|")


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as an aligned Markdown table; the first row is its header."""
    rows = [[cell(text) for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *others in rows:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *padded])} |")
    return "\n".join(lines)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")
