"""Draw a small data set in MVTec LOCO AD's layout: two of its classes, no photograph in it.

Writes  OUT_DIR/<class>/{train,validation,test}/<good|logical_anomalies|structural_anomalies>/
        OUT_DIR/<class>/ground_truth/<kind>/<image>/000.png   (pixel value = defect, 0 = normal)
        OUT_DIR/<class>/defects_config.json, OUT_DIR/demo_settings.json

    python demo/make_dataset.py --out_dir demo/out/dataset
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.drawings import DEFECTS, DRAWING_VERSION, draw_image
from sinbad import atomic, cli, errors

log = logging.getLogger("sinbad")

SETTINGS_FILE = "demo_settings.json"


def write_data_set(root: Path, settings: argparse.Namespace) -> None:
    """Draw all images and masks of both classes."""
    places = {("train", "good"): settings.n_train, ("validation", "good"): settings.n_valid}
    kinds = ("good", "logical_anomalies", "structural_anomalies")
    places |= {("test", kind): settings.n_test for kind in kinds}
    jobs = [(c, *place, i) for c in DEFECTS for place, n in places.items() for i in range(n)]
    for class_name, split, kind, index in cli.progress(jobs, desc="draw", unit="images"):
        image, mask = draw_image(class_name, split, kind, index, settings.seed, settings.scale)
        name, folder = f"{index:03d}", root / class_name
        outputs = {folder / split / kind / f"{name}.png": image}
        if kind != "good":
            outputs[folder / "ground_truth" / kind / name / "000.png"] = mask
        for path, picture in outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, compress_level=1)  # noise does not compress anyway
    for class_name, of_kinds in DEFECTS.items():
        values = [item for defects in of_kinds.values() for item in defects.items()]
        config = [{"defect_name": name, "pixel_value": value} for name, value in values]
        (root / class_name / "defects_config.json").write_text(atomic.to_json(config), "utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, required=True, help="folder to make")
    for split, number in (("train", 30), ("valid", 10), ("test", 12)):
        add(
            f"--n_{split}",
            type=cli.integer_from(1),
            default=number,
            help=f"images of a class{' and kind' * (split == 'test')}",
        )
    add("--seed", type=cli.integer_from(0), default=0, help="of the drawings")
    add("--scale", type=cli.number_between(0, 1, "(]"), default=0.25, help="of LOCO's image side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the data set unless it is there."""
    args = parse_args(argv)
    own = {name: value for name, value in vars(args).items() if name not in ("out_dir", "debug")}
    settings = atomic.to_json(own | {"drawing_version": DRAWING_VERSION})
    path = args.out_dir / SETTINGS_FILE
    if path.exists() and path.read_text("utf-8") == settings:
        atomic.remove_hidden(args.out_dir)
        log.info(f"{args.out_dir} is there already")
        return
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        raise errors.UserError(
            f"--out_dir must be a new folder or hold this data set with the same settings, got "
            f"{args.out_dir} with others; remove it, or choose another"
        )
    with atomic.atomic_path(args.out_dir) as root:
        write_data_set(root, args)
        (root / SETTINGS_FILE).write_text(settings, "utf-8")
    log.info(f"{args.out_dir}: {', '.join(DEFECTS)}")


if __name__ == "__main__":
    errors.run_script(main)
