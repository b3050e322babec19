"""The report on ensembled scores: tables, per-image scores, pictures, anomaly maps.

What `calc_anom_ensm.py` and `reproduce_paper.py` share above `result_tables`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from command_line import number_between, say
from ensembles import DataSetScores
from extra_scores import ExtraScores, add_extra_scores, read_extra_scores
from loco_datasets import DEFAULT_DATASET_DIR, split_mvtype
from loco_folders import defect_images
from result_metrics import Defects, all_metrics
from result_tables import markdown, write_tables
from sinbad_utils import LAMBDA_FACTOR

NOTES = """
AUROC in percent; the interval is a bootstrap over test images (of the first of several runs).
Published: SINBAD, arXiv 2302.12245, shown beside whole LOCO data sets only."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report holds.

    Attributes
    ----------
    out : folder of tables and pictures
    dataset_dir : LOCO's folder, for pictures, masks and the size of maps; may be missing
    extra : another method's scores, or None
    maps_dir : folder of anomaly maps, or None
    figures : draw pictures
    """

    out: Path
    dataset_dir: Path
    extra: ExtraScores | None
    maps_dir: Path | None
    figures: bool


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Add the weight of level 224 and the flags of a report, but --out, whose default differs."""
    parser.add_argument(
        "--lambda_factor",
        type=number_between(0, 1e6),
        default=LAMBDA_FACTOR,
        help="weight of level 224",
    )
    parser.add_argument(
        "--dataset_dir",
        type=Path,
        default=DEFAULT_DATASET_DIR,
        help="folder of the classes: their images, and masks for the AUROC per defect",
    )
    parser.add_argument("--extra_scores", type=Path, help="CSV of another method: image_path,score")
    parser.add_argument(
        "--extra_weight", type=number_between(0, 1e6), default=1.0, help="weight of --extra_scores"
    )
    parser.add_argument("--maps_dir", type=Path, help="write anomaly maps (.tiff) there")
    parser.add_argument(
        "--figures", action=argparse.BooleanOptionalAction, default=True, help="draw pictures"
    )


def report_options(args: argparse.Namespace, out: Path) -> ReportOptions:
    """Collect the flags of `add_report_flags`; what they name is tried now, before long work."""
    extra = None
    if args.extra_scores is not None:
        extra = read_extra_scores(args.extra_scores, args.extra_weight)
    out.mkdir(parents=True, exist_ok=True)
    return ReportOptions(out, args.dataset_dir, extra, args.maps_dir, args.figures)


def find_defects(dataset_dir: Path, sets: list[DataSetScores]) -> Defects:
    """Return the images of every kind of defect of every data set that has masks."""
    return {
        scores.mvtype: defect_images(
            dataset_dir / split_mvtype(scores.mvtype)[0], scores.image_paths
        )
        for scores in sets
    }


def write_report(runs: dict[str, list[DataSetScores]], options: ReportOptions) -> str:
    """Write everything that is asked for; return the text to print.

    Parameters
    ----------
    runs : name of a run, such as "seed 0" -> its data sets, the same in all runs
        Pictures and maps are of the first run.
    options
    """
    extra = options.extra
    if extra is not None:
        runs = {name: [add_extra_scores(s, extra) for s in sets] for name, sets in runs.items()}
    first = next(iter(runs.values()))
    defects = find_defects(options.dataset_dir, first)
    metrics = {name: all_metrics(sets, defects) for name, sets in runs.items()}
    rows = write_tables(options.out, runs, metrics)
    if options.figures:
        from result_figures import write_figures  # matplotlib is slow to import

        write_figures(options.out, first, options.dataset_dir)
    if options.maps_dir is not None:
        from anomaly_maps import write_maps

        write_maps(options.maps_dir, first, options.dataset_dir)
        say(f"anomaly maps (coarse: where to look) in {options.maps_dir}")
    return f"{markdown(rows)}\n{NOTES}\nMore tables, per-image scores and pictures: {options.out}"
