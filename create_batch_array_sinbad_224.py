"""Write a Slurm array for the raw-pixel level 224: one task per test subset, all repetitions in it.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh}

    python create_batch_array_sinbad_224.py --partition gpu --time 02:00:00
    sh ../sinbad_runs/sbatches_224/batch_master.sh

`--reps_per_task 10` makes ten tasks of the 100 repetitions.
"""

import argparse

from sinbad import cli, errors, settings, slurm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return slurm.array_parser(__doc__, settings.PIXEL_DEFAULTS, "sbatches_224").parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or submit, run or report its tasks."""
    args = parse_args(argv)
    values = cli.settings_of(args, pyramid_level=(settings.PIXEL_LEVEL,))
    return slurm.run_array(args, values, __file__)


if __name__ == "__main__":
    errors.run_script(main)
