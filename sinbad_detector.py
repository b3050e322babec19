"""Fit a detector on normal images, and ask it whether others are anomalous.

Reads   folders and files of images of one object, with the same viewpoint and aspect ratio
Writes  OUT: the detector (fit), or a CSV: path, score, p_value, is_anomalous, levels (score)

    python sinbad_detector.py fit --train_dir normal --out bottle.npz
    python sinbad_detector.py score --detector bottle.npz new --out scores.csv --report report

An image is called anomalous if its p-value is at most --false_alarms, the false-positive rate that
is expected among normal images. Exit status 1 if an image could not be scored.
"""

import argparse
import json
import logging
from pathlib import Path

from sinbad import atomic, cli, detectors, errors, layouts, settings
from sinbad.report import page, tables

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fit_parser = commands.add_parser("fit", help="fit a detector, write it to a file")
    add = fit_parser.group(settings.INPUT_OUTPUT).add_argument
    add("--train_dir", type=cli.path, required=True, metavar="DIR", help="normal images")
    add("--out", type=cli.path, required=True, metavar="FILE", help="detector to write, .npz")
    about = "normal images for calibration (default: cross-validation on the training images)"
    add("--valid_dir", type=cli.path, metavar="DIR", help=about)
    cli.add_settings(fit_parser, ["pyramid_level", "crop_size_ratio", "rep_num_224", "folds"])
    cli.add_settings(fit_parser, ["lambda_factor", "seed", *cli.DESCRIPTOR_FLAGS])
    cli.add_settings(fit_parser, [*cli.GRID_FLAGS, *cli.BACKBONE_FLAGS, *cli.MACHINE_FLAGS])
    score_parser = commands.add_parser("score", help="score images")
    add = score_parser.group(settings.INPUT_OUTPUT).add_argument
    add("images", nargs="+", type=cli.path, metavar="IMAGE", help="image files and folders")
    about = "detector written by fit"
    add("--detector", type=cli.path, required=True, metavar="FILE", help=about)
    add("--out", type=cli.path, metavar="FILE", help="CSV to write (default: stdout)")
    add("--json", type=cli.path, metavar="FILE", help="JSON to write, same content")
    about = "folder to write: a page, index.html, of the images with heatmaps and scores"
    add("--report", type=cli.path, metavar="DIR", help=about)
    about = "the network's weights, if they were moved since fit"
    add("--weights", type=cli.path, metavar="FILE", help=about)
    score_parser.group(settings.COMPUTED).add_argument(
        "--false_alarms",
        type=cli.parse_as(settings.number(0, 1, "()")),
        default=0.05,
        metavar="RATE",
        help="false-positive rate: fraction of normal images that may be called anomalous",
    )
    cli.add_settings(score_parser, cli.MACHINE_FLAGS)
    return parser.parse_args(argv)


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder."""
    if not folder.is_dir():
        reason = "a file" if folder.exists() else "no such folder"
        raise errors.UserError(f"{folder} must be a folder of images, got {reason}")
    return [folder / name for name in layouts.list_images(folder)]


def check_output(path: Path, inputs: list[Path]) -> None:
    """Raise an error if a file cannot be written later, or is an input."""
    if path.resolve() in {image.resolve() for image in inputs}:
        raise errors.UserError(f"{path} is an input; choose another output")
    atomic.check_writable(path)


def fit(args: argparse.Namespace) -> None:
    """Fit and save."""
    train = images_in(args.train_dir)
    valid = images_in(args.valid_dir) if args.valid_dir else []
    check_output(args.out, [*train, *valid])
    detector = detectors.Detector.fit(train, valid, cli.settings_of(args))
    detector.save(args.out)
    n = len(detector.calibration)
    log.info(
        f"{args.out}: {len(train)} training images, a calibration set of {n}: false-positive rates "
        f"from {1 / (n + 1):.3g}"
    )
    print(args.out)


def write_table(args: argparse.Namespace, predictions: list[detectors.Prediction]) -> None:
    """Write the CSV and the JSON."""
    levels = sorted({level for prediction in predictions for level in prediction.levels})
    records = []
    for prediction in predictions:
        record = {"path": prediction.path, "score": None, "p_value": None, "is_anomalous": None}
        if not prediction.error:
            record["score"], record["p_value"] = prediction.score, prediction.p_value
            record["is_anomalous"] = int(prediction.is_anomalous)
        record |= {f"level_{level}": prediction.levels.get(level) for level in levels}
        records.append(record | {"error": prediction.error})
    text = tables.csv_text([list(records[0]), *(list(record.values()) for record in records)])
    if args.out is not None:
        atomic.atomic_write(args.out, text)
    else:
        print(text.rstrip("\n"))
    if args.json is not None:
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        atomic.atomic_write(args.json, text.encode("utf-8", "backslashreplace"))


def score(args: argparse.Namespace) -> int:
    """Load, score, write; return 1 if an image has no score, or no picture in the report."""
    outputs = {"out": args.out, "json": args.json}
    outputs |= {"report": args.report and args.report / page.INDEX}
    outputs = {name: path for name, path in outputs.items() if path}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        names = ", ".join(f"{name} {path}" for name, path in outputs.items())
        raise errors.UserError(f"outputs must be different files, got {names}")
    paths = []
    for path in args.images:
        paths += images_in(path) if path.is_dir() else [path]
    for path in outputs.values():
        check_output(path, [args.detector, *paths])
    if args.report:
        page.check_folder(args.report, paths, list(outputs.values()))
    detector = detectors.Detector.load(args.detector, args.weights, args.device, args.num_workers)
    report = page.Report(args.report, args.detector, detector, args.false_alarms)
    predictions: list[detectors.Prediction] = []
    try:
        for prediction, ensemble, index in detector.iter_predictions(paths, args.false_alarms):
            predictions.append(prediction)
            if prediction.error:
                log.error(prediction.error)
            if args.report:
                report.add(prediction, ensemble, index)
    finally:  # what was scored is not lost because something later fails
        if predictions:
            write_table(args, predictions)
            n_failed = sum(bool(prediction.error) for prediction in predictions)
            n_anomalous = sum(prediction.is_anomalous for prediction in predictions)
            n_scored = len(predictions) - n_failed
            log.info(f"{n_scored} images scored, {n_anomalous} anomalous, {n_failed} unreadable")
            if args.report:
                report.write(len(paths))
    return int(n_failed + report.n_lost > 0)


def main(argv: list[str] | None = None) -> int:
    """Fit, or score."""
    args = parse_args(argv)
    if args.command == "score":
        return score(args)
    fit(args)
    return 0


if __name__ == "__main__":
    errors.run_script(main, resumes=False)
