"""Turn the images of MVTec LOCO AD, MVTec AD, VisA or folders of your own into numpy matrices.

Reads   DATASET_DIR/<class>/{train,validation,test}/<good or an anomaly type>/*.png
Writes  OUT_DIR/<class>_<loco|struct|all>/{train,valid,test}_data.npy, image_level_label.npy,
        image_paths.json

    python data_to_matrices.py
    python data_to_matrices.py --mvtype pushpins --dataset_dir ../dataset_loco

By default every category in DATASET_DIR. Those of LOCO give two test subsets, _loco (logical
anomalies) and _struct; those of other layouts one, _all. Where there is no validation folder, some
training images are used for validation. A finished subset is skipped; to resume a killed run, run
the same command again.
"""

import argparse
import logging
from pathlib import Path

from sinbad import atomic, cli, errors, layouts, matrices, settings

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    default_all = {"help": f"{cli.SUBSETS} (default: all found)"}
    again = {"help": "write finished matrices again"}
    cli.add_shared(parser, "dataset_dir", "mvtype", mvtype=default_all)
    add = parser.group(settings.INPUT_OUTPUT).add_argument
    add("--out_dir", type=cli.path, metavar="DIR", help="default: DATASET_DIR/data_matrices")
    cli.add_shared(parser, "overwrite", overwrite=again)
    add = parser.group(settings.COMPUTED).add_argument
    help_text = settings.DECLARED["initial_res"].metadata["help"]
    add(
        "--im_size",
        type=cli.int_at_least(8),
        default=settings.IM_SIZE,
        metavar="N",
        help=help_text,
    )
    cli.add_shared(parser, "valid_share")
    add(
        "--seed",
        type=cli.int_at_least(0),
        default=0,
        metavar="N",
        help="seed for choosing validation images",
    )
    cli.add_settings(parser, ["num_workers"])
    return parser.parse_args(argv)


def make_matrices(
    dataset_dir: Path,
    out_dir: Path,
    mvtypes: list[str],
    im_size: int = settings.IM_SIZE,
    n_workers: int = 1,
    overwrite: bool = False,
    valid_share: float = settings.VALID_SHARE,
    seed: int = 0,
) -> None:
    """Write the matrices of several test subsets; finished ones are skipped, one line for each."""
    subsets = [
        layouts.find_subset(dataset_dir, name, im_size, valid_share, seed) for name in mvtypes
    ]
    written: set[Path] = set()
    for subset in subsets:
        folder = out_dir / subset.mvtype
        if not overwrite and matrices.is_current(folder, subset):
            atomic.remove_hidden(folder)
            log.info(f"{subset.mvtype}: finished already, {folder}")
            continue
        layouts.warn_about_counts(subset)
        # With --overwrite only what this run has written is linked.
        link = not overwrite or subset.category_dir in written
        matrices.write_matrices(subset, out_dir, n_workers, link)
        written.add(subset.category_dir)
        counts = " / ".join(str(len(subset.paths[split])) for split in matrices.SPLITS)
        log.info(f"{subset.mvtype}: {counts} train / valid / test images")


def main(argv: list[str] | None = None) -> None:
    """Write the matrices of every test subset asked for."""
    args = parse_args(argv)
    make_matrices(
        args.dataset_dir,
        args.out_dir or args.dataset_dir / "data_matrices",
        layouts.choose_subsets(args.dataset_dir, args.mvtype),
        args.im_size,
        settings.Settings(num_workers=args.num_workers).n_workers,
        args.overwrite,
        args.valid_share,
        args.seed,
    )


if __name__ == "__main__":
    errors.run_script(main)
