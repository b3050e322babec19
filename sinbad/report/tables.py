"""The paper's tables as text, Markdown and CSV, per-image scores, and what all was made from."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sinbad import ensembles, layouts, loco
from sinbad.report import metrics

JOINED_BY = ("lambda_factor", "crop_norm", "crop_pool")
OF_IMAGES = ("n_images", "images_sha256", "matrices")
OF_PLACE = ("mvtype", "pyramid_level")
SHOWN = {loco.KINDS[kind]: name for kind, name in loco.KIND_NAMES.items()}  # of the keys of means

Row = list[str]


def is_whole(mvtype: str, entry: metrics.Metrics) -> bool:
    """Tell whether all splits of a data set are recorded to be of LOCO's size."""
    keys = ("n_train", "n_validation", "n_good", "n_anomalous")
    counts = [list(own.values()) for own in layouts.loco_counts(mvtype)]
    return [entry[key] for key in keys] in counts


def score_table(runs: Sequence[metrics.Metrics]) -> list[Row]:
    """Return the paper's table: header, a row a data set, the means; AUROC in percent.

    `runs` are `all_metrics` of each seed or repetition, of the same data sets; the interval is of
    the first. Published figures (of SINBAD's ensemble) stand beside whole data sets only.
    """
    columns = list(runs[0]["mean"]["auc_roc_by_column"])
    rows = [["data set", *columns, "95 % interval", "published", "difference"]]

    def add_row(
        name: str,
        entries: list[dict[str, float | None]],
        interval: list[float] | None,
        published: float | None,
    ) -> None:
        last = [metrics.NOTHING] * 3
        if interval:
            last[0] = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
        ours = [
            100 * entry[metrics.ENSEMBLE]
            for entry in entries
            if entry[metrics.ENSEMBLE] is not None
        ]
        if published is not None and ours:
            last[1:] = f"{published:.1f}", f"{np.mean(ours) - published:+.1f}"
        rows.append(
            [name, *(metrics.percent([e[column] for e in entries]) for column in columns), *last]
        )

    whole = {mvtype for mvtype, first in runs[0]["data_sets"].items() if is_whole(mvtype, first)}
    for mvtype, first in runs[0]["data_sets"].items():
        class_name, kind = loco.split_mvtype(mvtype)
        published = loco.PUBLISHED_LOCO[kind][class_name] if mvtype in whole else None
        entries = [run["data_sets"][mvtype]["auroc"] for run in runs]
        add_row(mvtype, entries, first["auroc_interval_95"], published)
    published_means = {loco.KINDS[kind]: own["mean"] for kind, own in loco.PUBLISHED_LOCO.items()}
    published_means["mean"] = loco.PUBLISHED_ENSEMBLE_MEAN
    for key in _means_shown(runs[0]["mean"]["auc_roc_by_column"][metrics.ENSEMBLE]):
        kinds = [kind for kind in loco.KINDS if key in (loco.KINDS[kind], "mean")]
        complete = whole >= {f"{name}_{kind}" for name in loco.LOCO_CLASSES for kind in kinds}
        by_column = [run["mean"]["auc_roc_by_column"] for run in runs]
        entries = [{column: own[key] for column, own in run.items()} for run in by_column]
        if any(value is not None for entry in entries for value in entry.values()):
            name = f"mean {SHOWN[key]}" if key in SHOWN else key
            add_row(name, entries, None, published_means.get(key) if complete else None)
    return rows


