"""Write a Slurm array for the backbone's levels: one task per test subset, level and crop ratio.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh}

    python create_batch_array_sinbad.py --partition gpu --time 02:00:00
    sh ../sinbad_runs/sbatches/batch_master.sh    # run again, it submits what is missing
"""

import argparse

from sinbad import cli, errors, settings, slurm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = slurm.array_parser(__doc__, settings.BACKBONE_DEFAULTS, "sbatches")
    cli.add_settings(parser, ["pyramid_level"], pyramid_level=settings.PAPER_LEVELS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or submit, run or report its tasks."""
    args = parse_args(argv)
    if settings.PIXEL_LEVEL in args.pyramid_level:
        raise errors.UserError(
            "pyramid_level must be of the backbone, got 224; see create_batch_array_sinbad_224.py"
        )
    return slurm.run_array(args, cli.settings_of(args), __file__)


if __name__ == "__main__":
    errors.run_script(main)
