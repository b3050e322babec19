"""Draw a small data set in MVTec LOCO AD's layout: two of its classes, no photograph in it.

Writes  OUT_DIR/<class>/{train,validation,test}/<good|logical_anomalies|structural_anomalies>/
        OUT_DIR/<class>/ground_truth/<kind>/<image>/000.png   (pixel value = defect, 0 = normal)
        OUT_DIR/<class>/defects_config.json, OUT_DIR/demo_settings.json

    python make_demo_dataset.py --out_dir demo/dataset
"""

import argparse
import json
import os
from pathlib import Path

from command_line import (
    ScriptParser,
    UserError,
    integer_from,
    number_between,
    progress,
    run_script,
    say,
)
from demo_drawings import DEFECTS, DRAWING_VERSION, FOLDERS, defects_config, draw_image
from result_files import first_difference, partial_folder, to_json

Job = tuple[str, int, int]  # class, position in FOLDERS, number of the image


SETTINGS_FILE = "demo_settings.json"


def is_finished(out_dir: Path, settings: dict[str, object], overwrite: bool) -> bool:
    """Tell whether the data set is there with these settings; refuse to touch anything else."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    try:
        found = json.loads((out_dir / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"--out_dir must be a new folder or a demo data set, got {out_dir} without a readable "
            f"{SETTINGS_FILE}; choose another --out_dir"
        )
    difference = first_difference(found, settings)
    foreign = {path.name for path in out_dir.iterdir()} - {SETTINGS_FILE, *DEFECTS}
    if overwrite and foreign:
        raise UserError(
            f"--out_dir must hold nothing but the demo data set to be replaced, got "
            f"{', '.join(sorted(foreign))} in {out_dir}; move that away, or choose another"
        )
    if difference and not overwrite:
        name, old, new = difference
        raise UserError(
            f"{name} must be {old} as in {out_dir}, got {new}; choose another --out_dir, or pass "
            "--overwrite to replace it"
        )
    return difference is None and not overwrite


def write_data_set(out_dir: Path, settings: dict[str, object], jobs: list[Job]) -> None:
    """Draw all images beside `out_dir` and rename the finished folder into place."""
    seed, scale = settings["seed"], settings["scale"]
    with partial_folder(out_dir.parent) as partial:
        root = partial / "data_set"
        for class_name, folder, index in progress(jobs, desc="draw", unit="images"):
            split, kind = FOLDERS[folder]
            image, mask = draw_image(class_name, folder, index, seed, scale)
            outputs = {root / class_name / split / kind / f"{index:03d}.png": image}
            if kind != "good":
                mask_folder = root / class_name / "ground_truth" / kind / f"{index:03d}"
                outputs[mask_folder / "000.png"] = mask
            for path, picture in outputs.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, compress_level=1)  # noise does not compress anyway
        for class_name in DEFECTS:
            config = json.dumps(defects_config(class_name, scale), indent=4)
            (root / class_name / "defects_config.json").write_text(config)
        (root / SETTINGS_FILE).write_text(to_json(settings))
        if out_dir.exists():
            os.replace(out_dir, partial / "replaced")
        os.replace(root, out_dir)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to make")
    for split, number in (("train", 32), ("valid", 10), ("test", 10)):
        text = f"images of a class{' and kind' * (split == 'test')} (default {number})"
        parser.add_argument(f"--n_{split}", type=integer_from(1), default=number, help=text)
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of the drawings")
    share, text = number_between(0, 1, low_open=True), "share of LOCO's image side (default 0.25)"
    parser.add_argument("--scale", type=share, default=0.25, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a demo data set")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the data set unless it is there."""
    args = parse_args(argv)
    out_dir = args.out_dir.resolve()
    names = ("n_train", "n_valid", "n_test", "seed", "scale")
    settings = {name: getattr(args, name) for name in names} | {"drawing_version": DRAWING_VERSION}
    if is_finished(out_dir, settings, args.overwrite):
        say(f"{args.out_dir} is there already with the same settings")
        return
    counts = [args.n_train, args.n_valid, *[args.n_test] * 3]
    jobs = [(c, f, i) for c in DEFECTS for f in range(len(FOLDERS)) for i in range(counts[f])]
    write_data_set(out_dir, settings, jobs)
    say(f"{args.out_dir}: {', '.join(DEFECTS)}; {len(jobs)} images")


if __name__ == "__main__":
    run_script(main)
