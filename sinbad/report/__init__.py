"""The report on ensembled scores: metrics, tables, per-image scores, figures, anomaly maps."""

import argparse
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from sinbad import atomic, errors, extra_scores, layouts, loco, score_files
from sinbad.report import comparison, metrics, tables

log = logging.getLogger(__name__)

NOTES = """
Image-level AUROC in percent; the interval is a bootstrap over test images (of the first of several
runs). Published figures are shown beside complete LOCO data sets only. Those per data set (arXiv
2302.12245) are not of the ensemble; of the ensemble the mean is published (arXiv 2311.14773)."""
COMPARISON = """Difference: this run (the first of several) minus {}, in points.
Interval: paired bootstrap over test images, not over seeds; where it contains 0, these images do
not show a difference."""
# Every file that a report may write; those that an earlier report left are removed.
REPORT_FILES = re.compile(
    r"metrics\.json|table\.md|(table|compare|classes|details|defects|scores(_(seed|rep)_\d+)?)\.csv|"
    r"(score_distributions|roc_curves|auroc_by_grid|images_.+_(loco|struct|all))\.png"
)


@dataclass(frozen=True)
class ReportOptions:
    """What a report holds."""

    out: Path  # folder of tables and figures
    dataset_dir: Path  # the images, for figures, masks and the size of maps; may be missing
    extra: extra_scores.ExtraScores | None  # another method's scores
    maps_dir: Path | None  # folder of anomaly maps
    figures: bool  # whether to plot figures, which takes matplotlib
    compare: comparison.OtherRun | None = None  # another run's scores of the same images


def report_options(args: argparse.Namespace, out: Path) -> ReportOptions:
    """Collect the flags of a report; files that they name are tried now, before long work."""
    path = args.extra_scores
    extra = path and extra_scores.read_extra_scores(path, args.extra_weight, args.extra_norm)
    other = args.compare
    if other and other.resolve().parent == out.resolve() and REPORT_FILES.fullmatch(other.name):
        raise errors.UserError(
            f"compare must be a file that this report does not replace, got {other}; choose "
            "another --out"
        )
    compare = other and comparison.OtherRun(other, extra_scores.read_score_rows(other))
    out.mkdir(parents=True, exist_ok=True)
    for folder in filter(None, (out, args.maps_dir)):
        atomic.check_writable(folder / "output")
    return ReportOptions(out, args.dataset_dir, extra, args.maps_dir, args.figures, compare)


def write_report(runs: dict[str, list[score_files.SubsetScores]], options: ReportOptions) -> str:
    """Write all files of a report.

    Parameters
    ----------
    runs : name of a run ("seed 0", "rep 0") -> its data sets, the same in all runs; figures and
        maps are of the first run

    Returns
    -------
    The text to print.

    Raises
    ------
    UserError
        If data sets or runs have inconsistent settings, or the extra scores or those to compare
        with do not fit them.
    """
    score_files.check_runs(runs)
    extra = options.extra
    if extra is not None:
        runs = {run: [_with_extra(scores, extra) for scores in s] for run, s in runs.items()}
    first = next(iter(runs.values()))
    text, files = _table_files(runs, options)
    for name, content in files.items():  # before maps and figures, which may fail
        atomic.atomic_write(options.out / name, content)
    if options.maps_dir is not None:
        from sinbad.report import maps

        maps.write_maps(options.maps_dir, first, options.dataset_dir)
        log.info(f"anomaly maps (coarse: where to look) in {options.maps_dir}")
    if options.figures:
        from sinbad.report import figures  # matplotlib: slow to import, not needed for tables

        plots = figures.report_figures(first, options.dataset_dir)
        for name, content in plots.items():
            atomic.atomic_write(options.out / name, content)
        files |= plots
    for path in options.out.iterdir():
        if path.name not in files and REPORT_FILES.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    return f"{text}\n{NOTES}\nMore tables, per-image scores and figures: {options.out}"


def _with_extra(
    scores: score_files.SubsetScores, extra: extra_scores.ExtraScores
) -> score_files.SubsetScores:
    """Add weight * another method's normalised scores."""
    category = loco.split_mvtype(scores.mvtype)[0]
    normalised = extra_scores.normalise(extra, category, scores.image_paths)
    final = scores.ensemble.final + extra.weight * normalised
    return replace(scores, extra={extra.name: normalised}, final=final)


def _table_files(
    runs: dict[str, list[score_files.SubsetScores]], options: ReportOptions
) -> tuple[str, dict[str, bytes | str]]:
    """Return the tables to print, and file name -> content of all tables."""
    defects = {
        s.mvtype: layouts.defect_images(
            options.dataset_dir / loco.split_mvtype(s.mvtype)[0], s.image_paths
        )
        for s in next(iter(runs.values()))
    }
    metrics_of_runs = {name: metrics.all_metrics(sets, defects) for name, sets in runs.items()}
    values = list(metrics_of_runs.values())
    rows_by_table = {"table": tables.score_table(values), **tables.other_tables(values)}
    report: metrics.Metrics
    report = values[0] if len(runs) == 1 else {"runs": metrics_of_runs}
    if options.compare is not None:
        compared = comparison.compare_runs(next(iter(runs.values())), options.compare)
        rows_by_table["compare"] = tables.comparison_table(compared)
        report = {**report, "compare": compared}
    texts = {name: tables.markdown(rows) for name, rows in rows_by_table.items() if len(rows) > 1}
    provenance = tables.report_provenance(runs)
    if options.extra is not None:
        keys = ("name", "weight", "norm")
        provenance["extra scores"] = {key: [getattr(options.extra, key)] for key in keys}
    texts["table"] = "\n\n".join([texts["table"], *tables.low_auroc_notes(values)])
    printed = [texts["table"]]
    if "compare" in texts:
        texts["compare"] += "\n\n" + COMPARISON.format(tables.legible(str(options.compare.path)))
        printed.append(texts["compare"])
    files: dict[str, bytes | str]
    files = {f"{name}.csv": tables.csv_text(rows_by_table[name]) for name in texts}
    sections = *texts.values(), "Made from", tables.provenance_text(provenance)
    files["table.md"] = "\n\n".join(sections) + "\n"
    text = atomic.to_json({**report, "made_from": provenance}) + "\n"
    files["metrics.json"] = text.encode("utf-8", "backslashreplace")
    for name, sets in runs.items():
        file_name = "scores.csv" if len(runs) == 1 else f"scores_{name.replace(' ', '_')}.csv"
        files[file_name] = tables.csv_text(tables.image_rows(sets))
    return "\n\n".join(printed), files
