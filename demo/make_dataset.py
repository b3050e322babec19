"""Render a small synthetic data set in MVTec LOCO AD's layout: two of its categories.

Writes  OUT_DIR/<category>/{train,validation,test}/<good|logical_anomalies|structural_anomalies>/
        OUT_DIR/<category>/ground_truth/<type>/<image>/000.png   (value = defect, 0 = normal)
        OUT_DIR/<category>/defects_config.json, OUT_DIR/demo_settings.json

    python demo/make_dataset.py --out_dir demo/out/dataset
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import synthetic
from sinbad import atomic, cli, errors, settings

log = logging.getLogger("sinbad")

SETTINGS_FILE = "demo_settings.json"


def write_data_set(root: Path, options: argparse.Namespace) -> None:
    """Render all images and masks of both categories."""
    counts = {("train", "good"): options.n_train, ("validation", "good"): options.n_valid}
    types = ("good", "logical_anomalies", "structural_anomalies")
    counts |= {("test", name): options.n_test for name in types}
    jobs = [
        (c, *part, i) for c in synthetic.DEFECTS for part, n in counts.items() for i in range(n)
    ]
    for category, split, name, index in cli.progress(jobs, desc="render", unit="images"):
        image, mask = synthetic.draw_image(
            category, split, name, index, options.seed, options.scale
        )
        folder, stem = root / category, f"{index:03d}"
        outputs = {folder / split / name / f"{stem}.png": image}
        if name != "good":
            outputs[folder / "ground_truth" / name / stem / "000.png"] = mask
        for path, output in outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            output.save(path, compress_level=1)  # noise does not compress anyway
    for category, by_type in synthetic.DEFECTS.items():
        values = [item for defects in by_type.values() for item in defects.items()]
        config = [{"defect_name": name, "pixel_value": value} for name, value in values]
        (root / category / "defects_config.json").write_text(atomic.to_json(config), "utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, required=True, help="folder to write")
    for split, number in (("train", 30), ("valid", 10), ("test", 12)):
        add(
            f"--n_{split}",
            type=cli.int_at_least(1),
            default=number,
            help=f"images per category{' and type' * (split == 'test')}",
        )
    add("--seed", type=cli.int_at_least(0), default=0, help="seed of the images")
    add(
        "--scale",
        type=cli.parse_as(settings.number(0, 1, "(]")),
        default=0.25,
        help="image size / LOCO's",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Render the data set unless it is present."""
    args = parse_args(argv)
    recorded = {name: v for name, v in vars(args).items() if name not in ("out_dir", "debug")}
    text = atomic.to_json(recorded | {"drawing_version": synthetic.VERSION})
    path = args.out_dir / SETTINGS_FILE
    if path.exists() and path.read_text("utf-8") == text:
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
        (root / SETTINGS_FILE).write_text(text, "utf-8")
    log.info(f"{args.out_dir}: {', '.join(synthetic.DEFECTS)}")


if __name__ == "__main__":
    errors.run_script(main)
