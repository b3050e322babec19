"""Write a Slurm array for the raw-pixel level 224: one task a data set, all repetitions in it.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh,batch.json}
        tasks.tsv, a line a task: index, outputs (bash braces), command (to paste into a shell)

    mkdir -p ../sinbad_runs/sbatches_224; python create_batch_array_sinbad_224.py
    cd ../sinbad_runs/sbatches_224; sh batch_master.sh

`--reps_per_task 10` makes ten tasks of the 100 repetitions. `sh batch_master.sh` again submits only
what is missing or failed; `sh batch_master.sh --local 2` runs the tasks without Slurm, 2 at a time.
"""

import argparse

from command_line import ScriptParser, run_script
from loco_datasets import DEFAULT_RUNS_DIR, PIXEL_LEVEL, PIXEL_SETTINGS
from slurm_arrays import generate
from slurm_flags import add_slurm_flags, add_task_flags, parse_with_profile
from slurm_states import print_status

OUT_DIR = DEFAULT_RUNS_DIR / "sbatches_224"
SIBLING = "sbatches"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    add_task_flags(parser, PIXEL_SETTINGS)
    add_slurm_flags(parser, OUT_DIR, SIBLING)
    return parse_with_profile(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or print how far its tasks are."""
    args = parse_args(argv)
    if args.status:
        return print_status(args.out_dir)
    generate(args, "sinbad_224", [PIXEL_LEVEL], "create_batch_array_sinbad_224.py")
    return 0


if __name__ == "__main__":
    run_script(main)
