r"""Ensemble the scores of all levels: ROC-AUC tables and per-image scores.

Reads   VERSION/rep_num_<rep>/<mvtype>/   (from sinbad_single_layer.py; # is the pyramid level)
Writes  OUT/{table.md,metrics.json,scores.csv,*.csv,*.png}

    python calc_anom_ensm.py --mvtype loco --version ../sinbad_runs/results/ver1_pyramid_lvl_# \
        --version_224 ../sinbad_runs/results/ver1_pyramid_lvl_#
"""

import argparse
from pathlib import Path

from command_line import ScriptParser, add_rep_flag, flatten, integer_from, run_script
from ensembles import DataSetScores, EnsembleOptions, find_mvtypes, load_data_set
from loco_datasets import (
    DEFAULT_RESULTS_DIR,
    DEFAULT_VERSION,
    PAPER_RESNET_LEVELS,
    PIXEL_SETTINGS,
    RESNET_LEVELS,
)
from reports import add_report_flags, report_options, write_report

DEFAULT_VERSION_PATH = str(DEFAULT_RESULTS_DIR / f"{DEFAULT_VERSION}_pyramid_lvl_#")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--mvtype", nargs="+", default=["all"], help="class, data set, loco, struct, all"
    )
    parser.add_argument(
        "--version",
        default=DEFAULT_VERSION_PATH,
        help="folder of the ResNet scores, # for the level",
    )
    parser.add_argument(
        "--version_224", default=DEFAULT_VERSION_PATH, help="folder of the raw-pixel scores"
    )
    parser.add_argument(
        "--pyramid_level",
        type=int,
        nargs="*",
        choices=RESNET_LEVELS,
        default=list(PAPER_RESNET_LEVELS),
        help="ResNet levels; none for raw pixels alone",
    )
    add_rep_flag(parser, "of the ResNet levels; several, as 0-4, give mean and std")
    parser.add_argument(
        "--rep_num_224",
        type=integer_from(0),
        default=PIXEL_SETTINGS.n_reps,
        help="raw-pixel repetitions; 0 leaves the level out",
    )
    parser.add_argument("--out", type=Path, help="default: `ensemble` beside the scores' folders")
    add_report_flags(parser)
    return parser.parse_args(argv)


def load_run(args: argparse.Namespace, rep: int) -> list[DataSetScores]:
    """Read and ensemble the data sets of one repetition."""
    options = EnsembleOptions(
        args.version,
        args.version_224,
        tuple(args.pyramid_level),
        rep,
        args.rep_num_224,
        args.lambda_factor,
    )
    return [load_data_set(options, mvtype) for mvtype in find_mvtypes(options, args.mvtype)]


def main(argv: list[str] | None = None) -> None:
    """Read, ensemble, report."""
    args = parse_args(argv)
    out = args.out or Path(args.version.replace("#", "all")).parent / "ensemble"
    runs = {f"rep {rep}": load_run(args, rep) for rep in flatten(args.rep)}
    print(write_report(runs, report_options(args, out)))


if __name__ == "__main__":
    run_script(main)
