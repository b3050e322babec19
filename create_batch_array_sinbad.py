"""Write a Slurm array for the network's levels: one task a data set, level and crop ratio.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh}

    python create_batch_array_sinbad.py --partition gpu --time 02:00:00
    sh ../sinbad_runs/sbatches/batch_master.sh

`sh batch_master.sh` again submits only what is missing or failed.
"""

import argparse

from sinbad import cli, errors, loco, slurm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = slurm.array_parser(__doc__, loco.NETWORK_SETTINGS, "sbatches", "sbatches_224")
    cli.add_level_flag(parser, loco.PAPER_LEVELS)
    args = parser.parse_args(argv)
    if loco.PIXEL_LEVEL in args.pyramid_level:
        raise errors.UserError(
            "pyramid_level must be of the network, got 224; the raw pixels have their own "
            "generator, create_batch_array_sinbad_224.py"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or submit, run or report its tasks."""
    args = parse_args(argv)
    return slurm.run_array(args, list(dict.fromkeys(args.pyramid_level)), __file__)


if __name__ == "__main__":
    errors.run_script(main)
