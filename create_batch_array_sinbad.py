"""Write a Slurm array for the ResNet levels: one task a data set, level and crop ratio.

Reads   nothing (the tasks read DATA_DIR, from data_to_matrices.py)
Writes  OUT_DIR/{tasks.tsv,array.sbatch,batch_master.sh,batch.json}
        tasks.tsv, a line a task: index, outputs (bash braces), command (to paste into a shell)

    mkdir -p ../sinbad_runs/sbatches; python create_batch_array_sinbad.py
    cd ../sinbad_runs/sbatches; sh batch_master.sh

`sh batch_master.sh` again submits only what is missing or failed; `sh batch_master.sh --local 2`
runs the tasks without Slurm, 2 at a time.
"""

import argparse

from command_line import ScriptParser, run_script
from loco_datasets import DEFAULT_RUNS_DIR, PAPER_RESNET_LEVELS, RESNET_LEVELS, RESNET_SETTINGS
from slurm_arrays import generate
from slurm_flags import add_slurm_flags, add_task_flags, parse_with_profile
from slurm_states import print_status

OUT_DIR = DEFAULT_RUNS_DIR / "sbatches"
SIBLING = "sbatches_224"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--pyramid_level", nargs="+", type=int, choices=RESNET_LEVELS,
        default=list(PAPER_RESNET_LEVELS), help="sides of the feature maps (default: 7 14)",
    )  # fmt: skip
    add_task_flags(parser, RESNET_SETTINGS)
    add_slurm_flags(parser, OUT_DIR, SIBLING)
    return parse_with_profile(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, or print how far its tasks are."""
    args = parse_args(argv)
    if args.status:
        return print_status(args.out_dir)
    levels = list(dict.fromkeys(args.pyramid_level))
    generate(args, "sinbad", levels, "create_batch_array_sinbad.py")
    return 0


if __name__ == "__main__":
    run_script(main)