def other_tables(runs: Sequence[metrics.Metrics]) -> dict[str, list[Row]]:
    """Return the tables of classes, other figures and defects, each with its header; percent.

    Pooled AUROC is of the good images against both kinds of anomalies of the class at once, as some
    publications report it; it is not the mean of the two.
    """
    kinds = _means_shown(k for c in runs[0]["classes"].values() for k in _by_kind(c))
    classes = [["class", *(SHOWN.get(kind, kind) for kind in kinds), "pooled"]]
    details = [["data set", "images good", "anomalous", "average precision", "F1-max"]]
    defects = [["data set", "defect", "images", "AUROC"]]
    groups = {name: [run["classes"][name] for run in runs] for name in runs[0]["classes"]}
    for name, own in {**groups, "mean": [run["mean"] for run in runs]}.items():
        figures = [metrics.percent([_by_kind(entry).get(kind) for entry in own]) for kind in kinds]
        classes.append([name, *figures, metrics.percent([entry["pooled_auroc"] for entry in own])])
    for mvtype, first in runs[0]["data_sets"].items():
        entries = [run["data_sets"][mvtype] for run in runs]
        figures = [
            metrics.percent([e[key] for e in entries]) for key in ("average_precision", "f1_max")
        ]
        details.append([mvtype, str(first["n_good"]), str(first["n_anomalous"]), *figures])
        for name, entry in first["auroc_by_defect"].items():
            values = [e["auroc_by_defect"][name]["auroc"] for e in entries]
            defects.append([mvtype, name, str(entry["n_images"]), metrics.percent(values)])
    return {"classes": classes, "details": details, "defects": defects}


def _means_shown(kinds: Iterable[str]) -> list[str]:
    """Return each kind once, "mean" last; not `all` where it is the only one, hence the mean."""
    names = [name for name in dict.fromkeys(kinds) if name != "mean"]
    return [*(names if names != [loco.ALL] else []), "mean"]


def _by_kind(entry: metrics.Metrics) -> dict[str, float | None]:
    """Return kind -> AUROC of a class or of the mean over classes."""
    return entry["classification"]["auc_roc"]


def image_rows(sets: Sequence[ensembles.DataSetScores]) -> list[list[object]]:
    """Return per-image scores: data set, image, label, final score, each level's normalised."""
    names = [f"level_{level}" for level in sets[0].levels]
    names += [f"extra_{name}" for name in sets[0].extra]
    rows: list[list[object]] = [["data_set", "image_path", "label", "score", *names]]
    for scores in sets:
        class_name = loco.split_mvtype(scores.mvtype)[0]
        columns = scores.final, *scores.levels.values(), *scores.extra.values()
        for path, label, *values in zip(scores.image_paths, scores.labels, *columns, strict=True):
            rows.append([scores.mvtype, f"{class_name}/{path}", int(label), *values])
    return rows


# ---------------------------------------------------------------- what it was made from


def made_from(runs: dict[str, list[ensembles.DataSetScores]]) -> dict[str, dict[str, list[Any]]]:
    """Return what a report is made from: part of it -> setting -> its values, each once.

    Without a record (the authors' files) only grids and repetitions of a level are known.
    """
    sets = [scores for of_run in runs.values() for scores in of_run]
    files = [file for scores in sets for file in scores.files]
    n_without = sum(not file.settings for file in files)
    joined = {name: [getattr(sets[0].options, name)] for name in JOINED_BY}
    found = {"report": {"runs": list(runs), **joined, "files_without_record": [n_without]}}
    for level in dict.fromkeys(file.level for file in files):
        found[f"level {level}"] = _distinct(
            {"n_crops": len(file.scores.test), "rep": int(file.path.parts[-3].split("_")[-1])}
            | {n: value for n, value in file.settings.items() if n not in (*OF_IMAGES, *OF_PLACE)}
            for file in files
            if file.level == level
        )
    for scores in sets:
        records = [file.settings for file in scores.files if file.settings]
        found[scores.mvtype] = _distinct({name: r[name] for name in OF_IMAGES} for r in records)
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
        text = "; ".join(f"{name} {', '.join(map(str, own))}" for name, own in settings.items())
        lines.append(f"- {cell(part)}: {cell(text) or 'no record'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- text


def legible(text: str) -> str:
    """Return text with what cannot be written or drawn (not UTF-8, line ends) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """Return text as it may stand in a Markdown table."""
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
