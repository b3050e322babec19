r"""Ensemble the scores of all levels: ROC-AUC tables and per-image scores.

Reads   VERSION/rep_num_<rep>/<mvtype>/   (from sinbad_single_layer.py; # is the pyramid level)
Writes  OUT/{table.md,metrics.json,scores.csv,*.csv,*.png}

    python calc_anom_ensm.py --mvtype loco --version ../sinbad_runs/results/ver1_pyramid_lvl_# \
        --version_224 ../sinbad_runs/results/ver1_pyramid_lvl_#

Scores are joined only if they were made alike: another net, seed, set of images or setting is an
error. What an earlier report left in OUT is replaced.
"""

import argparse
from pathlib import Path

from sinbad import cli, ensembles, errors, loco, report

DEFAULT_VERSION_PATH = str(loco.DEFAULT_RESULTS_DIR / f"{loco.DEFAULT_VERSION}_pyramid_lvl_#")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__, [cli.report_flags()])
    add = parser.add_argument
    add("--mvtype", nargs="+", default=["all"], help="class, data set, loco, struct, all")
    add(
        "--version",
        default=DEFAULT_VERSION_PATH,
        help="folder of the network's scores, # for the level",
    )
    add("--version_224", default=DEFAULT_VERSION_PATH, help="folder of the raw-pixel scores")
    add(
        "--pyramid_level",
        type=cli.integer_from(1),
        nargs="*",
        default=list(loco.PAPER_LEVELS),
        help="levels of the network; none for raw pixels alone",
    )
    add(
        "--rep",
        type=cli.integer_ranges,
        nargs="+",
        default=[[0]],
        help="repetitions of the network's levels; several, as 0-4, give mean and std (default: 0)",
    )
    add(
        "--rep_num_224",
        type=cli.integer_from(0),
        default=loco.PIXEL_SETTINGS.n_reps,
        help="raw-pixel repetitions; 0 leaves the level out",
    )
    add("--out", type=Path, help="default: `ensemble` beside the scores' folders")
    ensembles.add_ensemble_flags(parser)
    return parser.parse_args(argv)


def options_of_runs(args: argparse.Namespace) -> dict[str, ensembles.EnsembleOptions]:
    """Return what each repetition of the network's levels is ensembled from."""
    levels = tuple(dict.fromkeys(args.pyramid_level))
    if loco.PIXEL_LEVEL in levels:
        raise errors.UserError(
            f"pyramid_level must be of the network, got {loco.PIXEL_LEVEL}; raw pixels are added by "
            "--rep_num_224"
        )
    return {
        f"rep {rep}": ensembles.EnsembleOptions(
            args.version,
            args.version_224,
            levels,
            rep,
            args.rep_num_224,
            args.lambda_factor,
            args.crop_norm,
            args.crop_pool,
        )
        for rep in cli.flatten(args.rep)
    }


def main(argv: list[str] | None = None) -> None:
    """Read, ensemble, report."""
    args = parse_args(argv)
    out = args.out or Path(args.version.replace("#", "all")).parent / "ensemble"
    report_settings = report.report_options(args, out)
    options = options_of_runs(args)
    mvtypes = ensembles.find_mvtypes(options.values(), args.mvtype)
    runs = {
        name: [ensembles.load_data_set(o, mvtype) for mvtype in mvtypes]
        for name, o in options.items()
    }
    print(report.write_report(runs, report_settings))


if __name__ == "__main__":
    errors.run_script(main)
