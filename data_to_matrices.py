"""Turn the images of MVTec LOCO AD, MVTec AD, VisA or of folders of your own into numpy matrices.

Reads   DATASET_DIR/<class>/{train,validation,test}/<good or a kind of anomaly>/*.png
Writes  OUT_DIR/<class>_<loco|struct|all>/{train,valid,test}_data.npy, image_level_label.npy,
        image_paths.json

    python data_to_matrices.py
    python data_to_matrices.py --mvtype pushpins --dataset_dir ../dataset_loco

Every class found is done. LOCO's give two data sets, _loco and _struct; those of other layouts one,
_all. Where there is no validation folder, some training images are taken for it. A data set that is
finished already is skipped; a run that was killed is started again with the same command.
"""

import argparse
import logging
from pathlib import Path

from sinbad import atomic, cli, errors, layouts, loco, matrices

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__, [cli.workers_flag()])
    add = parser.add_argument
    about = "data sets (pushpins_loco), classes (pushpins), loco, struct, all; default: all found"
    add("--mvtype", nargs="+", help=about)
    add("--dataset_dir", type=Path, default=loco.DEFAULT_DATASET_DIR, help="folder of the classes")
    add("--out_dir", type=Path, help="default: DATASET_DIR/data_matrices")
    add(
        "--im_size",
        type=cli.integer_from(8),
        default=loco.IM_SIZE,
        help="side of the matrices in pixels",
    )
    layouts.add_valid_share_flag(parser)
    add("--seed", type=cli.integer_from(0), default=0, help="of the images taken for validation")
    add("--overwrite", action="store_true", help="make finished matrices again")
    return parser.parse_args(argv)


def make_matrices(
    dataset_dir: Path,
    out_dir: Path,
    mvtypes: list[str],
    im_size: int = loco.IM_SIZE,
    n_workers: int = 1,
    overwrite: bool = False,
    valid_share: float = loco.VALID_SHARE,
    seed: int = 0,
) -> None:
    """Make the matrices of several data sets; finished ones are skipped, one line for each."""
    plans = [
        layouts.plan_data_set(dataset_dir, name, im_size, valid_share, seed) for name in mvtypes
    ]
    made: set[Path] = set()
    for plan in plans:
        folder = out_dir / plan.mvtype
        if not overwrite and matrices.is_current(folder, plan):
            atomic.remove_hidden(folder)
            log.info(f"{plan.mvtype}: finished already, {folder}")
            continue
        layouts.warn_about_counts(plan)
        # With --overwrite only what this run has made is linked.
        link = not overwrite or plan.class_dir in made
        matrices.make_data_set(plan, out_dir, n_workers, link)
        made.add(plan.class_dir)
        counts = " / ".join(str(len(plan.paths[split])) for split in matrices.SPLITS)
        log.info(f"{plan.mvtype}: {counts} train / valid / test images")


def main(argv: list[str] | None = None) -> None:
    """Make the matrices of every data set asked for."""
    args = parse_args(argv)
    make_matrices(
        args.dataset_dir,
        args.out_dir or args.dataset_dir / "data_matrices",
        layouts.choose_data_sets(args.dataset_dir, args.mvtype),
        args.im_size,
        args.num_workers,
        args.overwrite,
        args.valid_share,
        args.seed,
    )


if __name__ == "__main__":
    errors.run_script(main)
