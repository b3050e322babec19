"""Write a Slurm array for the raw-pixel level 224: one task a data set, all repetitions in it.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh}
        tasks.tsv, a line a task: index, outputs (bash braces), command (to paste into a shell)

    python create_batch_array_sinbad_224.py --partition gpu --time 02:00:00
    sh ../sinbad_runs/sbatches_224/batch_master.sh

`--reps_per_task 10` makes ten tasks of the 100 repetitions. `sh batch_master.sh` again submits only
what is missing or failed; `sh batch_master.sh --local 2` runs the tasks without Slurm, 2 at a time.
"""

import argparse

from sinbad.datasets import DEFAULT_RUNS_DIR, PIXEL_LEVEL, PIXEL_SETTINGS
from sinbad.errors import run_script
from sinbad.slurm import array_parser, run_array

OUT_DIR = DEFAULT_RUNS_DIR / "sbatches_224"
SIBLING = "sbatches"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return array_parser(__doc__, PIXEL_SETTINGS, OUT_DIR, SIBLING).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or submit, run or report its tasks."""
    return run_array(parse_args(argv), [PIXEL_LEVEL], __file__)


if __name__ == "__main__":
    run_script(main)
