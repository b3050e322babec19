r"""Ensemble the scores of all levels: AUROC tables, per-image scores and figures.

Reads   VERSION/rep_num_<rep>/<mvtype>/   (from sinbad_single_layer.py; # is the pyramid level)
Writes  OUT/{table.md,metrics.json,scores.csv,*.csv,*.png}

    python calc_anom_ensm.py --mvtype loco --version ../sinbad_runs/results/ver1_pyramid_lvl_# \
        --version_224 ../sinbad_runs/results/ver1_pyramid_lvl_#

Only consistent scores are ensembled: another net, seed, set of images or setting is an error. What
an earlier report left in OUT is replaced.
"""

import argparse
import os
from pathlib import Path

from sinbad import cli, errors, report, score_files, settings

DEFAULT_VERSION = str(
    cli.SHARED_FLAGS["results_dir"]["default"]
    / f"{cli.SHARED_FLAGS['version_name']['default']}_pyramid_lvl_#"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    cli.add_shared(parser, "mvtype", mvtype={"default": ["all"]})
    for name, scores in (
        ("--version", "network's scores; # stands for the level"),
        ("--version_224", "raw-pixel scores"),
    ):
        parser.group(settings.INPUT_OUTPUT).add_argument(
            name,
            type=os.path.expanduser,
            default=DEFAULT_VERSION,
            metavar="DIR",
            help=f"folder of the {scores}",
        )
    out = {"help": "folder of tables and figures (default: `ensemble` beside the score folders)"}
    cli.add_shared(parser, "out", "dataset_dir", *cli.REPORT_FLAGS, out=out)
    parser.group(settings.COMPUTED).add_argument(
        "--pyramid_level",
        type=cli.int_at_least(1),
        nargs="*",
        default=list(settings.PAPER_LEVELS),
        metavar="N",
        help="levels of the network; none for raw pixels alone",
    )
    rep = {"help": "repetitions of the network's levels; several give mean and std (default: 0)"}
    cli.add_shared(parser, "rep", rep=rep)
    parser.group(settings.COMPUTED).add_argument(
        "--rep_num_224",
        type=cli.int_at_least(0),
        default=settings.PIXEL_DEFAULTS.n_reps,
        metavar="N",
        help="raw-pixel repetitions; 0 leaves the level out",
    )
    cli.add_settings(parser, cli.ENSEMBLE_FLAGS)
    return parser.parse_args(argv)


def select_runs(args: argparse.Namespace) -> dict[str, score_files.Selection]:
    """Return which files each repetition of the network's levels is ensembled from."""
    levels = tuple(dict.fromkeys(args.pyramid_level))
    if settings.PIXEL_LEVEL in levels:
        raise errors.UserError(
            f"pyramid_level must be of the network, got {settings.PIXEL_LEVEL}; raw pixels are "
            "added by --rep_num_224"
        )
    return {
        f"rep {rep}": score_files.Selection(
            args.version, args.version_224, levels, rep, args.rep_num_224
        )
        for rep in cli.sorted_unique(args.rep)
    }


def main(argv: list[str] | None = None) -> None:
    """Read, ensemble, report."""
    args = parse_args(argv)
    out = args.out or Path(args.version.replace("#", "all")).parent / "ensemble"
    options = report.report_options(args, out)
    selections = select_runs(args)
    values = settings.Settings(**{name: getattr(args, name) for name in cli.ENSEMBLE_FLAGS})
    mvtypes = score_files.find_mvtypes(selections.values(), args.mvtype)
    runs = {
        name: [score_files.load_subset(selection, mvtype, values) for mvtype in mvtypes]
        for name, selection in selections.items()
    }
    print(report.write_report(runs, options))


if __name__ == "__main__":
    errors.run_script(main)
